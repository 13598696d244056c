"""What transformers' Trainer logs over several processes: run by test_ranks.py, and by hand with

PYTHONPATH=src:tests torchrun --nproc_per_node 2 tests/ranks_trainer.py FOLDER
"""

from __future__ import annotations

import json
import os
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


def train(
    folder: Path, *, fsdp: int = 0, resume: Path | None = None, accumulate: int = 1, loaded: bool = True
) -> list[dict[str, float]]:
    """Six steps of six rows, saved after the third; what is logged in each. ``fsdp`` is its version; ``loaded``: the
    weights, also on other processes than the first."""
    config: dict[str, Any] = {"version": fsdp, "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]}
    if fsdp == 1:
        config["sync_module_states"] = False  # it asks for an accelerator
    if not loaded:
        config["cpu_ram_efficient_loading"] = True
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=6,
        per_device_train_batch_size=6 // accumulate // int(os.environ.get("WORLD_SIZE", "1")),
        gradient_accumulation_steps=accumulate,
        use_cpu=True,
        learning_rate=0.02,
        logging_steps=1,
        save_strategy="no" if fsdp == 1 else "steps",  # PyTorch crashes as it gathers FSDP1's weights on CPUs
        save_steps=3,
        report_to="none",
        disable_tqdm=True,
        **({"fsdp": "full_shard", "fsdp_config": config} if fsdp else {}),
    )
    if fsdp:  # accelerate shards on accelerators alone, and on CPUs would wrap in DDP without a word
        assert arguments.device.type == "cpu"
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
        PartialState._shared_state["device"] = torch.device("cpu")  # FSDP1 takes cpu:0 for another
    callback = TMKLCallback(TMKL(weight=0.5, context_weight=0.3), max_drift=0.002)
    model = with_lora(toy_llama())
    if not loaded and dist.get_rank():
        for parameter in model.parameters():  # what transformers 5.0 may leave there
            parameter.data.fill_(torch.nan)
    run = Trainer(model=model, args=arguments, train_dataset=rows(), callbacks=[callback])
    run.train(resume_from_checkpoint=None if resume is None else str(resume))
    assert not fsdp or type(run.model).__name__.startswith({1: "FullySharded", 2: "FSDP"}[fsdp])
    return [{key: entry[key] for key in FIGURES} for entry in run.state.log_history if "loss" in entry]


def main(folder: Path, *, resume: bool) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    weights: list[float] = []
    step_end = TMKLCallback.on_step_end

    def on_step_end(self: TMKLCallback, *arguments: Any, **kwargs: Any) -> None:
        step_end(self, *arguments, **kwargs)
        assert self.attachment is not None
        weights.append(self.attachment.context_weight)

    TMKLCallback.on_step_end = on_step_end  # type: ignore[method-assign]
    versions = {"ddp": 0, "fsdp2": 2}
    if resume:
        found: dict[str, Any] = {
            name: train(folder / name, fsdp=fsdp, resume=folder / name / "checkpoint-3")
            for name, fsdp in versions.items()
        }
    else:
        found = {"ddp": train(folder / "ddp")}
        of_ranks: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(of_ranks, weights)
        found["context weights"] = of_ranks
        found |= {f"fsdp{version}": train(folder / f"fsdp{version}", fsdp=version) for version in (1, 2)}
        found["fsdp2, weights on the first process only"] = train(folder / "unloaded", fsdp=2, loaded=False)
    if dist.get_rank() == 0:
        print("RESULTS " + json.dumps(found))
    leave()


if __name__ == "__main__":
    main(Path(sys.argv[1]), resume="resume" in sys.argv)
