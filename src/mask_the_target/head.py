"""Backbone and head of any causal LM, and what it does to its logits: measured by a probe, never read from names.

Configs call it ``logit_scale``, ``logits_scaling`` (one family divides by it, another multiplies),
``lm_head_multiplier``, ``final_logit_softcapping`` ...; a name that is missed is a loss that is silently wrong. So
nothing is tabulated by family. The head is tapped: its own forward is replaced on the instance, so that the model's
forward runs as it always does (its masks, its router losses, its hooks, its autocast), while what reaches the head is
what we compute with. Everything before the head is the backbone. :func:`probe` then proves that
``transform(head(hidden))`` is the model's own logits, and that their cross-entropy is the model's own loss.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mask_the_target.sharding import in_zero3, is_distributed, whole_shape


class LogitTransform(NamedTuple):
    """``logits = softcap * tanh(scale * x / softcap)``, or ``scale * x`` without a soft cap; x is the head's output."""

    scale: float = 1.0
    softcap: float | None = None

    def __call__(self, x: Tensor) -> Tensor:
        """Logits ``[.., V]`` from the head's output of the same shape, in its dtype."""
        x = x if self.scale == 1.0 else x * self.scale
        return x if self.softcap is None else self.softcap * (x / self.softcap).tanh()


class Head(NamedTuple):
    """A head as the loss sees it: weight ``[V, d]``, bias ``[V]`` or None, and the transform after it."""

    weight: Tensor
    bias: Tensor | None = None
    transform: LogitTransform = LogitTransform()


_TENSOR_PARALLEL = (
    "For tensor parallelism, load the model sharded, with from_pretrained(..., "
    "distributed_config=DistributedConfig(tp_size=...)) of transformers, and attach then."
)


