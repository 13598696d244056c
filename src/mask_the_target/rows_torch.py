"""What happens to one block of rows of logits: statistics, loss terms and the gradient, in PyTorch, for any device.

Let ``q`` be a distribution without its target, and ``M = exp(lse_rest - lse)`` its non-target mass (never ``1 - p(y)``,
which cancels). Then for the default options

    KL = sum q_b (z_b - z_a) - lse_rest_b + lse_rest_a
    d(CE + w KL) / dz_a(c) = q_a(c) (M_a + w) - w q_b(c) for c != y, and -M_a at y.

The other options share one general form. Let ``u = z_a / T``, ``p_a`` the adapted
distribution, ``D`` the divergence and ``g(c) = p_a(c) dD/dp_a(c)``: then ``dD/du(j) = g(j) - p_a(j) sum g``.

It is written without in-place steps, so that Inductor can fuse it into three passes over a block that stays in cache:
0.4 s of 2048 x 49152 rows against 0.8 s in eager (AMD EPYC with AVX2, 2 threads). :mod:`~mask_the_target.rows_triton`
is the same contract for GPUs.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mask_the_target.head import LogitTransform
from mask_the_target.objective import TMKL

# Below this many logits in a block, eager is fast enough, and nothing is worth compiling.
_COMPILE_FROM = 2**20
# Eager takes a few rows at a time, so that its ten or so intermediate tensors stay in a CPU's cache (measured: as fast
# as in-place code on the whole block, at a fraction of its memory).
_EAGER_ELEMENTS = {"cpu": 2**18}
_EAGER_ELEMENTS_ELSEWHERE = 2**24


class VocabularyShard(NamedTuple):
    """The part of the vocabulary whose logits this process has: ``[first, first + size)``, one of equal parts.

    Only the last part may be smaller than ``size``. ``group`` is the name of the group of processes that have the
    parts; they go through the same rows together, and only statistics of rows, ``[n, 1]``, are reduced over them.
    """

    first: int
    size: int
    group: str

    def reduced(self, x: Tensor, operation: str) -> Tensor:
        """``x``, of any shape, as the "sum" or "max" over all parts."""
        from torch.distributed import _functional_collectives as collectives

        group: Any = self.group
        return collectives.wait_tensor(collectives.all_reduce(x, operation, group))


@dataclass(frozen=True)
class Rows:
    """Per-row results, ``[n]`` each, in nats; all but ``loss`` are detached.

    A row with a target: ``loss`` is ``ce + weight * kl``; ``kl`` carries its position weight and is 0 at excluded rows.
    A row without one (a negative label): ``ce`` is 0, and ``loss`` and ``kl`` are the full-vocabulary KL(base, adapted)
    whatever the options. ``full_kl`` is that KL at every row, ``entropy`` the adapted distribution's, and ``is_top1``
    says whether no other token is likelier than the target. These three are None unless asked for.
    """

    loss: Tensor
    ce: Tensor
    kl: Tensor
    excluded: Tensor
    full_kl: Tensor | None = None
    entropy: Tensor | None = None
    is_top1: Tensor | None = None


def compute_rows(
    x_a: Tensor,
    x_b: Tensor,
    labels: Tensor,
    options: TMKL,
    *,
    transform: LogitTransform = LogitTransform(),
    base_transform: LogitTransform = LogitTransform(),
    gradient: Tensor | None = None,
    full_kl: bool = False,
    token_statistics: bool = False,
    shard: VocabularyShard | None = None,
) -> Rows:
    """Loss terms of a block of rows, and the gradient of each row's ``loss`` in its logits.

    Args:
        x_a: the adapted head's outputs before the model's transform, ``[n, V]``; statistics are float32, or float64.
        x_b: the base head's, ``[n, V]``.
        labels: ``[n]`` int64; a negative label marks a row without a target.
        options: see :class:`~mask_the_target.objective.TMKL`.
        transform: the adapted model's, from head output to logits.
        base_transform: the base's.
        gradient: ``[n, V]``, overwritten with d loss / d x_a in its own dtype; may be ``x_a`` itself. None: not needed.
        full_kl: also compute the full-vocabulary KL.
        token_statistics: also compute entropy and is_top1.
        shard: the part of the vocabulary that the V columns are, where they are a part. Labels are the whole's.
    """
    weight = torch.full((), options.weight, dtype=_statistics_dtype(x_a), device=x_a.device)
    settings = _Settings(
        options.divergence,
        options.mask_target,
        options.renormalize,
        options.position_weight == "non_target_mass",
        options.temperature,
        options.log_excluded_mass,
        transform,
        base_transform,
        full_kl,
        token_statistics,
        shard,
    )
    if shard is None and x_a.device.type == "cpu" and x_a.numel() >= _COMPILE_FROM and len(labels) > 1:
        results = _run_compiled(x_a, x_b, labels, weight, settings, gradient)
        if results is not None:
            return Rows(*results)
    elements = _EAGER_ELEMENTS.get(x_a.device.type, _EAGER_ELEMENTS_ELSEWHERE)
    step = max(1, elements // (x_a.shape[1] if shard is None else shard.size))
    blocks = []
    for start in range(0, max(1, len(labels)), step):
        rows = slice(start, start + step)
        target = None if gradient is None else gradient[rows]
        blocks.append(Rows(*_rows(x_a[rows], x_b[rows], labels[rows], weight, settings, target)))
    columns: list[Any] = join_rows(blocks)
    return Rows(*columns)


def join_rows(blocks: list[Rows]) -> list[Tensor | None]:
    """The columns of :class:`Rows`, in their order, over all ``blocks``."""
    columns = [[getattr(block, field.name) for block in blocks] for field in fields(Rows)]
    return [None if column[0] is None else torch.cat(column) for column in columns]


class _Settings(NamedTuple):
    """What selects code, hence constants of a compiled kernel; ``weight`` is a tensor, so that it may change."""

    divergence: str
    mask_target: bool
    renormalize: bool
    by_mass: bool
    temperature: float
    log_excluded_mass: float
    transform: LogitTransform
    base_transform: LogitTransform
    full_kl: bool
    token_statistics: bool
    shard: VocabularyShard | None

    def sum(self, x: Tensor) -> Tensor:
        """Over the vocabulary: ``[n, V] -> [n, 1]``."""
        total = x.sum(1, keepdim=True)
        return total if self.shard is None else self.shard.reduced(total, "sum")

    def amax(self, x: Tensor) -> Tensor:
        """Over the vocabulary: ``[n, V] -> [n, 1]``."""
        highest = x.amax(1, keepdim=True)
        return highest if self.shard is None else self.shard.reduced(highest, "max")

    def log_softmax(self, u: Tensor) -> Tensor:
        """Over the vocabulary, ``[n, V]``."""
        if self.shard is None:
            return u.log_softmax(1)
        u = u - self.amax(u)
        return u - self.sum(u.exp()).log()


_Results = tuple[Any, ...]
_compiled: Callable[..., _Results] | None = None
_compiled_for: set[object] = set()
_no_compiler = False


def _run_compiled(
    x_a: Tensor, x_b: Tensor, labels: Tensor, weight: Tensor, settings: _Settings, gradient: Tensor | None
) -> _Results | None:
    """:func:`_rows` compiled by Inductor; None (after one warning) where it can't be."""
    global _compiled, _no_compiler
    if _no_compiler:
        return None
    key = (settings, x_a.dtype, None if gradient is None else (gradient.dtype, gradient is x_a))
    if _compiled is None:
        _compiled = torch.compile(_rows, dynamic=True)
    if key in _compiled_for:
        return _compiled(x_a, x_b, labels, weight, settings, gradient)
    try:
        # Each set of options is a kernel of its own; past Dynamo's limit of 8 it would run in eager without a word.
        with torch._dynamo.config.patch(recompile_limit=256):
            results = _compiled(x_a, x_b, labels, weight, settings, gradient)
    except Exception as error:
        _no_compiler = True
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        warnings.warn(
            f"the loss's row kernel runs in eager PyTorch, at about half its speed: torch.compile failed ({reason}). "
            "It needs a C++ compiler: install g++ or clang.",
            stacklevel=2,
        )
        return None
    _compiled_for.add(key)
    return results


