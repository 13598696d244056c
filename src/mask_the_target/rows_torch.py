"""What happens to one block of rows of logits: statistics, loss terms and the gradient, in eager PyTorch.

Let ``q`` be a distribution without its target, and ``M = exp(lse_rest - lse)`` its non-target mass (never ``1 - p(y)``,
which cancels). Then for the default options, in three buffers of ``[n, V]``,

    KL = sum q_b (z_b - z_a) - lse_rest_b + lse_rest_a
    d(CE + w KL) / dz_a(c) = q_a(c) (M_a + w) - w q_b(c) for c != y, and -M_a at y.

The other options share one general form. Let ``u = z_a / T``, ``p_a`` the adapted
distribution, ``D`` the divergence and ``g(c) = p_a(c) dD/dp_a(c)``: then ``dD/du(j) = g(j) - p_a(j) sum g``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from mask_the_target.objective import TMKL


@dataclass(frozen=True)
class Rows:
    """Per-row results, ``[n]`` each, in nats; all but ``loss`` are detached.

    ``loss`` is ``ce + weight * kl``; ``kl`` carries its position weight and is 0 at excluded rows. ``full_kl`` is
    KL(base, adapted) over the whole vocabulary at temperature 1; ``entropy`` is the adapted distribution's and
    ``is_top1`` says whether its most likely token is the target. These three are None unless asked for.
    """

    loss: Tensor
    ce: Tensor
    kl: Tensor
    excluded: Tensor
    full_kl: Tensor | None = None
    entropy: Tensor | None = None
    is_top1: Tensor | None = None


def compute_rows(
    z_a: Tensor,
    z_b: Tensor,
    labels: Tensor,
    options: TMKL,
    *,
    scratch: Tensor,
    with_gradient: bool,
    full_kl: bool = False,
    token_statistics: bool = False,
) -> Rows:
    """Loss terms of a block of rows; with ``with_gradient`` the gradient of ``loss`` replaces ``z_a`` in place.

    Args:
        z_a: adapted logits after the model's own transform, ``[n, V]`` float32 or float64; overwritten.
        z_b: base logits, ``[n, V]``, same dtype; overwritten.
        labels: ``[n]`` int64, none of them -100.
        options: see :class:`~mask_the_target.objective.TMKL`.
        scratch: ``[n, V]``, same dtype; overwritten.
        with_gradient: write the gradient.
        full_kl: also compute the full-vocabulary KL.
        token_statistics: also compute entropy and is_top1.
    """
    column = labels[:, None]  # [n, 1]; so are all the statistics below
    is_top1 = (z_a.argmax(1) == labels) if token_statistics else None
    a, b = _split(z_a, column, scratch), _split(z_b, column, scratch)  # from here both are -inf at the target
    ce = a.lse - a.z_y
    excluded = b.log_mass < options.log_excluded_mass
    scale = torch.where(excluded, 0.0, 1.0).to(ce.dtype)  # of the row's KL
    if options.mask_target:
        scale = scale.masked_fill(b.log_mass == -math.inf, 0.0)  # nothing but the target: nothing to keep
    if options.position_weight == "non_target_mass":
        scale = scale * b.log_mass.exp()
    entropy = _entropy(z_a, a, scratch) if token_statistics else None

    simple = options.divergence == "forward" and options.renormalize and options.temperature == 1
    apart = simple and options.mask_target  # the target stays out of z_a and z_b
    if not apart:
        z_a.scatter_(1, column, a.z_y)
        z_b.scatter_(1, column, b.z_y)
    mass_a = a.log_mass.exp() if apart else torch.ones_like(ce)
    full = None
    if simple:
        norm_a, norm_b = (a.norm, b.norm) if apart else (a.lse, b.lse)
        kl = _forward_kl(z_a, z_b, norm_a, norm_b, mass_a, options.weight * scale, scratch, with_gradient)
        if full_kl:
            full = _binary_kl(a, b) + b.log_mass.exp() * kl if apart else kl
    else:
        if full_kl:
            full = _sum_where(z_b - b.lse, (z_b - b.lse) - (z_a - a.lse))
        kl, gradient = _divergence(z_a, z_b, column, options, with_gradient and options.weight > 0)
        if with_gradient:
            z_a.sub_(a.lse).exp_()
        if gradient is not None:
            factor = options.weight * options.temperature * scale  # T^2 times the 1/T of u = z/T
            # torch.where: a row of no weight may hold NaN (no non-target mass), which 0 would not erase.
            z_a.add_(torch.where(scale == 0, 0.0, gradient.mul_(factor)))
    if with_gradient:
        z_a.scatter_add_(1, column, -mass_a)  # p_a(y) - 1; where the target is out, its column holds 0 so far
    kl = torch.where(scale == 0, 0.0, kl * scale)
    return Rows(
        loss=(ce + options.weight * kl).squeeze(1),
        ce=ce.squeeze(1),
        kl=kl.squeeze(1),
        excluded=excluded.squeeze(1),
        full_kl=None if full is None else full.squeeze(1),
        entropy=None if entropy is None else entropy.squeeze(1),
        is_top1=is_top1,
    )


class _Split(NamedTuple):
    """A row apart: the target's logit, log-sum-exp of the rest and of all, and ``log(1 - p(y))``; ``[n, 1]`` each."""

    z_y: Tensor
    lse_rest: Tensor
    lse: Tensor
    log_mass: Tensor

    @property
    def norm(self) -> Tensor:
        """lse_rest, or 0 where nothing is left: then every probability of the rest is 0, and not NaN."""
        return self.lse_rest.masked_fill(self.lse_rest == -math.inf, 0.0)


