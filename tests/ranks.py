"""What several processes compute against one: run by test_ranks.py, and by hand with

PYTHONPATH=src:tests torchrun --nproc_per_node 2 tests/ranks.py
"""

from __future__ import annotations

import copy
import itertools
import json
import os
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import torch
import torch.distributed as dist
from peft.utils.other import fsdp_auto_wrap_policy
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.nn.parallel import DistributedDataParallel
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from conftest import batch, move, toy_llama, with_lora
from mask_the_target import TMKL, Attachment, CachedBase, attach
from reference import reference_loss

OPTIONS = TMKL(weight=0.5, context_weight=0.3)
ROWS = 6  # of the whole batch, shared out over two or three processes
LEARNING_RATE = 0.05


def global_batch(silent: int) -> dict[str, Tensor]:
    """Rows with unequal numbers of supervised tokens; the first `silent` have none."""
    found = batch(rows=ROWS, length=12)
    found["labels"][:silent] = -100
    return found


def share(data: dict[str, Tensor], rank: int, parts: int) -> dict[str, Tensor]:
    size = ROWS // parts
    return {name: value[rank * size : (rank + 1) * size] for name, value in data.items()}


def as_ddp(model: nn.Module) -> nn.Module:
    return DistributedDataParallel(model)


def as_fsdp(model: Any, *, head: bool) -> nn.Module:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    inner = model.get_base_model()
    for layer in inner.model.layers:
        fully_shard(layer, mesh=mesh)
    if head:
        fully_shard([inner.model.norm, inner.lm_head], mesh=mesh)  # one unit, as accelerate makes it
    return fully_shard(model, mesh=mesh)


def as_fsdp1(model: Any, policy: Any = None) -> nn.Module:
    policy = policy or ModuleWrapPolicy({LlamaDecoderLayer})
    return FullyShardedDataParallel(model, auto_wrap_policy=policy, use_orig_params=True, device_id=torch.device("cpu"))


FORMS: dict[str, Callable[[Any], nn.Module]] = {
    "ddp": as_ddp,
    "fsdp1": as_fsdp1,
    "fsdp2": lambda model: as_fsdp(model, head=False),
    "fsdp2, head": lambda model: as_fsdp(model, head=True),
}
# Of LoRA: on all layers; on the last one, so that the base pass shares the first; and with a head of its own.
ADAPTERS: dict[str, dict[str, Any]] = {
    "lora": {},
    "shared layer": {"layers_to_transform": [1]},
    "lora on the head": {"target_modules": ["q_proj", "lm_head"]},
    "saved head": {"modules_to_save": ["lm_head"]},
}


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def micro_batches(data: dict[str, Tensor], micro: int, *, packed: bool) -> Iterator[dict[str, Tensor]]:
    """This rank's share, in so many parts; ``packed``: the documents of each in one row, without padding."""
    mine = share(data, dist.get_rank(), dist.get_world_size())
    for part in range(micro):
        rows = {name: value[part::micro] for name, value in mine.items()}
        if packed:
            lengths = rows.pop("attention_mask").sum(1).tolist()
            rows["labels"] = rows["labels"].clone()
            rows["labels"][:, 0] = -100  # no document's last token predicts the next one's first
            rows = {
                name: torch.cat([row[:n] for row, n in zip(value, lengths, strict=True)])[None]
                for name, value in rows.items()
            }
            rows["position_ids"] = torch.cat([torch.arange(n) for n in lengths])[None]
        yield rows


def fresh(start: nn.Module, *, checkpointing: bool) -> Any:
    model: Any = copy.deepcopy(start)
    if checkpointing:
        model.get_base_model().gradient_checkpointing_enable()
    return model


def denominators(attachment: Attachment, data: dict[str, Tensor]) -> dict[str, Tensor]:
    """Of the whole batch, as a trainer gives them to each rank's forwards."""
    return {
        "num_items_in_batch": torch.tensor(int((data["labels"][:, 1:] != -100).sum())),
        "num_context_in_batch": torch.tensor(attachment.count_context(data)),
    }


def first_step(
    wrap: Callable[[Any], nn.Module],
    start: nn.Module,
    data: dict[str, Tensor],
    micro: int,
    choice: Any = "auto",
    *,
    checkpointing: bool = False,
    packed: bool = False,
) -> tuple[float, list[Tensor]]:
    """Loss over all ranks, and every trainable weight after one step of SGD over `micro` batches a rank."""
    ranks = dist.get_world_size()
    model = fresh(start, checkpointing=checkpointing)
    attachment = attach(model, OPTIONS, base=choice)  # before it is wrapped
    if choice == "initial":
        move(model, 0.2)
    if isinstance(choice, CachedBase) and choice.folder is not None:
        known = share(data, 0, ranks)
        attachment.fill_cache(known)  # the first rank finds its sequences, the others don't
    wrapped = wrap(model)
    optimizer = torch.optim.SGD([p for p in wrapped.parameters() if p.requires_grad], lr=LEARNING_RATE)
    whole_batch, total = denominators(attachment, data), torch.zeros(())
    for rows in micro_batches(data, micro, packed=packed):
        loss = wrapped(**rows, **whole_batch).loss
        (loss * ranks).backward()  # gradients are averaged over ranks
        total += loss.detach()
    dist.all_reduce(total)
    optimizer.step()
    gathered = FullyShardedDataParallel.summon_full_params(wrapped) if wrap is as_fsdp1 else nullcontext()
    with gathered:
        return float(total), [whole(p.detach()).clone() for p in model.parameters() if p.requires_grad]