def _rows(
    x_a: Tensor, x_b: Tensor, labels: Tensor, weight: Tensor, settings: _Settings, gradient: Tensor | None
) -> _Results:
    """The columns of :class:`Rows`; ``gradient`` is overwritten."""
    z_a = settings.transform(x_a.to(_statistics_dtype(x_a)))
    z_b = settings.base_transform(x_b.to(_statistics_dtype(x_b)))
    has_target = (labels >= 0)[:, None]  # [n, 1]; so are all the statistics below
    columns = labels if settings.shard is None else labels - settings.shard.first  # targets elsewhere are outside
    is_target = torch.arange(x_a.shape[1], dtype=torch.int32, device=x_a.device) == columns.to(torch.int32)[:, None]
    a, b = _split(z_a, columns, is_target, settings), _split(z_b, columns, is_target, settings)
    ce = torch.where(has_target, a.lse - a.z_y, 0.0)
    excluded = (b.log_mass < settings.log_excluded_mass) & has_target
    scale = torch.where(excluded, 0.0, torch.ones_like(ce))  # of the row's KL
    if settings.mask_target:
        scale = torch.where(b.log_mass == -math.inf, 0.0, scale)  # nothing but the target: nothing to keep
    if settings.by_mass:
        scale = scale * b.log_mass.exp()
    factor = torch.where(has_target, weight, 1.0)  # of the row's KL in its loss
    weight = torch.where(has_target, weight * scale, 1.0)  # of its raw divergence
    ones = torch.where(has_target, torch.ones_like(ce), 0.0)  # of its CE

    simple = settings.divergence == "forward" and settings.renormalize and settings.temperature == 1
    apart = simple and settings.mask_target  # the target's column is left out, and filled in at the end
    full = None
    if simple:
        c_a, c_b = (a.rest, b.rest) if apart else (z_a, z_b)
        norm_a, norm_b = (a.norm, b.norm) if apart else (a.lse, b.lse)
        q_b = (c_b - norm_b).exp()
        kl = settings.sum(torch.where(q_b > 0, q_b * (c_b - c_a), 0.0)) - norm_b + norm_a
        mass_a = (a.log_mass.exp() if apart else torch.ones_like(ce)) * ones
        slope = (c_a - norm_a).exp() * (mass_a + weight) - weight * q_b
        slope = torch.where(is_target, -mass_a, slope) if apart else torch.where(is_target, slope - 1, slope)
        if settings.full_kl:
            full = torch.where(has_target, _binary_kl(a, b) + b.log_mass.exp() * kl, kl) if apart else kl
    else:
        p_a, p_b = (z_a - a.lse).exp(), (z_b - b.lse).exp()
        full_kl = settings.sum(torch.where(p_b > 0, p_b * ((z_b - b.lse) - (z_a - a.lse)), 0.0))
        kl, slope = _divergence(z_a, z_b, is_target, settings)
        # torch.where: a row of no weight may hold NaN (no non-target mass), which 0 would not erase.
        slope = torch.where(weight == 0, 0.0, slope * (weight * settings.temperature))  # T^2 times the 1/T of u = z/T
        slope = torch.where(has_target, torch.where(is_target, p_a - 1, p_a) + slope, p_a - p_b)
        kl = torch.where(has_target, kl, full_kl)
        full = full_kl if settings.full_kl else None
    entropy = is_top1 = None
    if settings.token_statistics:
        log_p = (z_a - a.lse).clamp(min=torch.finfo(z_a.dtype).min)
        entropy = -settings.sum(log_p.exp() * log_p).squeeze(1)
        is_top1 = (has_target & (a.z_y >= a.highest)).squeeze(1)
    if gradient is not None:  # last, as it may take the place of x_a, and z_a be x_a
        scaling, softcap = settings.transform
        if softcap is not None:
            slope = slope * (1 - (z_a / softcap) ** 2)
        gradient.copy_(slope if scaling == 1.0 else slope * scaling)
    kl = torch.where(has_target, torch.where(scale == 0, 0.0, kl * scale), kl)
    loss = ce + factor * kl
    return (
        loss.squeeze(1),
        ce.squeeze(1),
        kl.squeeze(1),
        excluded.squeeze(1),
        None if full is None else full.squeeze(1),
        entropy,
        is_top1,
    )


