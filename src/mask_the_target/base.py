"""Where the base distribution comes from, and the audit that refuses a false base.

Turning an adapter off gives the base model only while nothing else has moved: some initialisations subtract the
adapter's start from the base weights, biases and norms may be trained in place, adapters may be merged. A regulariser
anchored to such a "base" pulls towards the wrong model without a word, so each case is refused by its own sentence.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from mask_the_target.head import adapter_classes, layer_below
from mask_the_target.proof import off_is_base
from mask_the_target.sharding import is_distributed, is_sharded, loaded_by_first_process

BaseChoice = Literal["auto", "off", "initial"]

# LoRA initialisations that put the adapter's start into the base weights with a minus sign: W' = W - s B0 A0. With the
# adapter off the model is W', not W; with the *initial* adapter on it is W, to rounding.
_SUBTRACTING_INITS = ("pissa", "olora", "corda", "lora_ga")
# Its start comes from a pass over data, which a toy can't repeat; it leaves the base weights alone.
_FROM_DATA = ("eva",)
INITIAL_IS_SHARDED = (
    "base='initial' puts a copy of the initial adapter in the place of its weights for each base pass, which isn't "
    "possible where these are sharded (FSDP, ZeRO-3, tensor parallelism). Use DDP or ZeRO-2, or pass a separately "
    "loaded model as base=."
)


@dataclass(frozen=True)
class Base:
    """How to run the base: ``with context():`` the model's own forward is the base's.

    Attributes:
        kind: ``"off"``, ``"initial"`` or ``"model"`` (a separate frozen model).
        model: the causal LM whose forward is run.
        context: makes it the base for the time of one forward.
    """

    kind: Literal["off", "initial", "model"]
    model: nn.Module
    context: Callable[[], AbstractContextManager[None]]


def adapter_layers(model: nn.Module) -> list[Any]:
    """Every module of PEFT that can pass through to the base: tuner layers and wrappers of saved modules or tokens."""
    classes = adapter_classes()
    return [module for module in model.modules() if isinstance(module, classes)]


@contextmanager
def adapters_off(model: nn.Module, *, audited: frozenset[str] | None = None) -> Iterator[None]:
    """Every adapter layer of ``model`` passes through to the base; each layer's own flag is restored afterwards.

    Only the flag is touched. PEFT's ``disable_adapter`` also sets ``requires_grad`` of every adapter weight, which
    thaws weights that were frozen on purpose, and unmerges.

    Args:
        model: the model.
        audited: names of the adapters that are known to leave the base as it is; None: not asked.

    Raises:
        ValueError: if no adapter layer is found, or one is merged into the base weights.
        RuntimeError: if an adapter is active that was not audited.
    """
    layers = adapter_layers(model)
    _require_adapter(model, layers)
    added = set() if audited is None else {name for layer in layers for name in layer.active_adapters} - audited
    if added:
        raise RuntimeError(
            f"adapter {min(added)!r} was added since the base was settled, and it may have rewritten the "
            "base's weights. Add it before TMKL is attached (before the trainer is built, with TMKLCallback); or "
            "detach, and attach again."
        )
    flags = [layer._disable_adapters for layer in layers]
    for layer in layers:
        layer._disable_adapters = True
    try:
        yield
    finally:
        for layer, flag in zip(layers, flags, strict=True):
            layer._disable_adapters = flag


def resolve_base(
    model: nn.Module, base: BaseChoice | nn.Module = "auto", *, configs: dict[str, Any] | None = None
) -> Base:
    """Audit ``model`` and decide what its base is.

    Args:
        model: the inner causal LM with its adapter layers, as it is before training.
        base: ``"off"``: the model with its adapters off. ``"initial"``: the model with a frozen copy of the adapter as
            it is now. ``"auto"``: ``"initial"`` for initialisations that rewrite the base weights (PiSSA, OLoRA,
            CorDA, LoRA-GA), else ``"off"``. Or a separate frozen model.
        configs: PEFT's config of each adapter, by name, as :func:`~mask_the_target.attach.unwrap` gives them.

    Raises:
        ValueError: for each way in which the base would not be the true one; the message names the remedy.
    """
    unproved = configs is not None and not configs
    configs = configs or {}
    if not isinstance(base, nn.Module) and base not in ("auto", "off", "initial"):
        raise ValueError(
            f"base={base!r} is unknown; use 'auto', 'off', 'initial', 'cached' or a separate frozen model."
        )
    for name, config in configs.items():
        if getattr(config, "is_prompt_learning", False):
            raise ValueError(
                f"adapter {name!r} is prompt learning ({_peft_type(config)}): it adds virtual tokens in front of the "
                "sequence, so base and adapted model don't see the same positions. Use LoRA or another weight adapter."
            )
        if _peft_type(config) == "SHADOW":
            raise ValueError(
                f"adapter {name!r} is a SHADOW: it runs a second network through PEFT's wrapper around the model, and "
                "a base pass inside the model can't leave it out. Use LoRA or another weight adapter."
            )
        if getattr(config, "layer_replication", None) and not isinstance(base, nn.Module):
            raise ValueError(
                f"adapter {name!r} has layer_replication, which builds a deeper model from copies of the base's "
                "layers: with the adapter off it is not the base. Pass a separately loaded model as base=."
            )
    layers = adapter_layers(model)
    if configs and not layers:
        name, config = next(iter(configs.items()))
        raise ValueError(
            f"adapter {name!r} ({_peft_type(config)}) has no layer that could be turned off to reach the base. Use "
            "LoRA or another adapter of weights."
        )
    _require_adapter(model, layers)
    if isinstance(base, nn.Module):
        return _separate(model, base)

    require_frozen_rest(model, configs)
    subtracting = [name for name, config in configs.items() if _init(config).startswith(_SUBTRACTING_INITS)]
    for name, config in configs.items():
        if getattr(config, "kasa_config", None) is not None:
            raise ValueError(
                f"adapter {name!r} uses KaSA, which truncates the base weights and can't be undone: the base is gone. "
                "Pass a separately loaded model as base=, or use another adapter."
            )
        if _init(config) == "loftq" and base != "initial":
            raise ValueError(
                f"adapter {name!r} was initialised by LoftQ, which replaced the base weights by their quantised form; "
                "off, the model is neither the base nor LoftQ's approximation of it. Use base='initial' for the "
                "approximation, or pass a separately loaded model as base=."
            )
    if base == "off" and subtracting:
        config = configs[subtracting[0]]
        raise ValueError(
            f"adapter {subtracting[0]!r} was initialised by {_init(config)!r}, which subtracted the initial adapter "
            "from the base weights: with the adapter off the model is not the base. Use base='initial' (or 'auto'), "
            "which keeps a frozen copy of the initial adapter."
        )
    if base == "initial" or (base == "auto" and subtracting):
        for name in subtracting:
            _require_active(name, _init(configs[name]), model)
            _require_untrained(name, _init(configs[name]), model)
        if base == "auto":
            for name in [name for name in configs if name not in subtracting]:
                _require_identity(name, subtracting[0], model)
        return Base("initial", model, _initial_adapters(model))
    if unproved:
        warnings.warn(
            "the model has adapter layers and no PEFT config, so that nothing proves that it is the base with them "
            "turned off. If they rewrite base weights, pass a separately loaded model as base=.",
            stacklevel=2,
        )
    for name, config in configs.items():
        if base == "auto":
            _require_no_hidden_start(name, config, model)
        _prove_off(name, config, layers)
    audited = _names(layers).union(*(layer.active_adapters for layer in layers))
    return Base("off", model, lambda: adapters_off(model, audited=audited))


def _prove_off(name: str, config: Any, layers: list[Any]) -> None:
    """Refuse an adapter that, turned off, is not the base; warn where a toy can't tell."""
    if _init(config) in _FROM_DATA:
        return
    tuner, _ = adapter_classes()
    layers = [layer for layer in layers if isinstance(layer, tuner)]
    try:
        failure = off_is_base(config, layers, adapters_off)
    except Exception as error:  # of PEFT, of any kind: this config makes no adapter on the toy
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        warnings.warn(
            f"adapter {name!r} ({_peft_type(config)}): that the model with it turned off is the base could not be "
            f"proved, since no small model takes its config ({reason}). If it rewrites base weights, pass a separately "
            "loaded model as base=.",
            stacklevel=2,
        )
        return
    if failure is not None:
        raise ValueError(
            f"adapter {name!r} ({_peft_type(config)}) turned off does not give the base back: on a small model with "
            f"the same config {failure}. It rewrites what it stands on, so pass a separately loaded model as base=; or "
            "base='initial', if the adapter has just been made and starts as the identity."
        )


