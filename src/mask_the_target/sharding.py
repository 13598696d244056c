"""What each of several processes has of one model: parts of its weights (tensor parallelism, FSDP, ZeRO-3), or none."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

T = TypeVar("T")


def is_distributed(tensor: Tensor) -> bool:
    """Whether it is a DTensor, which has a part of the whole on each process."""
    return hasattr(tensor, "full_tensor")


def is_sharded(module: nn.Module) -> bool:
    """Whether all processes together gather parts of ``module`` one by one as it runs: FSDP's units in it, or ZeRO-3's
    weights."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return False
    from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel

    units = [m for m in module.modules() if m is not module and isinstance(m, (FSDPModule, FullyShardedDataParallel))]
    return bool(units) or any(map(in_zero3, module.parameters()))


def whole_shape(weight: Tensor) -> torch.Size:
    """The shape of a weight, also where ZeRO-3 has left nothing in its place."""
    return weight.ds_shape if in_zero3(weight) else weight.shape  # type: ignore[attr-defined]


@contextmanager
def gathering(model: nn.Module) -> Iterator[None]:
    """A model that ``from_pretrained`` partitioned for ZeRO-3 can run in here before DeepSpeed's engine is made, which
    gathers each module's weights for its own call, and so do we. Nothing is done with any other model."""
    engine = hasattr(model, "ds_id")  # DeepSpeed's engine numbers the modules, and gathers
    own = {module: [p for p in module.parameters(recurse=False) if in_zero3(p)] for module in model.modules()}
    with ExitStack() as hooks:
        for module, weights in own.items():
            if weights and not engine:
                _gather_in_calls(module, weights, hooks)
        yield


def _gather_in_calls(module: nn.Module, weights: list[Any], hooks: ExitStack) -> None:
    import deepspeed

    gathered: list[Any] = []

    def gather(module: nn.Module, args: Any) -> None:
        whole = deepspeed.zero.GatheredParameters(weights)
        whole.__enter__()
        gathered.append(whole)

    def release(module: nn.Module, args: Any, output: Any) -> None:
        if gathered:  # also called where gather has failed
            gathered.pop().__exit__(None, None, None)

    hooks.enter_context(module.register_forward_pre_hook(gather))
    hooks.enter_context(module.register_forward_hook(release, always_call=True))


def in_zero3(weight: Tensor) -> bool:
    """Whether DeepSpeed's ZeRO-3 keeps it, in parts or whole for the time of a call."""
    return hasattr(weight, "ds_id")


def loaded_by_first_process() -> bool:
    """Whether the other processes may have nothing of a model until it is wrapped, by FSDP's
    ``cpu_ram_efficient_loading``; that is what transformers' ``is_fsdp_enabled`` asks for.

    With it, 5.16 leaves zeros in their weights, and 5.0 whatever the memory held; 5.24 loads them.
    """
    from transformers.integrations import is_fsdp_enabled

    return is_fsdp_enabled()


def from_first_process(model: nn.Module, run: Callable[[], T]) -> T:
    """``run()``; where the first process alone has the weights, its answer there, or its error, on each: nothing can be
    proved on the others."""
    if not loaded_by_first_process() or is_sharded(model):
        return run()
    answer, failure = None, None
    if torch.distributed.get_rank() == 0:
        try:
            answer = run()
        except Exception as error:  # of any kind: the others wait for it
            failure = error
    found: list[Any] = [answer, None if failure is None else str(failure)]
    torch.distributed.broadcast_object_list(found)
    if failure is not None:
        raise failure
    if found[1] is not None:
        raise ValueError(found[1])
    return found[0]