def _split(z: Tensor, column: Tensor, scratch: Tensor) -> _Split:
    """Statistics of a row; writes -inf into the target's column of ``z``."""
    z_y = z.gather(1, column)
    z.scatter_(1, column, -math.inf)
    highest = z.amax(1, keepdim=True).clamp(min=torch.finfo(z.dtype).min)  # finite also where all is -inf
    lse_rest = torch.sub(z, highest, out=scratch).exp_().sum(1, keepdim=True).log_() + highest
    lse = torch.logaddexp(lse_rest, z_y)
    return _Split(z_y, lse_rest, lse, lse_rest - lse)


def _forward_kl(
    z_a: Tensor,
    z_b: Tensor,
    norm_a: Tensor,
    norm_b: Tensor,
    mass_a: Tensor,
    weight: Tensor,
    scratch: Tensor,
    with_gradient: bool,
) -> Tensor:
    """KL(q_b, q_a) of each row, ``[n, 1]``; ``q_a (mass_a + weight) - weight q_b`` into ``z_a``. All in place."""
    q_b = torch.sub(z_b, norm_b, out=scratch).exp_()
    kl = z_b.sub_(z_a).masked_fill_(q_b == 0, 0).mul_(q_b).sum(1, keepdim=True) - norm_b + norm_a
    if with_gradient:
        z_a.sub_(norm_a).exp_().mul_(mass_a + weight).sub_(q_b.mul_(weight))
    return kl


def _binary_kl(a: _Split, b: _Split) -> Tensor:
    """KL(b, a) of (target, not the target), ``[n, 1]``."""
    log_y_a, log_y_b = a.z_y - a.lse, b.z_y - b.lse
    return _product(log_y_b.exp(), log_y_b - log_y_a) + _product(b.log_mass.exp(), b.log_mass - a.log_mass)


def _entropy(z: Tensor, row: _Split, scratch: Tensor) -> Tensor:
    """Entropy of the whole distribution from the non-targets' logits, ``[n, 1]``."""
    rest = torch.sub(z, row.lse, out=scratch).clamp_(min=torch.finfo(z.dtype).min)
    log_y = row.z_y - row.lse
    return -(rest.exp() * rest).sum(1, keepdim=True) - log_y.exp() * log_y


def _divergence(
    z_a: Tensor, z_b: Tensor, column: Tensor, options: TMKL, with_gradient: bool
) -> tuple[Tensor, Tensor | None]:
    """Divergence ``[n, 1]`` times T^2, and its gradient in ``u = z_a / T``, ``[n, V]``, without T^2."""
    log_p_a, log_p_b = (_log_probs(z, column, options) for z in (z_a, z_b))
    p_a = log_p_a.exp()
    if options.divergence == "forward":
        value = _sum_where(log_p_b, log_p_b - log_p_a)
        terms = -log_p_b.exp() if with_gradient else None
    elif options.divergence == "reverse":
        ratio = log_p_a - log_p_b
        value = _sum_where(log_p_a, ratio)
        terms = _product(p_a, ratio + 1) if with_gradient else None
    else:
        log_m = torch.logaddexp(log_p_a, log_p_b) - math.log(2)
        ratio = log_p_a - log_m
        value = (_sum_where(log_p_b, log_p_b - log_m) + _sum_where(log_p_a, ratio)) / 2
        terms = _product(p_a, ratio) / 2 if with_gradient else None
    value = value * options.temperature**2
    if terms is None:
        return value, None
    total = terms.sum(1, keepdim=True)
    if not options.renormalize:
        # p_a over the whole vocabulary: the target's logit moves the non-targets' probabilities too.
        p_a = (z_a / options.temperature).softmax(1)
    return value, terms.addcmul_(p_a, total, value=-1)


def _log_probs(z: Tensor, column: Tensor, options: TMKL) -> Tensor:
    """Log-probabilities of the compared tokens, ``[n, V]``, -inf at the target when it is masked. A fresh tensor."""
    u = z / options.temperature
    if not options.mask_target:
        return u.log_softmax(1)
    if options.renormalize:
        return u.scatter_(1, column, -math.inf).log_softmax(1)
    lse = u.logsumexp(1, keepdim=True)
    return u.scatter_(1, column, -math.inf).sub_(lse)


def _product(p: Tensor, factor: Tensor) -> Tensor:
    """``p * factor`` with ``0 * anything = 0``."""
    return torch.where(p > 0, p * factor, 0.0)


def _sum_where(log_p: Tensor, factor: Tensor) -> Tensor:
    """``sum p * factor`` of each row, ``[n, 1]``."""
    return _product(log_p.exp(), factor).sum(1, keepdim=True)