class HeadTap:
    """Stands in the place of a head's forward; passes everything on unless :meth:`run` is under way.

    Living inside the head's own ``__call__`` means that hooks which gather a sharded weight or move it to a device
    fire around our use of it, as for any linear layer.
    """

    def __init__(self, model: nn.Module) -> None:
        self.module: Any = find_head(model)
        self.adapted = isinstance(self.module, adapter_classes())
        self._handler: Callable[[Tensor], Tensor] | None = None
        self._calls = 0
        self._original = self.module.__dict__.get("forward")  # an instance attribute, where another tool set one
        forward = self.module.forward

        @functools.wraps(forward)
        def tapped(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            if self._handler is None:
                return forward(x, *args, **kwargs)
            if is_distributed(x):
                raise ValueError(f"the head is given a DTensor, as torch's parallelize_module does. {_TENSOR_PARALLEL}")
            self._calls += 1
            return self._handler(x)

        self.forward = forward
        self._tapped = tapped
        self.module.forward = tapped

    def run(self, forward: Callable[..., Any], kwargs: Mapping[str, Any], handler: Callable[[Tensor], Tensor]) -> Any:
        """``forward(**kwargs)`` with ``handler(hidden [B, T, d]) -> [B, T, any]`` in the head's place.

        Raises:
            RuntimeError: if the head was not called exactly once.
        """
        self._handler, self._calls = handler, 0
        try:
            output = forward(**kwargs)
        finally:
            self._handler = None
        if self._calls != 1:
            raise RuntimeError(
                f"the model's forward called its head {self._calls} times, not once, so the hidden states of the "
                "next-token loss can't be told; this architecture is not supported."
            )
        return output

    def head(self, transform: LogitTransform = LogitTransform()) -> Head:
        """Weight and bias as they are now, which inside a call are gathered and on the right device.

        Of an adapted head, the base's: what its own forward computes is more.
        """
        linear = base_layer(self.module)
        return Head(linear.weight, getattr(linear, "bias", None), transform)

    def remove(self) -> None:
        """Give the head its own forward back. Where another tool wrapped ours since, ours stays and passes on."""
        if self.module.__dict__.get("forward") is not self._tapped:
            return
        if self._original is None:
            self.module.__dict__.pop("forward", None)
        else:
            self.module.forward = self._original


# What our calls of a model's forward ask for, where it takes them. With a cache, transformers doesn't look for packed
# documents in position_ids.
FORWARD_SETTINGS = {"use_cache": False, "return_dict": True}


def narrow(hidden: Tensor) -> Tensor:
    """A stand-in for the logits, ``[B, T, 1]``, so that nothing of the vocabulary's width is made after the head."""
    return hidden.new_zeros(*hidden.shape[:-1], 1)


def find_head(model: nn.Module) -> nn.Module:
    """The module whose ``weight [V, d]`` maps final hidden states to logits, or PEFT's layer around it.

    Raises:
        ValueError: if the model has none.
    """
    getter: Any = getattr(model, "get_output_embeddings", None)
    head: Any = getter() if getter is not None else None
    if head is None:
        raise ValueError(
            f"{type(model).__name__} has no head (get_output_embeddings() gives None), so it predicts no next token. "
            "Load it as a causal LM, for example with AutoModelForCausalLM."
        )
    linear = base_layer(head)
    if not isinstance(getattr(linear, "weight", None), Tensor):
        raise ValueError(
            f"the head of {type(model).__name__} is a {type(linear).__name__} without a [vocabulary, hidden] weight; "
            "only linear heads are supported."
        )
    if len(whole_shape(linear.weight)) != 2:  # what FSDP1 leaves in a weight's place
        raise ValueError(
            f"{type(model).__name__} is sharded already (FSDP1): its head's weight has the shape "
            f"{list(linear.weight.shape)} here. Attach before the model is wrapped."
        )
    return head


def adapter_classes() -> tuple[type[Any], type[Any]]:
    """PEFT's tuner layers, and its wrappers of saved modules or tokens. PEFT takes seconds to import: not before."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    return BaseTunerLayer, AuxiliaryTrainingWrapper


def base_layer(module: Any) -> Any:
    """What PEFT's layers and wrappers stand around, or ``module`` itself."""
    while isinstance(module, adapter_classes()):
        module = layer_below(module)
    return module


def layer_below(layer: Any) -> Any:
    """The module that a tuner layer or a wrapper of PEFT passes on to when it is off."""
    _, wrapper = adapter_classes()
    return layer.original_module if isinstance(layer, wrapper) else layer.base_layer


def text_config(model: nn.Module) -> Any:
    """The config of the language model, also inside a multimodal one; None without a config."""
    config: Any = getattr(model, "config", None)
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def accepted(forward: Callable[..., Any], name: str) -> bool:
    """Whether ``forward`` takes ``name`` as a keyword."""
    parameters = inspect.signature(forward).parameters
    return name in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Every module in eval mode (no dropout, no checkpointing, no router noise), each flag restored afterwards."""
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


class Probed(NamedTuple):
    """What the probe found: the logits' transform, the factor of the router's auxiliary loss (0 without one), and
    whether the model's loss compares the logits at t with the label at t + 1, or with the one at t (decoders of BART's
    kind)."""

    transform: LogitTransform
    aux_coefficient: float
    shifts_labels: bool


# Planted in the grid: far enough that a soft cap is saturated, and near enough to 0 that it is not felt.
_FAR, _NEAR = 1e6, 1e-3


def probe(model: nn.Module, forward: Callable[..., Any], tap: HeadTap) -> Probed:
    """Measure the transform after the head, and prove it on eight tokens.

    Args:
        model: the causal LM; its training flags are kept, no random number is drawn.
        forward: its forward as it was before ours.
        tap: the tap on its head.

    Raises:
        ValueError: if ``transform(head(hidden))`` isn't the model's logits, or their cross-entropy (plus the
            auxiliary loss of a mixture of experts) isn't the model's loss.
    """
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        raise ValueError(
            f"{type(model).__name__} is an encoder-decoder: its labels are shifted on their way in, not against the "
            "logits. Only causal LMs are supported."
        )
    weight, bias, _ = tap.head()
    vocabulary, width = whole_shape(weight)
    name = type(model).__name__
    inputs = probe_inputs(model, forward, vocabulary)
    seen: list[Tensor] = []

    def keep(hidden: Tensor) -> Tensor:  # within the head's own call, where its weight is whole
        output = tap.forward(hidden)
        fits = hidden.shape[-1] == width
        seen.extend((hidden, output, output.float() if tap.adapted or not fits else _head_output(hidden, weight, bias)))
        return output

    grid = torch.linspace(-40, 40, vocabulary, dtype=torch.float32, device=weight.device)
    grid[0], grid[1] = _FAR, _NEAR
    with torch.no_grad(), evaluating(model):
        own = _on_text(model, lambda: tap.run(forward, inputs, keep))
        shown = tap.run(forward, inputs, lambda hidden: grid.expand(*hidden.shape[:-1], vocabulary).clone())
        try:
            tap.run(forward, inputs, narrow)
        except (RuntimeError, IndexError, ValueError) as error:
            raise ValueError(
                f"{name} does more to its logits than scale or soft-cap them (it failed on a stand-in of width 1: "
                f"{error}); this architecture is not supported."
            ) from error
        hidden, output, expected = seen
        if hidden.shape[:-1] != inputs["input_ids"].shape:
            raise ValueError(
                f"{name}'s head sees hidden states {list(hidden.shape)} for token ids "
                f"{list(inputs['input_ids'].shape)}; one for each token is needed."
            )
        if hidden.shape[-1] != width:
            raise ValueError(
                f"{name}'s head has a weight {[vocabulary, width]}, which doesn't fit its input {list(hidden.shape)}; "
                "a head stored in another layout (packed, quantised) is not supported."
            )
        transform = _fit_transform(name, grid, shown.logits)
        # Logits may be float32 in name only: autocast casts them up after the head.
        tolerance = _tolerance(own.logits, output, hidden, weight)
        _require_equal(name, "logits", own.logits.float(), transform(expected), tolerance)
        return Probed(transform, *_prove_loss(model, name, forward, inputs, own.logits.float()))


def _head_output(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``hidden @ weight.T + bias`` in float32, ``[.., V]``, also of a weight that is sharded over the vocabulary."""
    hidden = hidden.float()
    if is_distributed(weight):
        from torch.distributed.tensor import DTensor

        assert isinstance(weight, DTensor)
        hidden = DTensor.from_local(hidden, weight.device_mesh)
    output: Any = F.linear(hidden, weight.float(), None if bias is None else bias.float())
    return output.full_tensor() if is_distributed(output) else output


