"""What several processes compute under DeepSpeed's ZeRO against one: run by test_deepspeed.py, and by hand with

DS_ACCELERATOR=cpu PYTHONPATH=src:tests torchrun --nproc_per_node 2 tests/frameworks/zero.py loop
"""

from __future__ import annotations

import copy
import itertools
import json
import sys
import tempfile
import warnings
from contextlib import nullcontext
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

from conftest import toy_llama, with_lora
from mask_the_target import TMKL, TMKLCallback, attach
from ranks import LEARNING_RATE, OPTIONS, ROWS, global_batch, leave, share
from reference import reference_loss


def config(stage: int) -> dict[str, Any]:
    return {
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},  # all weights are partitioned
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "gradient_clipping": 0.0,
        "steps_per_print": 10**9,
    }


def first_step(stage: int, start: nn.Module, data: dict[str, Tensor], micro: int) -> tuple[float, list[Tensor]]:
    """Loss over all ranks, and every trainable weight after one step of SGD over `micro` batches a rank."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    model: Any = copy.deepcopy(start)
    attachment = attach(model, OPTIONS)  # before it is partitioned
    trained = [p for p in model.parameters() if p.requires_grad]
    batches = {"train_micro_batch_size_per_gpu": ROWS // ranks // micro, "gradient_accumulation_steps": micro}
    engine, *_ = deepspeed.initialize(
        model=model, optimizer=torch.optim.SGD(trained, lr=LEARNING_RATE), config=config(stage) | batches
    )
    items = torch.tensor(int((data["labels"][:, 1:] != -100).sum()))
    context = torch.tensor(attachment.count_context(data))
    mine, total = share(data, rank, ranks), torch.zeros(())
    for part in range(micro):
        rows = {name: value[part::micro] for name, value in mine.items()}
        loss = engine(**rows, num_items_in_batch=items, num_context_in_batch=context).loss
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
        loss, weights = first_step(stage, start, data, micro)
        alone = copy.deepcopy(start)
        expected = reference_loss(alone, base, data, OPTIONS)
        expected.loss.backward()
        trained = [p for p in alone.parameters() if p.requires_grad]
        moved = [p.detach() - LEARNING_RATE * p.grad for p in trained]
        found[f"stage {stage}, {silent} silent rows, {micro} micro-batches"] = {
            "loss": loss,
            "expected": float(expected.loss.detach()),
            "moved": max(float((p.detach() - q).abs().max()) for p, q in zip(trained, moved, strict=True)),
            "error": max(float((p - q).abs().max()) for p, q in zip(weights, moved, strict=True)),
        }
    return found


def trainer(stage: int, *, partitioned: bool = False) -> list[dict[str, float]]:
    """What transformers' Trainer logs in three steps of four rows each: over two ranks with ZeRO, or in one process.
    ``partitioned``: before the trainer is built."""
    generator = torch.Generator().manual_seed(0)
    rows = []
    for place in range(12):
        ids = torch.randint(3, 47, (10,), generator=generator).tolist()
        begin = 2 + place % 5  # unequal numbers of targets
        rows.append({"input_ids": ids, "attention_mask": [1] * 10, "labels": [-100] * begin + ids[begin:]})
    auto = dict.fromkeys(
        ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping"),
        "auto",
    )
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            max_steps=3,
            per_device_train_batch_size=2 if stage else 4,
            deepspeed=config(stage) | auto if stage else None,
            use_cpu=True,
            bf16=False,
            optim="sgd",
            learning_rate=0.05,
            lr_scheduler_type="constant",
            max_grad_norm=0.0,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        callback = TMKLCallback(TMKL(weight=0.5))
        with deepspeed.zero.Init() if partitioned else nullcontext():  # as from_pretrained loads it
            model = with_lora(toy_llama(pad_token_id=None))
        run = Trainer(model=model, args=arguments, train_dataset=rows, callbacks=[callback])
        run.train()
    return [{key: entry[key] for key in ("loss", "ce", "kl")} for entry in run.state.log_history if "loss" in entry]


def main(what: str) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    if what != "0":
        deepspeed.init_distributed("gloo")
    try:
        found: Any = loop() if what == "loop" else trainer(int(what[0]), partitioned=what.endswith("partitioned"))
    except ValueError as error:
        found = str(error)
    if not dist.is_initialized() or dist.get_rank() == 0:
        print("RESULTS " + json.dumps(found))
    if dist.is_initialized():
        leave()


if __name__ == "__main__":
    main(sys.argv[1])
