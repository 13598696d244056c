"""The decoder layers before the first adapter: base and adapted pass compute the same there, so they run once.

With an adapter on the later layers only, the base pass keeps the hidden states that leave the last untouched layer, and
the adapted pass starts from them. Nothing is tabulated by family: the layers are found by watching a forward, and
:func:`find_shared_prefix` shares nothing unless it has seen that the result is the same, bit for bit.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from mask_the_target.base import adapter_layers, adapters_off
from mask_the_target.head import evaluating, text_config


class SharedPrefix:
    """Layers that base and adapted pass share. Made by :func:`find_shared_prefix`.

    Attributes:
        layers: the decoder layers before the first adapted one.
    """

    def __init__(self, layers: list[nn.Module], early: list[nn.Module]) -> None:
        self.layers = layers
        self._early = early  # all modules that run before the first adapted layer
        self._state = self._observed()
        self._recorded: Tensor | None = None

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Around the base pass: keep what the last shared layer returns, ``[B, T, d]``."""

        def keep(layer: nn.Module, inputs: Any, output: Tensor) -> None:
            self._recorded = output.detach()

        handle = self.layers[-1].register_forward_hook(keep)
        try:
            yield
        finally:
            handle.remove()

    @contextmanager
    def reusing(self) -> Iterator[None]:
        """Around the adapted pass over the same batch: the shared layers pass on what the base pass has kept.

        Where something before the first adapter changed since it was found (a hook on the embeddings, as NEFTune's, a
        dropout, a weight that is trained now), they run as ever.
        """
        recorded, self._recorded = self._recorded, None
        if recorded is None or self._observed() != self._state:
            yield
            return

        def resume(entered: Tensor) -> Tensor:
            # Where the embeddings were made to require a gradient (re-entrant checkpointing gives none to layers whose
            # input doesn't), so must what stands in for them.
            return recorded.requires_grad_(entered.requires_grad)

        replaced = []
        try:
            for layer in self.layers:
                replaced.append((layer, layer.__dict__.get("forward"), layer.__dict__.get("gradient_checkpointing")))
                passing = resume if layer is self.layers[-1] else _same
                layer.__dict__["forward"] = functools.partial(_pass_on, passing)
                if hasattr(layer, "gradient_checkpointing"):  # there is nothing to compute again
                    layer.__dict__["gradient_checkpointing"] = False
            yield
        finally:
            for layer, forward, checkpointing in replaced:
                for name, value in (("forward", forward), ("gradient_checkpointing", checkpointing)):
                    layer.__dict__.pop(name, None)
                    if value is not None:
                        layer.__dict__[name] = value

    def _observed(self) -> list[Any]:
        return [
            (
                len(module._forward_hooks),
                len(module._forward_pre_hooks),
                _dropout(module),
                any(parameter.requires_grad for parameter in module._parameters.values() if parameter is not None),
            )
            for module in self._early
        ]


def _pass_on(passing: Callable[[Tensor], Tensor], *args: Any, **kwargs: Any) -> Tensor:
    return passing(_entering(args, kwargs))


def _same(hidden: Tensor) -> Tensor:
    return hidden


def _entering(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return args[0] if args else kwargs.get("hidden_states")


def _dropout(module: nn.Module) -> float:
    """The largest probability with which ``module`` itself drops something in training."""
    own = [module.p] if isinstance(module, nn.modules.dropout._DropoutNd) else []
    found = [value for name, value in vars(module).items() if "dropout" in name and isinstance(value, float)]
    return max([0.0, *own, *found])


def find_shared_prefix(model: nn.Module, run: Callable[[], Tensor]) -> SharedPrefix | None:
    """The layers that can run once for both passes, or None where there are none or it can't be proved.

    Args:
        model: the inner causal LM with its adapter layers; flags, gradients and random state are left as they are.
        run: runs its forward on a few tokens and gives the hidden states that reach the head, ``[B, T, d]``.
    """
    if hasattr(text_config(model), "output_router_logits"):
        return None  # the router's auxiliary loss is taken from every layer
    adapted = {id(module) for module in adapter_layers(model)}
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of checkpointing without gradients
            with evaluating(model):
                found = _watch(model, run, adapted)
                if found is None:
                    return None
                prefix = SharedPrefix(*found)
                if any(_dropout(module) for module in prefix._early):
                    return None
                with adapters_off(model), prefix.recording():
                    run()
                kept = prefix._recorded
                expected = run()
                with prefix.reusing():
                    if not torch.equal(run(), expected):
                        return None
            return prefix if kept is not None and _same_in_training(model, prefix, run, kept) else None
    except (RuntimeError, ValueError, TypeError, AttributeError, IndexError, KeyError):
        return None  # a forward that doesn't go on without its first layers; with them it does


def _watch(
    model: nn.Module, run: Callable[[], Tensor], adapted: set[int]
) -> tuple[list[nn.Module], list[nn.Module]] | None:
    """The layers before the first one that moves, and all modules that run before that one."""
    calls: list[tuple[nn.Module, Any]] = []  # in the order of entering, with the first argument
    outputs: dict[int, Any] = {}

    def enter(module: nn.Module, args: Any, kwargs: Any) -> None:
        calls.append((module, _entering(args, kwargs)))

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        outputs[id(module)] = output

    handles = []
    for module in model.modules():
        handles.append(module.register_forward_pre_hook(enter, with_kwargs=True))
        handles.append(module.register_forward_hook(leave))
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()

    entered: dict[int, list[Any]] = {}
    for module, first in calls:
        entered.setdefault(id(module), []).append(first)
    order = {id(module): number for number, (module, _) in enumerate(calls)}

    def one_after_the_other(layers: nn.ModuleList) -> bool:
        once = len(layers) > 1 and all(len(entered.get(id(layer), [])) == 1 for layer in layers)
        return once and all(
            isinstance(outputs[id(a)], Tensor) and entered[id(b)][0] is outputs[id(a)] and order[id(a)] < order[id(b)]
            for a, b in zip(layers, list(layers)[1:], strict=False)
        )

    def moves(module: nn.Module) -> bool:
        return any(id(m) in adapted for m in module.modules()) or any(p.requires_grad for p in module.parameters())

    lists = [m for m in model.modules() if isinstance(m, nn.ModuleList) and one_after_the_other(m)]
    if not lists:
        return None
    layers = max((list(found) for found in lists), key=len)
    count = next((number for number, layer in enumerate(layers) if moves(layer)), 0)
    if count == 0:
        return None
    following = layers[count]
    before = {id(m): m for m, _ in calls[: order[id(following)]]}
    early = [m for m in before.values() if not any(inner is following for inner in m.modules())]
    later = {id(p) for layer in layers[count:] for p in layer.parameters()}
    sharded = any(hasattr(p, "ds_id") or hasattr(p, "full_tensor") for layer in layers for p in layer.parameters())
    shares = any(id(p) in later for m in early for p in m.parameters())
    if sharded or shares or any(moves(module) for module in early):
        return None
    return layers[:count], early


def _same_in_training(model: nn.Module, prefix: SharedPrefix, run: Callable[[], Tensor], kept: Tensor) -> bool:
    """Whether the shared layers return ``kept`` in training too, whatever the seed."""
    flags = [(module, module.training) for module in model.modules()]
    try:
        model.train()
        for seed in (0, 1):
            with torch.random.fork_rng(), prefix.recording():
                torch.manual_seed(seed)
                run()
            again, prefix._recorded = prefix._recorded, None
            if again is None or not torch.equal(again, kept):
                return False
        return True
    finally:
        for module, training in flags:
            module.training = training