def compared(
    step: tuple[float, list[Tensor]], start: nn.Module, base: nn.Module, data: dict[str, Tensor], *, moved: float = 0.0
) -> dict[str, float]:
    """A first step of all ranks, and that of one process over the whole batch, from ``start`` moved so far."""
    loss, weights = step
    alone = copy.deepcopy(start)
    move(alone, moved)
    expected = reference_loss(alone, base, data, OPTIONS)
    expected.loss.backward()
    trained = [p for p in alone.parameters() if p.requires_grad]
    moved = [p.detach() - LEARNING_RATE * p.grad for p in trained]
    return {
        "loss": loss,
        "expected": float(expected.loss.detach()),
        "moved": max(float((p.detach() - q).abs().max()) for p, q in zip(trained, moved, strict=True)),
        "error": max(float((p - q).abs().max()) for p, q in zip(weights, moved, strict=True)),
    }


def refused(run: Callable[[], Any]) -> str:
    try:
        run()
    except (ValueError, RuntimeError) as error:
        return str(error)
    return "not refused"


def main() -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    base = toy_llama()
    starts = {name: with_lora(copy.deepcopy(base), moved=0.2, **config) for name, config in ADAPTERS.items()}
    start, silent = starts["lora"], ROWS // dist.get_world_size()
    found = {}
    for name, rows, micro in itertools.product(FORMS, (0, silent), (1, 2)):
        data = global_batch(rows)
        step = first_step(FORMS[name], start, data, micro)
        found[f"{name}, {rows} silent rows, {micro} micro-batches"] = compared(step, start, base, data)
    data = global_batch(silent)
    for name, adapter in itertools.product(FORMS, list(ADAPTERS)[1:]):
        step = first_step(FORMS[name], starts[adapter], data, 2)
        found[f"{name}, {adapter}"] = compared(step, starts[adapter], base, data)
    for name in FORMS:
        step = first_step(FORMS[name], start, data, 2, copy.deepcopy(base))
        found[f"{name}, separate base"] = compared(step, start, base, data)
    for name, packed in itertools.product(FORMS, (False, True)):
        step = first_step(FORMS[name], start, data, 2, checkpointing=True, packed=packed)
        found[f"{name}, checkpointing{', packed' if packed else ''}"] = compared(step, start, base, data)
    pissa = with_lora(copy.deepcopy(base), init_lora_weights="pissa")
    step = first_step(as_ddp, pissa, data, 2, "initial")
    found["ddp, initial adapter"] = compared(step, pissa, base, data, moved=0.2)
    messages = {
        "sharded": refused(lambda: attach(as_fsdp(copy.deepcopy(start), head=False), OPTIONS)),
        "head's parts": refused(
            lambda: first_step(
                lambda model: as_fsdp1(model, fsdp_auto_wrap_policy(model)), starts["saved head"], global_batch(0), 1
            )
        ),
    }
    model = copy.deepcopy(start)
    with attach(model, OPTIONS, base="cached") as attachment:
        settings = {"ACCELERATE_USE_FSDP": "true", "FSDP_CPU_RAM_EFFICIENT_LOADING": "true"}
        os.environ |= settings
        messages["first process's weights"] = refused(lambda: attachment.fill_cache(global_batch(0)))
        messages["first process's base"] = refused(
            lambda: attach(copy.deepcopy(start), OPTIONS, base=copy.deepcopy(base))
        )
        late = copy.deepcopy(start)
        with warnings.catch_warnings(record=True) as given, attach(late, OPTIONS):
            warnings.simplefilter("always")
            for parameter in late.parameters():  # by FSDP, from the first process
                parameter.data.add_(1.0)
        messages["weights given"] = " ".join(str(warning.message) for warning in given)
        for name in settings:
            del os.environ[name]
        as_fsdp(model, head=False)
        messages["sharded weights"] = refused(lambda: attachment.fill_cache(global_batch(0)))
    for name in ("fsdp1", "fsdp2"):
        messages[f"initial adapter, {name}"] = refused(
            lambda name=name: first_step(FORMS[name], pissa, global_batch(0), 1, choice="initial")
        )
    # The first rank finds its sequences, and the others don't: a base pass of its own would wait for ever.
    for name in FORMS:
        with tempfile.TemporaryDirectory() as folder:
            step = first_step(FORMS[name], start, global_batch(0), 1, CachedBase(folder=folder))
            found[f"{name}, cached base"] = compared(step, start, base, global_batch(0))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        first_step(FORMS["fsdp2"], start, global_batch(silent), 1, choice="cached")
    messages["cached base"] = " ".join(str(warning.message) for warning in caught)
    if dist.get_rank() == 0:
        print("MESSAGES " + json.dumps(messages))
        print("RESULTS " + json.dumps(found))
    leave()


def leave() -> None:
    """End this process when all have come here. Taking the group down by itself has aborted one in fifteen runs of
    FSDP2 on a busy machine, after all was done ("terminate called without an active exception")."""
    dist.barrier()
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
