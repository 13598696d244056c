"""What "exact" means: one model with its adapter, held against a separate, untouched copy of its base."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from conftest import move
from mask_the_target import TMKL, attach
from mask_the_target.attach import Attachment
from mask_the_target.head import evaluating
from reference import distance, gradients, model_inputs, reference_loss, shifts_labels

# Off is the original bit for bit; a frozen copy of an initial adapter that was subtracted from the base is so to the
# rounding of that subtraction. Both relative to the largest logit.
INITIAL_ROUNDING = 2e-5
LOSS_ROUNDING, GRADIENT_ROUNDING = 2e-5, 2e-4


@dataclass(frozen=True)
class Outcome:
    """One row of a matrix. ``why``: the refusal's sentence, why it was not built, or what was wrong."""

    name: str
    outcome: Literal["exact", "refused", "not built", "wrong"]
    why: str = ""
    anchor: str = ""  # the base's kind: off, initial
    step0_kl: float | None = None  # nats a token, before training


class WrongError(AssertionError):
    """A check that did not hold; its message is the row's ``why``."""


def _require(holds: bool, message: str) -> None:
    if not holds:
        raise WrongError(message)


def check(
    name: str,
    original: nn.Module,
    model: nn.Module,
    data: dict[str, Any],
    *,
    base: Any = "auto",
    moved: float = 0.05,
    aux_coefficient: float = 0.0,
    spoil: Callable[[Attachment], None] | None = None,
) -> Outcome:
    """Attach to ``model`` and hold everything that "exact" means against ``original``.

    Args:
        name: the case's name.
        original: the base model as it was before the adapter came, separate from ``model``.
        model: the adapted model as a user would train it.
        data: a batch with ``labels``.
        base: as of :func:`~mask_the_target.attach`.
        moved: noise that is added to the adapter's weights, as if it had been trained.
        aux_coefficient: factor of the adapted pass's router loss in the model's own loss; 0 where there is none.
        spoil: breaks the attachment on purpose, for the tests of this function.

    Returns:
        "exact", "refused" (by a ValueError of attach), or "wrong".
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return _check(name, original, model, data, base, moved, aux_coefficient, spoil)
    except WrongError as error:
        return Outcome(name, "wrong", str(error))


def _check(
    name: str,
    original: nn.Module,
    model: nn.Module,
    data: dict[str, Any],
    base: Any,
    moved: float,
    aux_coefficient: float,
    spoil: Callable[[Attachment], None] | None,
) -> Outcome:
    model.train()
    original.requires_grad_(False)
    before = _flags(model)
    options = TMKL(weight=0.7)

    def reference(options: TMKL) -> Any:
        torch.manual_seed(7)  # the same draws in an adapter that draws in training
        expected = reference_loss(model, original, data, options, shifts_labels=shifts)
        if not aux_coefficient:
            return expected
        aux = attachment._previous(**model_inputs(data)).aux_loss
        if aux is None:  # asked for its router's logits, the model makes no loss of them
            return expected
        return dataclasses.replace(expected, loss=expected.loss + aux_coefficient * aux)

    try:
        attachment = attach(model, options, base=base, full_kl=True)
    except ValueError as error:
        return Outcome(name, "refused", str(error))
    shifts = shifts_labels(original, data, aux_coefficient)
    if spoil is not None:
        spoil(attachment)
    with attachment:
        _require(_flags(model) == before, "attaching changed a training or requires_grad flag")
        kind = attachment.base.kind
        _require_base(attachment, original, data, "before training")

        # Before the first step, against the reference: also where an adapter doesn't start as the identity.
        torch.manual_seed(7)
        with torch.no_grad():
            loss = float(model(**data).loss)
            step0 = attachment.last
        expected = reference(options)
        _require(
            abs(float(step0.kl) - float(expected.kl)) <= 1e-6 + LOSS_ROUNDING * abs(float(expected.kl)),
            f"the KL before the first step is {float(step0.kl):.3g}, the reference's {float(expected.kl):.3g}",
        )
        _require_close("the loss before the first step", loss, float(expected.loss))
        _require(_flags(model) == before, "a forward changed a training or requires_grad flag")

        # One step's loss and gradients, with an adapter that has moved.
        move(model, moved)
        expected = reference(options)
        if not float(expected.kl) > 1e-7:
            return Outcome(name, "not built", "the moved adapter has no effect here, in the two-model reference either")
        wanted = gradients(expected.loss, model)
        plain = gradients(reference(TMKL(weight=0)).loss, model)
        if not any(gradient.any() for gradient in wanted.values()):
            return Outcome(name, "not built", "no gradient reaches the adapter, in the two-model reference either")
        if distance(gradients(reference(options).loss, model), wanted) > GRADIENT_ROUNDING:
            return Outcome(name, "not built", "no seed repeats its draws: the reference differs from itself")
        torch.manual_seed(7)
        loss = model(**data).loss
        own = gradients(loss, model)
        _require_close("the loss", float(loss), float(expected.loss))
        apart = distance(own, wanted)
        _require(apart <= GRADIENT_ROUNDING, f"the gradient is {apart:.2g} from the two-model reference's (relative)")
        _require(
            distance(plain, wanted) > 10 * GRADIENT_ROUNDING,
            "the regulariser's gradient is too small here to tell whether it is on",
        )

        # A real step moves the adapter and nothing of the base.
        with torch.no_grad():
            for parameter_name, parameter in model.named_parameters():
                if parameter.requires_grad:
                    parameter -= 0.01 * own[parameter_name]
        _require_base(attachment, original, data, "after a step")
        _require_flags_after_an_exception(attachment, model, data, before)
    _require(_flags(model) == before, "detaching left a flag changed")
    return Outcome(name, "exact", "", kind, float(step0.kl))


def _flags(model: nn.Module) -> list[Any]:
    modules = [(n, m.training, getattr(m, "_disable_adapters", None)) for n, m in model.named_modules()]
    return modules + [(n, p.requires_grad) for n, p in model.named_parameters()]


def _require_base(attachment: Attachment, original: nn.Module, data: dict[str, Any], when: str) -> None:
    """The model inside the base's context is the original."""
    model = attachment.base.model
    with torch.no_grad(), evaluating(model), attachment.base.context():
        own = attachment._previous(**model_inputs(data)).logits
    with torch.no_grad():
        wanted = original.eval()(**model_inputs(data)).logits
    error = float((own - wanted).abs().max())
    if attachment.base.kind == "off":
        _require(torch.equal(own, wanted), f"{when}, off is not the original bit for bit (off by {error:.3g})")
    else:
        limit = INITIAL_ROUNDING * float(wanted.abs().max())
        _require(error <= limit, f"{when}, the initial adapter doesn't give the original back (off by {error:.3g})")


def _require_close(what: str, own: float, expected: float) -> None:
    _require(
        abs(own - expected) <= LOSS_ROUNDING * max(1.0, abs(expected)),
        f"{what} is {own:.7f}, the two-model reference's {expected:.7f}",
    )


def _require_flags_after_an_exception(
    attachment: Attachment, model: nn.Module, data: dict[str, Any], before: list[Any]
) -> None:
    """An error inside the base pass leaves every flag as it was."""
    own = attachment._base_tap.run

    def fail(*arguments: Any, **kwargs: Any) -> Any:
        own(*arguments, **kwargs)
        raise ZeroDivisionError

    attachment._base_tap.run = fail  # type: ignore[method-assign]
    try:
        model(**data)
    except ZeroDivisionError:
        _require(_flags(model) == before, "an exception in the base pass left a flag changed")
    else:
        raise WrongError("the base pass did not run")
    finally:
        del attachment._base_tap.run