def _statistics_dtype(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


class _Split(NamedTuple):
    """A row apart. ``rest``: its logits with -inf at the target, ``[n, V]``; all others ``[n, 1]``: the target's logit
    (-inf without a target), the rest's highest (finite), log-sum-exp of the rest and of all, and ``log(1 - p(y))``."""

    rest: Tensor
    z_y: Tensor
    highest: Tensor
    lse_rest: Tensor
    lse: Tensor
    log_mass: Tensor

    @property
    def norm(self) -> Tensor:
        """lse_rest, or 0 where nothing is left: then every probability of the rest is 0, and not NaN."""
        return torch.where(self.lse_rest == -math.inf, 0.0, self.lse_rest)


def _split(z: Tensor, columns: Tensor, is_target: Tensor, settings: _Settings) -> _Split:
    last = z.shape[1] - 1
    z_y = z.gather(1, columns.clamp(0, last)[:, None])
    z_y = torch.where(((columns >= 0) & (columns <= last))[:, None], z_y, -math.inf)
    z_y = z_y if settings.shard is None else settings.amax(z_y)
    rest = torch.where(is_target, -math.inf, z)
    highest = settings.amax(rest).clamp(min=torch.finfo(z.dtype).min)  # finite also where all is -inf
    lse_rest = settings.sum((rest - highest).exp()).log() + highest
    lse = torch.logaddexp(lse_rest, z_y)
    return _Split(rest, z_y, highest, lse_rest, lse, lse_rest - lse)


def _binary_kl(a: _Split, b: _Split) -> Tensor:
    """KL(b, a) of (target, not the target), ``[n, 1]``."""
    log_y_a, log_y_b = a.z_y - a.lse, b.z_y - b.lse
    return _product(log_y_b.exp(), log_y_b - log_y_a) + _product(b.log_mass.exp(), b.log_mass - a.log_mass)


def _divergence(z_a: Tensor, z_b: Tensor, is_target: Tensor, settings: _Settings) -> tuple[Tensor, Tensor]:
    """Divergence ``[n, 1]`` times T^2, and its gradient in ``u = z_a / T``, ``[n, V]``, without T^2."""
    log_p_a, log_p_b = (_log_probs(z, is_target, settings) for z in (z_a, z_b))
    p_a, p_b = log_p_a.exp(), log_p_b.exp()
    if settings.divergence == "forward":
        value = settings.sum(_product(p_b, log_p_b - log_p_a))
        terms = -p_b
    elif settings.divergence == "reverse":
        ratio = log_p_a - log_p_b
        value = settings.sum(_product(p_a, ratio))
        terms = _product(p_a, ratio + 1)
    else:
        log_m = torch.logaddexp(log_p_a, log_p_b) - math.log(2)
        terms = _product(p_a, log_p_a - log_m) / 2
        value = settings.sum(_product(p_b, log_p_b - log_m) / 2 + terms)
    total = settings.sum(terms)
    if not settings.renormalize:
        # p_a over the whole vocabulary: the target's logit moves the non-targets' probabilities too.
        p_a = settings.log_softmax(z_a / settings.temperature).exp()
    return value * settings.temperature**2, terms - p_a * total


def _log_probs(z: Tensor, is_target: Tensor, settings: _Settings) -> Tensor:
    """Log-probabilities of the compared tokens, ``[n, V]``, -inf at the target when it is masked."""
    u = z / settings.temperature
    if not settings.mask_target:
        return settings.log_softmax(u)
    if settings.renormalize:
        return settings.log_softmax(torch.where(is_target, -math.inf, u))
    return torch.where(is_target, -math.inf, settings.log_softmax(u))


def _product(p: Tensor, factor: Tensor) -> Tensor:
    """``p * factor`` with ``0 * anything = 0``."""
    return torch.where(p > 0, p * factor, 0.0)
