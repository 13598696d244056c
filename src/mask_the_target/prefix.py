"""The decoder layers before the first adapter: base and adapted pass compute the same there, so they run once.

With an adapter on the later layers only, the base pass records the hidden states that leave the last untouched layer,
and the adapted pass starts from them. Nothing is tabulated by family: the layers are found by watching a forward, and
:func:`find_shared_prefix` shares nothing unless it has proved that nothing but speed changes.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from mask_the_target.base import adapter_layers, adapters_off
from mask_the_target.head import evaluating, text_config

# What a forward can be asked for that each layer would have to answer for itself.
_LAYER_OUTPUTS = ("output_hidden_states", "output_attentions", "output_router_logits")
_RANDOM = re.compile("drop|noise|jitter")  # in the names of settings that make training random


class SharedPrefix:
    """Layers that base and adapted pass share. Made by :func:`find_shared_prefix`.

    Attributes:
        layers: the decoder layers before the first adapted one; they run once for both passes.
    """

    def __init__(self, model: nn.Module, found: _Found) -> None:
        self.layers = found.layers
        self._model = model
        self._tuples = found.tuples
        self._early = found.early
        owners: list[Any] = [*found.early, *found.containers]
        settings = [(owner, name) for owner in owners for name in _random_settings(owner)]
        self.random = any(getattr(owner, name) > 0 for owner, name in settings)
        configs = {id(c): c for m in owners if (c := getattr(m, "config", None)) is not None}
        self._settings = settings + [(c, name) for c in configs.values() for name in _random_settings(c)]
        self._state = self._observe()
        self._recorded: tuple[Tensor, int] | None = None  # and its version, which tells of changes in place

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Around the base pass: keep what the last shared layer returns, ``[B, T, d]``, without its graph."""
        last, as_tuple = self.layers[-1], self._tuples[-1]
        forward = last.forward
        self._recorded = None

        def record(*args: Any, **kwargs: Any) -> Any:
            output = forward(*args, **kwargs)
            hidden = (output[0] if as_tuple else output).detach()
            self._recorded = hidden, hidden._version
            return output

        with _replaced(last, record):
            yield

    @contextmanager
    def reusing(self, inputs: Mapping[str, Any] | None = None) -> Iterator[bool]:
        """Around the adapted pass over the same batch: the shared layers are skipped, the next one gets the recording.

        Gives whether they are. They run as ever where something changed since the prefix was found (a hook on a shared
        layer or the embeddings, such as NEFTune's noise, a dropout, a weight that is trained now, a compiled layer),
        or where each layer's own outputs are asked for. The recording is given up at the end.

        Args:
            inputs: the adapted pass's arguments, looked through for ``output_hidden_states`` and the like.

        Raises:
            RuntimeError: if nothing was recorded, or the recording is of a batch of another shape.
        """
        if self._recorded is None:
            raise RuntimeError("no base pass was recorded; run it inside recording() before reusing().")
        (recorded, version), self._recorded = self._recorded, None
        if recorded._version != version or self._changed() or _asks_layers(self._model, inputs or {}):
            yield False
            return

        def skip(*args: Any, **kwargs: Any) -> Tensor:
            return _hidden(args, kwargs)

        def resume(*args: Any, **kwargs: Any) -> Tensor:
            entered = _hidden(args, kwargs)
            if entered.shape != recorded.shape:
                raise RuntimeError(
                    f"the recorded base pass has hidden states {list(recorded.shape)} and the adapted pass "
                    f"{list(entered.shape)}; both must run on the same batch."
                )
            # Reentrant checkpointing gives no gradient to a layer whose input requires none. Where the embeddings were
            # made to require it for that (enable_input_require_grads), what stands in for them must as well.
            return recorded.requires_grad_(entered.requires_grad)

        with ExitStack() as stack:
            for layer, as_tuple in zip(self.layers, self._tuples, strict=True):
                forward = resume if layer is self.layers[-1] else skip
                stack.enter_context(_replaced(layer, _in_tuple(forward) if as_tuple else forward))
            yield True

    def _observe(self) -> tuple[Any, Any]:
        hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks), m._compiled_call_impl) for m in self._early]
        return hooks, [getattr(owner, name, None) for owner, name in self._settings]

    def _changed(self) -> bool:
        # The layers are walked anew, for adapters that were added since.
        modules = [*self._early, *(module for layer in self.layers for module in layer.modules())]
        return self._observe() != self._state or any(map(_trains, modules))


