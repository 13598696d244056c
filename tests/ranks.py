"""What several processes compute against one: run by test_ranks.py, and by hand with

PYTHONPATH=src:tests torchrun --nproc_per_node 2 tests/ranks.py
"""

from __future__ import annotations

import copy
import itertools
import json
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from conftest import batch, toy_llama, with_lora
from mask_the_target import TMKL, attach
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


FORMS: dict[str, Callable[[Any], nn.Module]] = {
    "ddp": as_ddp,
    "fsdp2": lambda model: as_fsdp(model, head=False),
    "fsdp2, head": lambda model: as_fsdp(model, head=True),
}


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def first_step(wrap: Callable[[Any], nn.Module], start: nn.Module, data: dict[str, Tensor], micro: int) -> Any:
    """Loss over all ranks, and every trainable weight after one step of SGD over `micro` batches a rank."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    model = copy.deepcopy(start)
    attachment = attach(model, OPTIONS)  # before it is wrapped
    wrapped = wrap(model)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=LEARNING_RATE)
    items = torch.tensor(int((data["labels"][:, 1:] != -100).sum()))
    context = torch.tensor(attachment.count_context(data))
    mine, total = share(data, rank, ranks), torch.zeros(())
    for part in range(micro):
        rows = {name: value[part::micro] for name, value in mine.items()}
        loss = wrapped(**rows, num_items_in_batch=items, num_context_in_batch=context).loss
        (loss * ranks).backward()  # gradients are averaged over ranks
        total += loss.detach()
    dist.all_reduce(total)
    optimizer.step()
    return float(total), [whole(p.detach()).clone() for p in model.parameters() if p.requires_grad]


def main() -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    base = toy_llama()
    start = with_lora(copy.deepcopy(base), moved=0.2)
    found = {}
    for (name, wrap), silent, micro in itertools.product(FORMS.items(), (0, ROWS // dist.get_world_size()), (1, 2)):
        data = global_batch(silent)
        loss, weights = first_step(wrap, start, data, micro)
        alone = copy.deepcopy(start)
        expected = reference_loss(alone, base, data, OPTIONS)
        expected.loss.backward()
        trained = [p for p in alone.parameters() if p.requires_grad]
        moved = [p.detach() - LEARNING_RATE * p.grad for p in trained]
        found[f"{name}, {silent} silent rows, {micro} micro-batches"] = {
            "loss": loss,
            "expected": float(expected.loss.detach()),
            "moved": max(float((p.detach() - q).abs().max()) for p, q in zip(trained, moved, strict=True)),
            "error": max(float((p - q).abs().max()) for p, q in zip(weights, moved, strict=True)),
        }
    try:
        attach(as_fsdp(copy.deepcopy(start), head=False), OPTIONS)
        refused = "not refused"
    except ValueError as error:
        refused = str(error)
    if dist.get_rank() == 0:
        print("REFUSED " + refused)
        print("RESULTS " + json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
