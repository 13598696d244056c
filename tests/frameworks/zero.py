"""What several processes compute under DeepSpeed's ZeRO against one: run by test_deepspeed.py, and by hand with

DS_ACCELERATOR=cpu PYTHONPATH=src:tests torchrun --nproc_per_node 2 tests/frameworks/zero.py loop
"""

from __future__ import annotations

import copy
import itertools
import json
import os
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
    default_data_collator,
)

from conftest import toy_llama, with_lora
from mask_the_target import TMKL, CachedBase, TMKLCallback, attach
from ranks import LEARNING_RATE, OPTIONS, ROWS, compared, denominators, fresh, global_batch, leave, micro_batches, share

FIGURES = ("loss", "ce", "kl", "context_kl")


def config(stage: int) -> dict[str, Any]:
    return {
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},  # all weights are partitioned
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "gradient_clipping": 0.0,
        "steps_per_print": 10**9,
    }


def first_step(
    stage: int,
    start: nn.Module,
    data: dict[str, Tensor],
    micro: int,
    choice: Any = "auto",
    *,
    checkpointing: bool = False,
    packed: bool = False,
    to_engine: bool = False,
) -> tuple[float, list[Tensor]]:
    """Loss over all ranks, and every trainable weight after one step of SGD over `micro` batches a rank.
    ``to_engine``: attached when the model is partitioned, not before."""
    ranks = dist.get_world_size()
    model = fresh(start, checkpointing=checkpointing)
    attachment = None if to_engine else attach(model, OPTIONS, base=choice)
    if isinstance(choice, CachedBase):
        assert attachment is not None
        attachment.fill_cache(share(data, 0, ranks))  # the first rank finds its sequences, the others don't
    trained = [p for p in model.parameters() if p.requires_grad]
    batches = {"train_micro_batch_size_per_gpu": ROWS // ranks // micro, "gradient_accumulation_steps": micro}
    engine, *_ = deepspeed.initialize(
        model=model, optimizer=torch.optim.SGD(trained, lr=LEARNING_RATE), config=config(stage) | batches
    )
    attachment = attachment or attach(engine, OPTIONS, base=choice)
    whole_batch, total = denominators(attachment, data), torch.zeros(())
    for rows in micro_batches(data, micro, packed=packed):
        loss = engine(**rows, **whole_batch).loss
        engine.backward(loss * ranks * micro)  # gradients are averaged over ranks and micro-batches
        engine.step()
        total += loss.detach()
    dist.all_reduce(total)
    with deepspeed.zero.GatheredParameters(trained, enabled=stage == 3):
        return float(total), [p.detach().float().clone() for p in trained]


def loop() -> dict[str, Any]:
    base = toy_llama()
    start = with_lora(copy.deepcopy(base), moved=0.2)
    found = {}
    for stage, silent, micro in itertools.product((1, 2, 3), (0, ROWS // dist.get_world_size()), (1, 2)):
        data = global_batch(silent)
        step = first_step(stage, start, data, micro)
        found[f"stage {stage}, {silent} silent rows, {micro} micro-batches"] = compared(step, start, base, data)
    for stage, packed in itertools.product((2, 3), (False, True)):
        step = first_step(stage, start, data, 2, checkpointing=True, packed=packed)
        found[f"stage {stage}, checkpointing{', packed' if packed else ''}"] = compared(step, start, base, data)
    for stage in (2, 3):
        with tempfile.TemporaryDirectory() as folder:
            step = first_step(stage, start, global_batch(0), 1, CachedBase(folder=folder))
            found[f"stage {stage}, cached base"] = compared(step, start, base, global_batch(0))
    late = with_lora(copy.deepcopy(base), moved=0.2, layers_to_transform=[1])
    found["stage 3, adapter on the last layer"] = compared(first_step(3, late, data, 2), late, base, data)
    for stage in (2, 3):
        step = first_step(stage, start, data, 2, to_engine=True)
        found[f"stage {stage}, attached to the engine"] = compared(step, start, base, data)
    return found


def trainer(
    folder: Path,
    stage: int,
    *,
    partitioned: bool = False,
    resume: bool = False,
    pissa: bool = False,
    separate: bool = False,
    anchors: bool = False,
) -> list[dict[str, float]]:
    """What transformers' Trainer logs in four steps of six rows each, saved after the second: over all ranks with ZeRO,
    or in one process. ``partitioned``: by from_pretrained, as where the arguments are made before the model."""
    generator = torch.Generator().manual_seed(0)
    rows = []
    for place in range(24):
        ids = torch.randint(3, 47, (10,), generator=generator).tolist()
        begin = 2 + place % 5  # unequal numbers of targets
        rows.append({"input_ids": ids, "attention_mask": [1] * 10, "labels": [-100] * begin + ids[begin:]})
    auto = dict.fromkeys(
        ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping"),
        "auto",
    )
    whole = None if partitioned else AutoModelForCausalLM.from_pretrained(folder / "base")
    arguments = TrainingArguments(
        output_dir=str(folder / f"stage{stage}"),
        max_steps=4,
        per_device_train_batch_size=6 // int(os.environ.get("WORLD_SIZE", "1")),
        deepspeed=config(stage) | auto if stage else None,
        use_cpu=True,
        bf16=False,
        optim="sgd",
        learning_rate=0.05,
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
        logging_steps=1,
        save_steps=2,
        report_to="none",
        disable_tqdm=True,
    )
    model = AutoModelForCausalLM.from_pretrained(folder / "base") if partitioned else whole
    assert partitioned == hasattr(next(model.parameters()), "ds_id")
    torch.manual_seed(0)
    model = with_lora(model, init_lora_weights="pissa" if pissa else True)
    base: Any = AutoModelForCausalLM.from_pretrained(folder / "base") if separate else "auto"
    callback = TMKLCallback(TMKL(weight=0.5, context_weight=0.3), base, anchors="auto" if anchors else None)
    words = Tokenizer(WordLevel({"<s>": 0}, unk_token="<s>"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, bos_token="<s>", pad_token="<s>")
    run = Trainer(
        model=model,
        args=arguments,
        train_dataset=rows,
        callbacks=[callback],
        processing_class=tokenizer,
        data_collator=default_data_collator,
    )
    run.train(resume_from_checkpoint=str(folder / f"stage{stage}" / "checkpoint-2") if resume else None)
    return [{key: entry[key] for key in FIGURES} for entry in run.state.log_history if "loss" in entry]


def main(what: str, folder: str = "") -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    if what != "0":
        deepspeed.init_distributed("gloo")
    stage, *asked = what.split()
    try:
        found: Any = loop() if what == "loop" else trainer(Path(folder), int(stage), **dict.fromkeys(asked, True))
    except ValueError as error:
        found = str(error)
    if not dist.is_initialized() or dist.get_rank() == 0:
        print("RESULTS " + json.dumps(found))
    if dist.is_initialized():
        leave()


if __name__ == "__main__":
    main(*sys.argv[1:])