class _Found(NamedTuple):
    layers: list[nn.Module]  # before the first adapted one
    tuples: list[bool]  # whether each returns a tuple of one
    following: nn.Module  # the first adapted one
    containers: list[nn.Module]  # modules around it
    early: list[nn.Module]  # all that can run before it and isn't around it


def find_shared_prefix(model: nn.Module, run: Callable[[], Tensor]) -> SharedPrefix | None:
    """The layers before the first adapter, if it is proved that base and adapted pass can share them.

    Proved on the probe: no gradient and no random number comes from before the first adapted layer, training computes
    there what the base pass does, and with the layers skipped all that leaves the model is the same bit for bit, with
    the adapters on and off. Training flags, random states and forwards are left as they were.

    Args:
        model: the inner causal LM with PEFT's layers.
        run: runs the model's forward on a probe (without cache) and gives what reaches the head, ``[B, T, d]``.

    Returns:
        A :class:`SharedPrefix`, or None where the first layer is adapted already, anything else before it is, or one of
        these proofs fails. Then nothing is shared, which costs time only.
    """
    with evaluating(model), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # checkpointing's, of forwards without gradients
        found = _find(model, run)
        if found is None:
            return None
        prefix = SharedPrefix(model, found)
        # Whether a module that the probe doesn't reach (a vision tower) is random is told by its settings alone.
        if prefix.random or any(getattr(m, "track_running_stats", False) for m in found.early):
            return None
        with torch.no_grad():
            try:
                return (
                    prefix if _same_in_training(model, found, run) and _same_shared(model, found, prefix, run) else None
                )
            except Exception:  # a later layer missed what an earlier one leaves for it; each family has its own error
                return None


def _find(model: nn.Module, run: Callable[[], Tensor]) -> _Found | None:
    with torch.enable_grad():
        calls = _trace(model, run)
    adapters = {id(module) for module in adapter_layers(model)}

    def adapted(module: nn.Module) -> bool:
        return id(module) in adapters or _trains(module)

    layers = max(
        (m for m in model.modules() if isinstance(m, nn.ModuleList) and _is_chain(m, calls)), key=len, default=()
    )
    k = next((i for i, layer in enumerate(layers) if any(map(adapted, layer.modules()))), 0)
    if not k:
        return None
    following = layers[k]
    start = next(i for i, call in enumerate(calls) if call.module is following and call.entering)
    entered = {id(call.module) for call in calls[:start] if call.entering}
    left = _within(call.module for call in calls[:start] if not call.entering)
    late = _within([*layers[k:], *(call.module for call in calls[start:] if id(call.module) not in entered)]) - left
    early = [module for module in model.modules() if id(module) not in late]
    if any(map(adapted, early)):
        return None
    hidden = calls[start].hidden
    weights = [p for p in model.parameters() if p.requires_grad]  # modules may be read without being called
    if hidden.requires_grad and any(
        g is not None for g in torch.autograd.grad(hidden.sum(), weights, allow_unused=True)
    ):
        return None
    outputs = [next(c.hidden for c in calls if c.module is layer and not c.entering) for layer in layers[:k]]
    if not all(isinstance(o, Tensor) or (isinstance(o, tuple) and len(o) == 1) for o in outputs):
        return None
    around = {id(m) for m in early if any(inner is following for inner in m.modules())}
    return _Found(
        layers=list(layers[:k]),
        tuples=[isinstance(output, tuple) for output in outputs],
        following=following,
        containers=[module for module in early if id(module) in around],
        early=[module for module in early if id(module) not in around],
    )


class _Call(NamedTuple):
    module: nn.Module
    entering: bool
    hidden: Any  # the first argument, or all that is returned


def _trace(model: nn.Module, run: Callable[[], Tensor]) -> list[_Call]:
    """All calls of modules in ``run()``, in order."""
    calls: list[_Call] = []

    def enter(module: nn.Module, args: Any, kwargs: Any) -> None:
        calls.append(_Call(module, True, _hidden(args, kwargs)))

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        calls.append(_Call(module, False, output))

    with ExitStack() as hooks:
        for module in model.modules():
            hooks.enter_context(module.register_forward_pre_hook(enter, with_kwargs=True))
            hooks.enter_context(module.register_forward_hook(leave))
        run()
    return calls


