"""What transformers' Trainer logs over several processes: run by test_ranks.py, and by hand with

PYTHONPATH=src:tests torchrun --nproc_per_node 2 tests/ranks_trainer.py FOLDER
"""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate.state import PartialState
from accelerate.utils import DistributedType
from transformers import Trainer, TrainingArguments

from conftest import toy_llama, with_lora
from mask_the_target import TMKL, TMKLCallback
from ranks import leave

FIGURES = ("loss", "ce", "kl", "context_kl", "context_weight")


def rows() -> list[dict[str, Any]]:
    """With unequal numbers of targets and of context tokens."""
    generator = torch.Generator().manual_seed(0)
    found = []
    for place in range(24):
        ids = torch.randint(3, 47, (10,), generator=generator).tolist()
        begin = 2 + place % 7
        found.append({"input_ids": ids, "attention_mask": [1] * 10, "labels": [-100] * begin + ids[begin:]})
    return found


def train(folder: Path, *, fsdp: bool = False, resume: Path | None = None, **settings: Any) -> list[dict[str, float]]:
    """Six steps of four rows, saved after the third; what is logged in each."""
    config = {"version": 2, "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]}
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=6,
        per_device_train_batch_size=2,
        use_cpu=True,
        learning_rate=0.02,
        logging_steps=1,
        save_steps=3,
        report_to="none",
        disable_tqdm=True,
        **({"fsdp": "full_shard", "fsdp_config": config} if fsdp else {}),
        **settings,
    )
    if fsdp:  # accelerate shards on accelerators alone, and on CPUs would wrap in DDP without a word
        assert arguments.device.type == "cpu"
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    callback = TMKLCallback(TMKL(weight=0.5, context_weight=0.3), max_drift=0.002)
    run = Trainer(model=with_lora(toy_llama()), args=arguments, train_dataset=rows(), callbacks=[callback])
    run.train(resume_from_checkpoint=None if resume is None else str(resume))
    assert not fsdp or type(run.model).__name__.startswith("FSDP")
    return [{key: entry[key] for key in FIGURES} for entry in run.state.log_history if "loss" in entry]


def main(folder: Path) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    weights: list[float] = []
    step_end = TMKLCallback.on_step_end

    def on_step_end(self: TMKLCallback, *arguments: Any, **kwargs: Any) -> None:
        step_end(self, *arguments, **kwargs)
        assert self.attachment is not None
        weights.append(self.attachment.context_weight)

    TMKLCallback.on_step_end = on_step_end  # type: ignore[method-assign]
    found: dict[str, Any] = {"ddp": train(folder / "ddp")}
    of_ranks: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(of_ranks, weights)
    found["context weights"] = of_ranks
    found["fsdp2"] = train(folder / "fsdp2", fsdp=True)
    if dist.get_rank() == 0:
        print("RESULTS " + json.dumps(found))
    leave()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
