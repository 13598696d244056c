"""The definition of target-masked KL (TMKL), in plain PyTorch on dense logits. Everything else is checked against this.

For one supervised position with ground-truth token ``y``, let ``p_b`` be the base model's next-token distribution and
``p_a`` the adapted model's. Take ``y`` out of both and renormalise: ``q(c) = p(c) / (1 - p(y))`` for ``c != y``. Then

    loss = [ sum CE + weight * sum KL(q_b || q_a) ] / supervised tokens

Positions without a target (a prompt's) may be held in place too, beyond the paper: with ``context_weight``,

    loss += context_weight * sum KL(p_b || p_a) / context tokens

Source: Xu, Garg, Saratchandran, Lucey, "Mask the Target", arXiv 2605.29498. At temperature 1 the KL is the non-target
part (NCKD) of Decoupled Knowledge Distillation (Zhao et al., CVPR 2022), with the base as the teacher.

Both distributions are computed as a log-softmax over the logits with column ``y`` removed. It is the same quantity as
``p / (1 - p(y))`` and needs none of the paper's guards: in float32 the clamped quotient loses the KL once
``1 - p(y) < 1e-6``, this form does not.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORE_INDEX = -100
CONTEXT_INDEX = -1  # a label of :func:`target_masked_kl`: this row has no target, and the full KL holds it

Divergence = Literal["forward", "reverse", "jsd"]
PositionWeight = Literal["uniform", "non_target_mass"]


@dataclass(frozen=True)
class TMKL:
    """Options of the objective. The defaults are the paper's setting; each row of its ablation table is one option.

    Args:
        weight: factor of the KL term (lambda in the paper), >= 0. 0 is plain cross-entropy.
        divergence: ``"forward"`` KL(base, adapted), ``"reverse"`` KL(adapted, base), or ``"jsd"``, the mean of the two
            KLs to the equal mixture.
        mask_target: take the ground-truth token out of both distributions. ``False`` is the full-vocabulary KL
            ("learning without forgetting", LwF).
        renormalize: divide what is left by its mass. ``False`` sums the terms of the non-targets as they stand (the sum
            may be negative); it needs ``mask_target=True``.
        position_weight: ``"uniform"``, or ``"non_target_mass"``: each position's KL times ``1 - p_b(y)``, at
            temperature 1.
        temperature: divides both models' logits in the KL, whose value is then multiplied by its square. CE is not
            touched.
        exclude_base_above: positions with ``p_b(y)`` above this probability (at temperature 1) are left out of the KL's
            sum. The denominator stays the number of supervised positions, so that the loss is the same under gradient
            accumulation. The paper uses ``1 - 1e-4``.
        context_weight: factor of the full-vocabulary KL(base, adapted) at context positions (real ones without a
            target, such as a prompt's), averaged over them; >= 0. Not in the paper.
        context_tokens: at most about so many context positions a step, uniformly sampled, which estimates the same mean
            at less cost; None takes all.

    Raises:
        ValueError: for a value or a combination that means nothing.
    """

    weight: float = 1.0
    divergence: Divergence = "forward"
    mask_target: bool = True
    renormalize: bool = True
    position_weight: PositionWeight = "uniform"
    temperature: float = 1.0
    exclude_base_above: float | None = None
    context_weight: float = 0.0
    context_tokens: int | None = None

    def __post_init__(self) -> None:
        for name in ("weight", "context_weight"):
            value = getattr(self, name)
            _require_number(name, value, _finite(value) and value >= 0, ">= 0")
        for name, kind in (("divergence", Divergence), ("position_weight", PositionWeight)):
            if getattr(self, name) not in get_args(kind):
                known = ", ".join(repr(value) for value in get_args(kind))
                raise ValueError(f"TMKL: {name}={getattr(self, name)!r} is unknown; choose one of {known}.")
        for name in ("mask_target", "renormalize"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"TMKL: {name}={getattr(self, name)!r} must be True or False.")
        if not self.renormalize and not self.mask_target:
            raise ValueError(
                "TMKL: renormalize=False with mask_target=False means nothing, because a full-vocabulary distribution "
                "already sums to one; use mask_target=False alone for the full KL, or renormalize=False alone for the "
                "masked KL without renormalising."
            )
        _require_number("temperature", self.temperature, _finite(self.temperature) and self.temperature > 0, "> 0")
        if self.exclude_base_above is not None:
            within = _finite(self.exclude_base_above) and 0 < self.exclude_base_above < 1
            _require_number(
                "exclude_base_above", self.exclude_base_above, within, "a probability between 0 and 1, or None"
            )
        if self.context_tokens is not None:
            whole = type(self.context_tokens) is int and self.context_tokens > 0
            _require_number("context_tokens", self.context_tokens, whole, "a number of positions above 0, or None")
            if not self.context_weight:
                raise ValueError(
                    f"TMKL: context_tokens={self.context_tokens} without a context_weight has no effect; set both."
                )

    @classmethod
    def recommended(cls) -> TMKL:
        """Where to begin, by our evidence (docs/evidence.md), and what `mtt train` takes on data with prompts if it is
        told no ``tmkl_*``: the prompt's positions held by the full KL, and a tenth of the paper's weight at the
        targets'. The paper's own setting is ``TMKL()``."""
        return cls(weight=0.1, context_weight=3.0)

    @property
    def log_excluded_mass(self) -> float:
        """Nats: a position is excluded when its base log non-target mass ``log(1 - p_b(y))`` is below this."""
        return -math.inf if self.exclude_base_above is None else math.log1p(-self.exclude_base_above)


def _finite(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _require_number(name: str, value: object, ok: bool, rule: str) -> None:
    if not ok:
        raise ValueError(f"TMKL: {name}={value!r} is not possible; it must be {rule}.")


@dataclass(frozen=True)
class TMKLResult:
    """What one call computed.

    Attributes:
        loss: scalar, differentiable: ``ce + weight * kl + context_weight * context_kl``.
        ce: scalar, detached, nats: sum of cross-entropies over the supervised rows, divided by the denominator.
        kl: scalar, detached, nats: sum of the (position-weighted) divergences over the same rows, divided by the same
            denominator; excluded rows add nothing.
        supervised: scalar int64: rows whose label is not -100.
        excluded: scalar int64: supervised rows that ``exclude_base_above`` left out of the KL.
        context_kl: scalar, detached, nats: sum of the full KLs of context rows, over their own denominator.
        context: scalar int64: rows whose label is -1.
    """

    loss: Tensor
    ce: Tensor
    kl: Tensor
    supervised: Tensor
    excluded: Tensor
    context_kl: Tensor
    context: Tensor


def target_masked_kl(
    logits: Tensor,
    base_logits: Tensor,
    labels: Tensor,
    options: TMKL = TMKL(),
    *,
    num_items: int | float | Tensor | None = None,
    num_context: int | float | Tensor | None = None,
    token_weights: Tensor | None = None,
) -> TMKLResult:
    """CE + weight * target-masked KL on dense logits: the reference for every other implementation.

    Rows are aligned already: row ``i`` of both logits predicts ``labels[i]``; nothing is shifted here.

    Args:
        logits: adapted model's logits, ``[N, V]``, any float dtype; statistics are float32, or float64 for float64.
        base_logits: base model's logits, ``[N, V]``; no gradient flows into them.
        labels: ``[N]`` int64 token ids; rows with -100 are ignored, and rows with -1 (only with ``context_weight``)
            are context rows.
        options: see :class:`TMKL`.
        num_items: the denominator in tokens, where it is known to be another than the supervised rows given here
            (``num_items_in_batch`` under gradient accumulation or data parallelism).
        num_context: the same for context rows.
        token_weights: ``[N]``, a factor of each row's CE and KL; 1 by default. The denominator doesn't change.

    Returns:
        A :class:`TMKLResult`. With no supervised row the loss is a differentiable 0.

    Raises:
        ValueError: if shapes don't match, or a label lies outside the vocabulary.
    """
    check_rows("logits", logits, "base_logits", base_logits, labels)
    check_labels(labels, vocabulary=logits.shape[1], context=options.context_weight > 0)
    context_kl = None
    if options.context_weight:
        context = (labels == CONTEXT_INDEX).nonzero().squeeze(1)  # [m]
        z_a, z_b = widen(logits[context]), widen(base_logits[context].detach())
        context_kl = kl_of_rows(z_b.log_softmax(1), z_a.log_softmax(1))
        if token_weights is not None:
            context_kl = context_kl * token_weights[context]
    given = labels
    rows = (labels >= 0).nonzero().squeeze(1)  # [n]
    labels = labels[rows]
    z_a = widen(logits[rows])  # [n, V]
    z_b = widen(base_logits[rows].detach())  # [n, V]

    ce = F.cross_entropy(z_a, labels, reduction="none")  # [n]; an empty batch gives an empty, connected tensor
    log_mass = log_non_target_mass(z_b, labels)  # [n]
    excluded = log_mass < options.log_excluded_mass
    if options.mask_target:
        # A base row whose every non-target is -inf has nothing to keep: its KL is 0, and a row of zeros in both
        # places computes that without NaN in the gradient.
        nothing = (log_mass == -math.inf)[:, None]
        z_a, z_b = z_a.masked_fill(nothing, 0), z_b.masked_fill(nothing, 0)
    kl = _divergence(z_a, z_b, labels, options)  # [n]
    if options.position_weight == "non_target_mass":
        kl = kl * log_mass.exp()
    kl = torch.where(excluded, torch.zeros_like(kl), kl)
    row_loss = ce + options.weight * kl
    if token_weights is not None:
        row_loss, ce, kl = (column * token_weights[rows] for column in (row_loss, ce, kl))
    return reduce_rows(row_loss, ce, kl, excluded, given, options, num_items, context_kl, num_context)


def log_non_target_mass(logits: Tensor, labels: Tensor) -> Tensor:
    """``log(1 - p(y))`` of each row in nats, ``[N]``, without the cancellation of ``1 - p(y)``."""
    z_y = logits.gather(1, labels[:, None]).squeeze(1)
    lse_rest = _without_target(logits, labels).logsumexp(1)  # log-sum-exp without the target
    return lse_rest - torch.logaddexp(lse_rest, z_y)


def reduce_rows(
    row_loss: Tensor,
    ce: Tensor,
    kl: Tensor,
    excluded: Tensor,
    labels: Tensor,
    options: TMKL,
    num_items: int | float | Tensor | None,
    context_kl: Tensor | None,
    num_context: int | float | Tensor | None,
) -> TMKLResult:
    """Sums of the rows (0 at those that don't count) over the one denominator that CE and KL share, and context rows'
    over theirs. ``labels [N]`` are all rows'."""
    supervised, context = (labels >= 0).sum(), (labels == CONTEXT_INDEX).sum()
    items = denominator(num_items, supervised)
    loss = row_loss.sum() / items
    context_mean = loss.detach().new_zeros(())
    if context_kl is not None:
        mean = context_kl.sum() / context_denominator(num_context, context)
        loss, context_mean = loss + options.context_weight * mean, mean.detach()
    return TMKLResult(
        loss=loss,
        ce=ce.detach().sum() / items,
        kl=kl.detach().sum() / items,
        supervised=supervised,
        excluded=excluded.sum(),
        context_kl=context_mean,
        context=context,
    )


def denominator(num_items: int | float | Tensor | None, supervised: Tensor) -> Tensor:
    """The number of tokens to divide by, a scalar tensor >= 1 on ``supervised``'s device.

    ``num_items`` may be a number or a tensor with one element, or one element a device (as ``Trainer`` expands it).
    """
    if num_items is None:
        return supervised.clamp(min=1)
    if isinstance(num_items, Tensor):
        return num_items.to(supervised.device).reshape(-1)[0].clamp(min=1)
    if not num_items > 0:
        raise ValueError(f"num_items={num_items!r} must be the number of supervised tokens of the whole batch, > 0.")
    return torch.tensor(float(num_items), device=supervised.device)


def context_denominator(num_context: int | float | Tensor | None, context: Tensor) -> Tensor:
    """As :func:`denominator`; a whole step may have no context position."""
    without = not isinstance(num_context, Tensor) and not num_context
    return denominator(None if without else num_context, context)


def check_rows(name: str, rows: Tensor, base_name: str, base_rows: Tensor, labels: Tensor) -> None:
    """Refuse inputs that are not ``[N, ...]``, ``[N, ...]`` and ``[N]``, before anything is computed."""
    if rows.dim() != 2 or base_rows.dim() != 2 or labels.dim() != 1:
        raise ValueError(
            f"{name} and {base_name} must have two dimensions and labels one, got {list(rows.shape)}, "
            f"{list(base_rows.shape)} and {list(labels.shape)}; flatten batch and sequence first."
        )
    if rows.shape[0] != base_rows.shape[0] or rows.shape[0] != labels.shape[0]:
        raise ValueError(
            f"{name} {list(rows.shape)}, {base_name} {list(base_rows.shape)} and labels {list(labels.shape)} must have "
            "the same number of rows, one for each position."
        )
    if name == "logits" and rows.shape[1] != base_rows.shape[1]:
        raise ValueError(
            f"{name} {list(rows.shape)} and {base_name} {list(base_rows.shape)} must have the same vocabulary; a base "
            "with another tokenizer can't be compared token by token."
        )


def check_labels(labels: Tensor, vocabulary: int, *, context: bool = False) -> None:
    """Refuse a label that is neither -100 (nor -1, with ``context``) nor a token id, naming its row.

    Costs a device sync.
    """
    if labels.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"labels must be int64 token ids, got {labels.dtype}.")
    outside = ((labels < 0) & (labels != IGNORE_INDEX)) | (labels >= vocabulary)
    if context:
        outside &= labels != CONTEXT_INDEX
    if outside.any():
        row = int(outside.nonzero()[0])
        raise ValueError(
            f"labels[{row}] = {int(labels[row])} lies outside the vocabulary of {vocabulary} tokens; use -100 for "
            "positions without a target."
        )
    if vocabulary < 2:
        raise ValueError(f"the vocabulary has {vocabulary} token; without the target nothing would be left to compare.")


def widen(logits: Tensor) -> Tensor:
    """In the dtype that statistics are computed in: float32, or float64 for float64."""
    return logits if logits.dtype == torch.float64 else logits.float()


def _without_target(logits: Tensor, labels: Tensor) -> Tensor:
    return logits.scatter(1, labels[:, None], -math.inf)


def _divergence(z_a: Tensor, z_b: Tensor, labels: Tensor, options: TMKL) -> Tensor:
    """Divergence of each row in nats, times the squared temperature. ``[n, V], [n, V], [n] -> [n]``."""
    log_p_a, log_p_b = (_log_probs(z / options.temperature, labels, options) for z in (z_a, z_b))
    if options.divergence == "forward":
        value = kl_of_rows(log_p_b, log_p_a)
    elif options.divergence == "reverse":
        value = kl_of_rows(log_p_a, log_p_b)
    else:
        # Where both are -inf the mixture is too; a stand-in of 0 keeps logaddexp's gradient defined (it is not used).
        nowhere = (log_p_a == -math.inf) & (log_p_b == -math.inf)
        mixture = torch.logaddexp(log_p_a.masked_fill(nowhere, 0), log_p_b.masked_fill(nowhere, 0)) - math.log(2)
        value = (kl_of_rows(log_p_b, mixture) + kl_of_rows(log_p_a, mixture)) / 2
    return value * options.temperature**2


def _log_probs(logits: Tensor, labels: Tensor, options: TMKL) -> Tensor:
    """Log-probabilities of the tokens that are compared, ``[n, V]``; -inf at those that are not."""
    if not options.mask_target:
        return logits.log_softmax(1)
    rest = _without_target(logits, labels)
    return rest.log_softmax(1) if options.renormalize else rest - logits.logsumexp(1, keepdim=True)


def kl_of_rows(log_p: Tensor, log_q: Tensor) -> Tensor:
    """``sum p (log p - log q)`` of each row with ``0 log 0 = 0``; infinite where q is 0 and p is not."""
    support = log_p > -math.inf
    log_p, log_q = log_p.masked_fill(~support, 0), log_q.masked_fill(~support, 0)
    return (log_p.exp() * (log_p - log_q)).masked_fill(~support, 0).sum(1)