def _is_chain(layers: nn.ModuleList, calls: list[_Call]) -> bool:
    """Whether each was called once, in order, on what the one before returned."""
    own = {id(layer) for layer in layers}  # one that occurs twice is called twice
    entries = [call for call in calls if call.entering and id(call.module) in own]
    if [id(call.module) for call in entries] != [id(layer) for layer in layers] or len(own) < len(layers):
        return False
    outputs = {id(call.module): call.hidden for call in calls if not call.entering and id(call.module) in own}
    returned = [out[0] if isinstance(out := outputs[id(layer)], tuple) else out for layer in layers]
    return all(isinstance(o, Tensor) and e.hidden is o for e, o in zip(entries[1:], returned[:-1], strict=True))


def _same_in_training(model: nn.Module, found: _Found, run: Callable[[], Tensor]) -> bool:
    """Whether training draws no random number before the first adapted layer, and computes there what evaluation does.

    No number at all: the adapter's own dropout must see the same ones as without sharing.
    """
    devices = sorted({p.device for p in model.parameters() if p.device.type not in ("cpu", "meta")}, key=str)
    entered: list[tuple[Tensor, list[Tensor]]] = []

    def random_states() -> list[Tensor]:
        return [torch.get_rng_state(), *(torch.get_device_module(d).get_rng_state(d) for d in devices)]

    def enter(module: nn.Module, args: Any, kwargs: Any) -> None:
        entered.append((_hidden(args, kwargs).clone(), random_states()))

    modules = [*found.containers, *found.early]
    with (
        adapters_off(model),
        torch.random.fork_rng([d.index for d in devices], device_type=devices[0].type if devices else "cpu"),
        found.following.register_forward_pre_hook(enter, with_kwargs=True),
    ):
        run()
        try:
            for module in modules:
                module.training = True
            for _ in range(2):  # twice, for randomness that isn't PyTorch's
                before = random_states()
                run()
                hidden, after = entered[-1]
                if not torch.equal(hidden, entered[0][0]) or not all(map(torch.equal, before, after)):
                    return False
        finally:
            for module in modules:
                module.training = False
    return True


def _same_shared(model: nn.Module, found: _Found, prefix: SharedPrefix, run: Callable[[], Tensor]) -> bool:
    """Whether the model returns the same bit for bit with the layers skipped, router logits and all."""
    returned: list[Any] = []

    def keep(module: nn.Module, args: Any, output: Any) -> None:
        returned.extend(tree_leaves(output))

    def tensors() -> list[Tensor]:
        returned.clear()
        returned.append(run())
        return [leaf for leaf in returned if isinstance(leaf, Tensor)]

    with ExitStack() as hooks:
        for module in found.containers:
            hooks.enter_context(module.register_forward_hook(keep))
        for off in (True, False):
            with adapters_off(model) if off else nullcontext():
                own = tensors()
            with adapters_off(model), prefix.recording():
                run()
            with adapters_off(model) if off else nullcontext(), prefix.reusing() as shared:
                reused = tensors()
            if not shared or len(own) != len(reused) or not all(map(torch.equal, own, reused)):
                return False
    return True


def _within(modules: Iterable[nn.Module]) -> set[int]:
    """The ids of the modules and of all inside them."""
    return {id(inner) for module in modules for inner in module.modules()}


def _trains(module: nn.Module) -> bool:
    """Whether it has a trainable weight of its own."""
    return any(p.requires_grad for p in module._parameters.values() if p is not None)


def _hidden(args: Any, kwargs: Mapping[str, Any]) -> Any:
    return args[0] if args else kwargs.get("hidden_states")


def _in_tuple(forward: Callable[..., Tensor]) -> Callable[..., tuple[Tensor]]:
    return lambda *args, **kwargs: (forward(*args, **kwargs),)


def _random_settings(owner: Any) -> list[str]:
    """Its numeric settings that make training random where they aren't 0."""
    numbers = [n for n, v in vars(owner).items() if isinstance(v, (int, float)) and not isinstance(v, bool)]
    return [
        n
        for n in numbers
        if _RANDOM.search(n.lower()) or (n == "p" and isinstance(owner, nn.modules.dropout._DropoutNd))
    ]


def _asks_layers(model: nn.Module, inputs: Mapping[str, Any]) -> bool:
    configs = (getattr(model, "config", None), text_config(model))
    return any(
        inputs[name] if inputs.get(name) is not None else any(getattr(config, name, False) for config in configs)
        for name in _LAYER_OUTPUTS
    )


@contextmanager
def _replaced(layer: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """``layer`` with another forward, and never checkpointed (which in some versions happens around the forward)."""
    own, training = layer.__dict__.get("forward"), layer.training
    layer.forward, layer.training = forward, False
    try:
        yield
    finally:
        layer.training = training
        if own is None:
            del layer.forward
        else:
            layer.forward = own