def probe_inputs(model: nn.Module, forward: Callable[..., Any], vocabulary: int) -> dict[str, Any]:
    """Arguments of a forward over two sequences of four tokens."""
    getter: Any = getattr(model, "get_input_embeddings", None)
    embeddings = getter() if getter is not None else None
    device = next((embeddings or model).parameters()).device
    # Spread over the first two thirds: placeholders of images and the like sit at the vocabulary's ends.
    ids = (torch.arange(8, device=device) * 7919 + vocabulary // 3) % max(2, vocabulary * 2 // 3)
    inputs: dict[str, Any] = {"input_ids": ids.reshape(2, 4), "attention_mask": torch.ones_like(ids).reshape(2, 4)}
    # Of prompts and answers, and not of an embedding's kinds: some masks follow them.
    if "token_type_ids" in inspect.signature(forward).parameters and not hasattr(text_config(model), "type_vocab_size"):
        inputs["token_type_ids"] = torch.tensor([[0, 0, 1, 1]] * 2, device=device)
    return inputs | {name: value for name, value in FORWARD_SETTINGS.items() if accepted(forward, name)}


def _fit_transform(name: str, grid: Tensor, logits: Tensor) -> LogitTransform:
    """Scale and soft cap from what became of the grid, checked on every column."""
    if logits.shape[-1] != grid.shape[0]:
        raise ValueError(f"{name} returns {logits.shape[-1]} logits from a head of {grid.shape[0]} tokens.")
    far, near = float(logits[0, 0, 0]), float(logits[0, 0, 1])
    scale, softcap = near / _NEAR, None
    if abs(far - scale * _FAR) <= 1e-3 * abs(scale * _FAR):
        scale = far / _FAR
    else:
        softcap = far
    transform = LogitTransform(1.0 if abs(scale - 1) < 1e-6 else scale, softcap)
    expected = transform(grid).expand_as(logits)
    _require_equal(name, "transform of its head's output", logits.float(), expected, _tolerance(logits), skip=1)
    return transform


_AUX_COEFFICIENTS = ("router_aux_loss_coef", "aux_loss_coef")


def _on_text(model: nn.Module, run: Callable[[], Any]) -> Any:
    """``run()`` on the probe. Models that need images or sound, or that an adapter has broken, have each its error."""
    name = type(model).__name__
    try:
        return run()
    except Exception as error:
        if any(is_distributed(parameter) for parameter in model.parameters()):
            raise ValueError(
                f"{name} is sharded already, in a way that its forward can't be run on a probe ({error}), which the "
                "proofs of TMKL's loss need. Attach first, then shard (fully_shard); a trainer that has sharded it, in "
                f"train() or evaluate(), must be built anew. {_TENSOR_PARALLEL}"
            ) from error
        if any(map(in_zero3, model.parameters())):
            raise ValueError(
                f"{name} is partitioned (ZeRO-3), and no engine gathers its weights for a forward ({error}). As a base "
                "of its own, load it whole, or give it to deepspeed.initialize first."
            ) from error
        raise ValueError(
            f"{name}'s forward fails on a probe of eight text tokens ({type(error).__name__}: {error}), so its logits "
            "and its loss can't be proved. Only models that can be run on text alone are supported."
        ) from error


def _prove_loss(
    model: nn.Module, name: str, forward: Callable[..., Any], inputs: Mapping[str, Any], logits: Tensor
) -> tuple[float, bool]:
    """The factor of the auxiliary loss, and whether labels are shifted, after checking that CE plus it is the loss the
    model itself returns."""
    labels = inputs["input_ids"]
    with_loss, router = dict(inputs, labels=labels), {}
    config = text_config(model)
    if hasattr(config, "output_router_logits") and accepted(forward, "output_router_logits"):
        router["output_router_logits"] = True
    try:
        own = forward(**with_loss, **router)
    except Exception:  # of some routers there is nothing to show; then it trains as it is configured, or not at all
        own = _on_text(model, lambda: forward(**with_loss))
    labels = labels.to(logits.device)
    shifted = float(F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()))
    unshifted = float(F.cross_entropy(logits.flatten(0, 1), labels.flatten()))
    aux, coefficient, auxiliary = getattr(own, "aux_loss", None), 0.0, 0.0
    if isinstance(aux, Tensor):
        # Too small for the comparison below to notice, so it must be known.
        found = [float(getattr(o, n)) for o in (model, config) for n in _AUX_COEFFICIENTS if hasattr(o, n)]
        if not found:
            raise ValueError(
                f"{name} returns an auxiliary loss of its router, but neither it nor its config has its factor "
                f"({' or '.join(_AUX_COEFFICIENTS)}), so it can't be added to the loss. This model is not supported."
            )
        coefficient = found[0]
        auxiliary = coefficient * float(aux)
    # The nearer one: an untrained model's two are within a percent of each other.
    shifts_labels = abs(float(own.loss) - shifted - auxiliary) <= abs(float(own.loss) - unshifted - auxiliary)
    loss = (shifted if shifts_labels else unshifted) + auxiliary
    if abs(float(own.loss) - loss) <= 0.01 * max(0.1, abs(loss)):
        return coefficient, shifts_labels
    raise ValueError(
        f"{name}'s own loss on a probe is {float(own.loss):.5f}, but the cross-entropy of its logits"
        f"{' with its auxiliary loss' if coefficient else ''} is {shifted + auxiliary:.5f}, and "
        f"{unshifted + auxiliary:.5f} without shifting the labels; it trains on another loss than next-token "
        "cross-entropy, or labels change its logits (PaliGemma's, before transformers 5), which is not supported."
    )


def _tolerance(*tensors: Tensor) -> float:
    """Relative to the largest value: rounding of the coarsest dtype that the values went through."""
    return max(8 * torch.finfo(tensor.dtype).eps for tensor in tensors) + 1e-4


def _require_equal(name: str, what: str, own: Tensor, expected: Tensor, tolerance: float, skip: int = 0) -> None:
    own, expected = own[..., skip:], expected[..., skip:].to(own.device)
    error = float((own - expected).abs().max())
    largest = float(own.abs().max())
    if not error <= tolerance * max(largest, 1e-6):
        raise ValueError(
            f"{name}'s {what} on a probe of eight tokens differs from transform(head(hidden states)) by {error:.3g} "
            f"(largest value {largest:.3g}): the loss would be computed on other logits than the model's own, so this "
            "model is refused."
        )