def require_pass_through(model: nn.Module, run: Callable[[], Any]) -> None:
    """Refuse adapter layers that, turned off, give something else than the layer below: ValueError, naming the first.

    Args:
        model: the model.
        run: one of its forwards with the adapters off.
    """
    failed: list[str] = []
    names = {layer: name for name, layer in model.named_modules()}

    def compare(layer: Any, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        below: Any = layer_below(layer)
        if isinstance(output, Tensor) and not torch.equal(output, below(*args, **kwargs)):
            failed.append(f"{names[layer]} ({type(layer).__name__})")

    hooks = [layer.register_forward_hook(compare, with_kwargs=True) for layer in adapter_layers(model)]
    try:
        run()
    finally:
        for hook in hooks:
            hook.remove()
    if failed:
        raise ValueError(
            f"{len(failed)} adapter layers, turned off, don't give what the layers below them give ({failed[0]} "
            "first): the base can't be reached through them. Use another adapter, or pass a separately loaded model "
            "as base=."
        )


def _init(config: Any) -> str:
    return str(getattr(config, "init_lora_weights", "")).lower()


def _peft_type(config: Any) -> str:
    kind = getattr(config, "peft_type", "?")
    return str(getattr(kind, "value", kind))


def _require_adapter(model: nn.Module, layers: list[Any]) -> None:
    if not layers:
        raise ValueError(
            f"{type(model).__name__} has no adapter layer, so there is no base to turn to. Add one first, with "
            "peft.get_peft_model(model, LoraConfig(...)) or model.add_adapter(LoraConfig(...))."
        )
    for layer in layers:
        # Wrappers have the list of merged adapters but no `merged` property.
        if layer.merged_adapters:
            raise ValueError(
                f"adapter {layer.merged_adapters[0]!r} is merged into the base weights, so the base can't be reached. "
                "Call model.unmerge_adapter() first."
            )


def adapter_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Weights that belong to adapters, each once; compared by identity since some are shared between layers."""
    return list(_of_adapters(model, nn.Module.named_parameters).values())


def adapter_tensors(model: nn.Module) -> list[Tensor]:
    """Weights and buffers that belong to adapters, each once."""
    return [*adapter_parameters(model), *_of_adapters(model, nn.Module.named_buffers).values()]


def _of_adapters(model: nn.Module, named: Callable[..., Iterator[tuple[str, Any]]]) -> dict[int, Any]:
    tuner, _ = adapter_classes()
    found: dict[int, Any] = {}
    for layer in adapter_layers(model):
        # The wrapper of trained tokens has a tuner layer inside, around the base's embeddings.
        frozen = "base_layer." if isinstance(layer, tuner) else ("original_module.", "token_adapter.base_layer.")
        for name, tensor in named(layer, remove_duplicate=False):
            if not name.startswith(frozen):
                found[id(tensor)] = tensor
    return found


class BaseWeights:
    """Some values of each weight of the base, by which to tell later that it was written over.

    Nothing else shows that: an adapter that is merged by hand (ReLoRA), or a checkpoint that is loaded over the base,
    leaves modules, names and flags as they were. 64 values of each weight are kept; weights that are sharded, made of
    other tensors (torchao's), or loaded on the first process alone until FSDP wraps them, are left out.

    Args:
        model: the model that runs as the base; its adapters' own weights are left out.
    """

    def __init__(self, model: nn.Module) -> None:
        own = {id(parameter) for parameter in adapter_parameters(model)}
        self._model = model
        # By module and name, since wrappers replace parameters; weakly, since they replace modules too.
        self._places: dict[str, tuple[weakref.ref[nn.Module], str, torch.Size]] = {}
        for path, module in model.named_modules():
            for name, parameter in module.named_parameters(recurse=False):
                if id(parameter) not in own:
                    whole = f"{path}.{name}" if path else name
                    self._places[whole] = (weakref.ref(module), name, parameter.shape)
        self._values = self._read()

    def changed(self) -> dict[str, float]:
        """Names of the weights that have changed, and by how much of their size (norms of these values). It waits for
        the device.

        What rounding may do is no change: a cast of the whole model, or a merge that was undone. Nor is a
        quantisation, whose bytes are on another scale.
        """
        found = {}
        for name, now in self._read().items():
            then = self._values.get(name)
            if then is None or torch.equal(now, then):
                continue
            if then.dtype != now.dtype and torch.uint8 in (then.dtype, now.dtype):
                continue
            rounding = max(torch.finfo(v.dtype).eps if v.is_floating_point() else 0.0 for v in (then, now))
            then, now = then.double(), now.double()
            change = float((now - then).norm() / then.norm().clamp(min=1e-30))
            if change > rounding:
                found[name] = change
        return found

    def _read(self) -> dict[str, Tensor]:
        """The values on the CPU, of the weights that this process holds as they are."""
        if is_sharded(self._model) or loaded_by_first_process():
            return {}
        groups: dict[tuple[torch.device, torch.dtype], dict[str, Tensor]] = {}
        for whole, (module, name, shape) in self._places.items():
            parameter = getattr(module(), "_parameters", {}).get(name)
            if parameter is None or parameter.shape != shape:
                continue
            data = parameter.data
            if not data.numel() or data.is_meta or hasattr(data, "__tensor_flatten__"):
                continue
            if data.dtype.itemsize == 1:  # quantised: as bytes, since torch can't compare each of these types
                data = data.view(torch.uint8)
            values = data.flatten()[:: max(1, data.numel() // 64)][:64]
            groups.setdefault((data.device, data.dtype), {})[whole] = values
        found: dict[str, Tensor] = {}
        for group in groups.values():  # one copy from the device for each, and not one for each weight
            together = torch.cat(list(group.values())).cpu()
            found.update(zip(group, together.split([len(values) for values in group.values()]), strict=True))
        return found


def require_frozen_rest(model: nn.Module, configs: dict[str, Any]) -> None:
    """Refuse trainable weights outside the adapters: ValueError, with the names of the first of them."""
    inside = {id(parameter) for parameter in adapter_parameters(model)}
    moving = [name for name, p in model.named_parameters() if p.requires_grad and id(p) not in inside]
    if not moving:
        return
    biased = [name for name, config in configs.items() if getattr(config, "bias", "none") != "none"]
    if biased and all(name.endswith("bias") for name in moving):
        raise ValueError(
            f"adapter {biased[0]!r} has bias={configs[biased[0]].bias!r}, which trains {len(moving)} biases of the "
            f"base in place ({moving[0]}, ...): with the adapter off the model would not be the base. Use bias='none'."
        )
    raise ValueError(
        f"{len(moving)} weights outside the adapter are trainable ({first_of(moving)}): once they move, the model with "
        "its adapter off is not the base. Freeze them, list their modules in modules_to_save, or pass a separate "
        "frozen model as base=."
    )


def first_of(names: Sequence[str]) -> str:
    """The first three, for a message, and dots for those that follow."""
    return ", ".join([*names[:3], *(["..."] if len(names) > 3 else [])])


def _names(layers: list[Any]) -> frozenset[str]:
    """Of all adapters in these layers."""
    found: set[str] = set()
    for layer in layers:
        parts: list[Any] = [getattr(layer, part, None) for part in getattr(layer, "adapter_layer_names", ())]
        found.update(name for part in parts if hasattr(part, "keys") for name in part)
    return frozenset(found)


def _lora_of(name: str, model: nn.Module) -> Iterator[tuple[bool, Tensor, Tensor]]:
    """Of each linear layer of a config's adapter: whether it is active, A ``[r, in]`` and B ``[out, r]``, if whole.

    ``name``: as :func:`~mask_the_target.attach.unwrap` gives it, with the path of the part that has the adapter.
    """
    path, _, name = name.rpartition(".")
    for layer in adapter_layers(model.get_submodule(path)):
        a, b = getattr(layer, "lora_A", {}), getattr(layer, "lora_B", {})
        if name in a and name in b and isinstance(a[name], nn.Linear):
            weights = [part[name].weight.detach() for part in (a, b)]
            if all(w.dim() == 2 and not w.is_meta and not is_distributed(w) for w in weights):
                yield not layer.disable_adapters and name in layer.active_adapters, *weights


def _require_active(name: str, init: str, model: nn.Module) -> None:
    for active, _, _ in _lora_of(name, model):
        if not active:
            raise ValueError(
                f"adapter {name!r} was initialised by {init!r}, which subtracted it from the base weights, but it is "
                "not active, so neither with nor without the active adapters is the model the base. Activate it, or "
                "pass a separately loaded base model as base=."
            )


def _is_start(init: str, a: Tensor, b: Tensor) -> bool:
    """Whether A ``[r, in]`` and B ``[out, r]`` have the singular structure that this initialisation gives them.

    It is exact to the rounding of the weights: on SmolLM2-135M 1e-6 in float32, 5e-4 of float16 and 4e-3 of bfloat16,
    which values that have been cast back to float32 still have.
    """
    held = next(
        (d for d in (torch.bfloat16, torch.float16) if all(torch.equal(w, w.to(d).to(w.dtype)) for w in (a, b))),
        torch.float32,
    )
    a, b = a.cpu().double(), b.cpu().double()  # not every accelerator has float64
    gram = b.t() @ b  # [r, r]
    if init.startswith("pissa"):
        start = a @ a.t()  # both are the top singular values
    elif init.startswith("olora"):
        start = torch.eye(len(gram), dtype=gram.dtype)  # B holds orthonormal columns
    else:
        start = gram.diag().diag()  # CorDA and LoRA-GA: singular vectors of the data's, orthogonal at least
    return bool((gram - start).norm() <= max(1.5 * torch.finfo(held).eps, 1e-3) * start.norm())


def _require_untrained(name: str, init: str, model: nn.Module) -> None:
    """These initialisations start from known singular structure; an adapter without it has been trained already."""
    if not all(_is_start(init, a, b) for _, a, b in _lora_of(name, model)):
        raise ValueError(
            f"adapter {name!r} was initialised by {init!r} but has been trained since: the initial adapter, which "
            "the true base needs, is gone. Attach before training or before the checkpoint is loaded, or pass a "
            "separately loaded base model as base=."
        )


def _require_identity(name: str, subtracting: str, model: nn.Module) -> None:
    """Refuse an active adapter that a copy of the initial ones would make a part of the base."""
    for active, _, b in _lora_of(name, model):
        if active and bool(b.any()):
            raise ValueError(
                f"adapter {name!r} is active and trained beside {subtracting!r}, which was subtracted from the base "
                "weights: neither with nor without them is the model the base. Turn it off; say base='initial', if "
                "the model as it is now is the base; or pass a separately loaded model as base=."
            )


def _require_no_hidden_start(name: str, config: Any, model: nn.Module) -> None:
    """Refuse an initial adapter that was saved as if it were an ordinary one, as PEFT's own recipe for PiSSA does."""
    if _init(config) != "true":
        return
    lora = [(a, b) for _, a, b in _lora_of(name, model)]
    for init in ("pissa", "olora", "corda"):
        if lora and all(len(a) > 1 and bool(b.any()) and _is_start(init, a, b) for a, b in lora):
            raise ValueError(
                f"adapter {name!r} says init_lora_weights=True, but its weights are how {init!r} or its like begin: "
                "the weights underneath may be what was left of the base when it was subtracted. If so, say "
                "base='initial'; if they are the base's own, say base='off'."
            )


def _initial_adapters(model: nn.Module) -> Callable[[], AbstractContextManager[None]]:
    """A context in which the adapter's weights are what they are now. Memory: one frozen copy of the adapter."""
    layers = adapter_layers(model)
    parameters, active = adapter_parameters(model), active_adapters(layers)
    initial: list[Tensor] = [parameter.detach().clone() for parameter in parameters]

    def require_unchanged() -> None:
        if is_sharded(model) or any(is_distributed(parameter) for parameter in parameters):
            raise ValueError(INITIAL_IS_SHARDED)
        layers = adapter_layers(model)
        _require_adapter(model, layers)
        now = adapter_parameters(model)
        if active_adapters(layers) != active or [id(p) for p in now] != [id(p) for p in parameters]:
            raise RuntimeError(
                "the model's adapters were added, switched, scaled or replaced since base='initial' kept a copy, so "
                "the copy is not the base any more. Detach, and attach again."
            )

    @contextmanager
    def context() -> Iterator[None]:
        require_unchanged()
        current = [parameter.data for parameter in parameters]
        for index, parameter in enumerate(parameters):
            if initial[index].device != parameter.device:  # the model was moved after attaching
                initial[index] = initial[index].to(parameter.device)
            parameter.data = initial[index]
        # Autocast keeps its casts by the parameter, not by its data: without this the adapted pass would run on the
        # base pass's cast of the initial adapter, with a KL of 0.
        torch.clear_autocast_cache()
        try:
            yield
        finally:
            for parameter, data in zip(parameters, current, strict=True):
                parameter.data = data
            torch.clear_autocast_cache()

    return context


def active_adapters(layers: list[Any]) -> list[tuple[list[str], bool, dict[str, float]]]:
    """What a layer adds besides its adapters' weights: which of them, whether at all, and by which factor."""
    return [
        (list(layer.active_adapters), layer.disable_adapters, dict(getattr(layer, "scaling", {}))) for layer in layers
    ]


def _separate(model: nn.Module, base: nn.Module) -> Base:
    if base is model or any(module is base for module in model.modules()) or any(m is model for m in base.modules()):
        raise ValueError(
            "base= is the model that is trained, so it would be compared with itself. Use base='auto' to turn its "
            "adapter off, or pass a model that was loaded separately."
        )
    shared = {id(p) for p in model.parameters() if p.requires_grad} & {id(p) for p in base.parameters()}
    if shared:
        raise ValueError(
            f"base= shares {len(shared)} trainable weights with the model that is trained, so it would move with it. "
            "Pass a model that was loaded separately."
        )
    return Base("model", base, _nothing)


@contextmanager
def _nothing() -> Iterator[None]:
    yield
