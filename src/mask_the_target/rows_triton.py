"""What happens to one block of rows of logits, as one Triton kernel: :mod:`~mask_the_target.rows_torch`'s contract.

One program a row, and two passes over it: statistics, then the gradient (only the Jensen-Shannon divergence needs a
third, between them). Per model the first pass keeps the highest non-target logit ``m`` and ``s = sum exp(z - m)`` over
the non-targets, rescaled whenever ``m`` rises, and for the KL the sum of ``exp(z_b - m_b) (z_b - z_a)``. The target
enters at the end, through ``d = z_y - m - log s`` alone: with ``softplus(x) = log(1 + exp(x))``,

    ce = -log p(y) = softplus(-d),    log(1 - p(y)) = -softplus(d),    KL = (binary KL) + (1 - p_b(y)) (masked KL)

so that nothing cancels, neither when the target is nearly certain nor when it is nearly impossible. The gradient is
written as in rows_torch: with ``u = z_a / T`` and ``g(c) = p_a(c) dD/dp_a(c)``, ``dD/du(j) = g(j) - p_a(j) sum g``.
"""

# mypy: allow-untyped-defs
# Triton's functions take its own tensors.
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mask_the_target import rows_torch
from mask_the_target.head import LogitTransform
from mask_the_target.objective import TMKL
from mask_the_target.rows_torch import Rows

# Columns of a row taken at a time, and of a thread: 16 float32 of each model in the registers of 512 threads. Compiled
# for an H100 that is 64 to 128 registers a thread, hence one or two programs a multiprocessor; not timed on a GPU yet.
_LARGEST_BLOCK = 8192
_COLUMNS_PER_THREAD = 16
# At least a column for each thread: were one held by two, one might read what the other wrote in place.
_SMALLEST_BLOCK = 128
_THREADS_PER_WARP = 32

_LOWEST = tl.constexpr(-3.4028234663852886e38)  # float32's: a running maximum that is finite also where all is -inf
_INFINITY = tl.constexpr(float("inf"))
_LOG_2 = tl.constexpr(0.6931471805599453)


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
) -> Rows:
    """Loss terms of a block of rows, and the gradient of each row's ``loss`` in the adapted head's output.

    Nothing waits for the device. A label past the vocabulary can't be refused without waiting: its row's loss is NaN.

    Args:
        x_a: the adapted head's outputs before the model's transform, ``[n, V]``, float32, bfloat16 or float16;
            statistics are float32. Float64 is computed by :func:`rows_torch.compute_rows`.
        x_b: the base head's, ``[n, V]``.
        labels: ``[n]`` int64; a negative label marks a row without a target.
        options: see :class:`~mask_the_target.objective.TMKL`.
        transform: the adapted model's, from head output to logits.
        base_transform: the base's.
        gradient: ``[n, V]``, overwritten with d loss / d x_a in its own dtype; may be ``x_a`` itself. None: not needed.
        full_kl: also compute the full-vocabulary KL.
        token_statistics: also compute entropy and is_top1.

    Raises:
        ValueError: if a row of the inputs or of ``gradient`` isn't contiguous.
    """
    if x_a.dtype == torch.float64:
        return rows_torch.compute_rows(
            x_a,
            x_b,
            labels,
            options,
            transform=transform,
            base_transform=base_transform,
            gradient=gradient,
            full_kl=full_kl,
            token_statistics=token_statistics,
        )
    for name, tensor in (("x_a", x_a), ("x_b", x_b), ("gradient", gradient)):
        if tensor is not None and tensor.stride(1) != 1:
            raise ValueError(f"{name} has strides {tensor.stride()}: the vocabulary must be its contiguous dimension.")
    n, vocabulary = x_a.shape
    numbers = torch.empty(3 + full_kl + token_statistics, n, dtype=torch.float32, device=x_a.device)
    flags = torch.empty(1 + token_statistics, n, dtype=torch.bool, device=x_a.device)
    rows = Rows(
        loss=numbers[0],
        ce=numbers[1],
        kl=numbers[2],
        excluded=flags[0],
        full_kl=numbers[3] if full_kl else None,
        entropy=numbers[-1] if token_statistics else None,
        is_top1=flags[1] if token_statistics else None,
    )
    if n == 0:
        return rows
    block = min(_LARGEST_BLOCK, max(_SMALLEST_BLOCK, triton.next_power_of_2(vocabulary)))
    # Triton launches on the current device, which need not be the tensors'.
    with torch.cuda.device_of(x_a):
        _row_kernel[(n,)](
            x_a,
            x_b,
            labels,
            gradient,
            rows.loss,
            rows.ce,
            rows.kl,
            rows.excluded,
            rows.full_kl,
            rows.entropy,
            rows.is_top1,
            x_a.stride(0),
            x_b.stride(0),
            labels.stride(0),
            0 if gradient is None else gradient.stride(0),
            vocabulary,
            float(options.weight),
            float(options.temperature),
            float(options.log_excluded_mass),
            float(transform.scale),
            float(transform.softcap or 1.0),
            float(base_transform.scale),
            float(base_transform.softcap or 1.0),
            DIVERGENCE=options.divergence,
            MASKED=options.mask_target,
            RENORMALIZED=options.renormalize,
            BY_MASS=options.position_weight == "non_target_mass",
            TEMPERED=options.temperature != 1,
            CAPPED=transform.softcap is not None,
            BASE_CAPPED=base_transform.softcap is not None,
            GRADIENT=gradient is not None,
            FULL_KL=full_kl,
            STATISTICS=token_statistics,
            BLOCK=block,
            num_warps=min(32, max(1, block // (_COLUMNS_PER_THREAD * _THREADS_PER_WARP))),
        )
    return rows


@triton.jit
def _row_kernel(
    x_a,
    x_b,
    labels,
    gradient,
    loss_out,
    ce_out,
    kl_out,
    excluded_out,
    full_kl_out,
    entropy_out,
    is_top1_out,
    stride_a,
    stride_b,
    stride_labels,
    stride_gradient,
    vocabulary,
    weight,
    temperature,
    log_excluded_mass,
    scale,
    softcap,
    base_scale,
    base_softcap,
    DIVERGENCE: tl.constexpr,
    MASKED: tl.constexpr,
    RENORMALIZED: tl.constexpr,
    BY_MASS: tl.constexpr,
    TEMPERED: tl.constexpr,
    CAPPED: tl.constexpr,
    BASE_CAPPED: tl.constexpr,
    GRADIENT: tl.constexpr,
    FULL_KL: tl.constexpr,
    STATISTICS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)  # n * V may pass 2^31
    x_a += row * stride_a
    x_b += row * stride_b
    label = tl.load(labels + row * stride_labels)
    has_target = label >= 0
    # The target's logits: -inf without a target, NaN past the vocabulary.
    known = has_target & (label < vocabulary)
    y_a = _logits(tl.load(x_a + label, mask=known, other=0.0), scale, softcap, CAPPED)
    y_b = _logits(tl.load(x_b + label, mask=known, other=0.0), base_scale, base_softcap, BASE_CAPPED)
    missing = tl.where(has_target, float("nan"), -_INFINITY)
    y_a = tl.where(known, y_a, missing)
    y_b = tl.where(known, y_b, missing)

    # First pass, over the non-targets.
    m_a = tl.full((), _LOWEST, tl.float32)
    m_b = tl.full((), _LOWEST, tl.float32)
    zero = tl.full((), 0.0, tl.float32)
    s_a = zero  # sum exp(z_a - m_a)
    s_b = zero
    apart = zero  # sum exp(z_b - m_b) (z_b - z_a)
    spread = zero  # sum exp(z_a - m_a) (z_a - m_a), for the entropy
    t_a = zero  # sum exp((z_a - m_a) / T)
    t_b = zero
    apart_t = zero  # as apart, at temperature T and in the divergence's direction
    for start in range(0, vocabulary, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        z_a = _non_targets(x_a, columns, vocabulary, label, scale, softcap, CAPPED)
        z_b = _non_targets(x_b, columns, vocabulary, label, base_scale, base_softcap, BASE_CAPPED)
        above_a = tl.maximum(m_a, tl.max(z_a, 0))
        above_b = tl.maximum(m_b, tl.max(z_b, 0))
        fall_a = m_a - above_a  # <= 0: by how much the sums so far shrink
        fall_b = m_b - above_b
        m_a = above_a
        m_b = above_b
        e_a = tl.exp(z_a - m_a)
        e_b = tl.exp(z_b - m_b)
        if STATISTICS:
            rescaled = tl.exp(fall_a) * (spread + s_a * fall_a)
            spread = tl.where(s_a > 0, rescaled, 0.0) + tl.sum(tl.where(e_a > 0, e_a * (z_a - m_a), 0.0), 0)
        s_a = s_a * tl.exp(fall_a) + tl.sum(e_a, 0)
        s_b = s_b * tl.exp(fall_b) + tl.sum(e_b, 0)
        apart = _product(tl.exp(fall_b), apart) + tl.sum(_product(e_b, z_b - z_a), 0)
        if TEMPERED:
            e_a = tl.exp((z_a - m_a) / temperature)
            e_b = tl.exp((z_b - m_b) / temperature)
            shrink_a = tl.exp(fall_a / temperature)
            shrink_b = tl.exp(fall_b / temperature)
            t_a = t_a * shrink_a + tl.sum(e_a, 0)
            t_b = t_b * shrink_b + tl.sum(e_b, 0)
            if DIVERGENCE == "forward":
                apart_t = _product(shrink_b, apart_t) + tl.sum(_product(e_b, z_b - z_a), 0)
        else:
            shrink_a = tl.exp(fall_a)
        if DIVERGENCE == "reverse":
            apart_t = _product(shrink_a, apart_t) + tl.sum(_product(e_a, z_a - z_b), 0)
    if not TEMPERED:
        t_a = s_a
        t_b = s_b
        if DIVERGENCE == "forward":
            apart_t = apart

    # At temperature 1: CE, the base's non-target mass, and the full KL, which is the loss of a row without a target.
    log_y_a, log_mass_a = _binary(y_a - m_a - tl.log(s_a))
    log_y_b, log_mass_b = _binary(y_b - m_b - tl.log(s_b))
    mass_a = tl.exp(log_mass_a)
    mass_b = tl.exp(log_mass_b)
    ce = tl.where(has_target, -log_y_a, 0.0)
    whole = _product(mass_b, _masked_kl(apart, s_b, s_a, m_b, m_a, 1.0))
    whole += _binary_kl(log_y_b, log_mass_b, log_y_a, log_mass_a)

    # At temperature T: the same two logarithms, the divergence D, and the sum of g.
    if TEMPERED:
        ly_a, lm_a = _binary((y_a - m_a) / temperature - tl.log(t_a))
        ly_b, lm_b = _binary((y_b - m_b) / temperature - tl.log(t_b))
    else:
        ly_a, lm_a = log_y_a, log_mass_a
        ly_b, lm_b = log_y_b, log_mass_b
    # The compared probabilities are exp((z - m) / T) * part: of the non-targets alone, or of the whole vocabulary.
    if MASKED and RENORMALIZED:
        part_a = _inverse(t_a)
        part_b = _inverse(t_b)
        # log(p_a / p_b) is (u_a - u_b) - offset.
        offset = (m_a - m_b) / temperature + tl.log(t_a) - tl.log(t_b)
    else:
        part_a = _inverse(t_a) * tl.exp(lm_a)
        part_b = _inverse(t_b) * tl.exp(lm_b)
        offset = (m_a - m_b) / temperature
        offset += _log_sum(t_a, (y_a - m_a) / temperature, ly_a, lm_a)
        offset -= _log_sum(t_b, (y_b - m_b) / temperature, ly_b, lm_b)
    if DIVERGENCE == "jsd":
        divergence = zero
        total = zero
        for start in range(0, vocabulary, BLOCK):
            columns = start + tl.arange(0, BLOCK)
            z_a = _non_targets(x_a, columns, vocabulary, label, scale, softcap, CAPPED)
            z_b = _non_targets(x_b, columns, vocabulary, label, base_scale, base_softcap, BASE_CAPPED)
            p_a = tl.exp((z_a - m_a) / temperature) * part_a
            p_b = tl.exp((z_b - m_b) / temperature) * part_b
            ratio = (z_a - z_b) / temperature - offset
            terms = _product(p_a, _LOG_2 - _softplus(-ratio)) / 2
            total += tl.sum(terms, 0)
            divergence += tl.sum(terms + _product(p_b, _LOG_2 - _softplus(ratio)) / 2, 0)
        if not MASKED:
            terms = _product(tl.exp(ly_a), _LOG_2 - _softplus(ly_b - ly_a)) / 2
            total += terms
            divergence += terms + _product(tl.exp(ly_b), _LOG_2 - _softplus(ly_a - ly_b)) / 2
    else:
        if DIVERGENCE == "forward":
            divergence = _masked_kl(apart_t, t_b, t_a, m_b, m_a, temperature)
            log_from, log_to = lm_b, lm_a
        else:
            divergence = _masked_kl(apart_t, t_a, t_b, m_a, m_b, temperature)
            log_from, log_to = lm_a, lm_b
        compared = zero + 1.0  # the first distribution's mass at the compared tokens
        if not MASKED:
            divergence = _product(tl.exp(log_from), divergence)
            if DIVERGENCE == "forward":
                divergence += _binary_kl(ly_b, lm_b, ly_a, lm_a)
            else:
                divergence += _binary_kl(ly_a, lm_a, ly_b, lm_b)
        elif not RENORMALIZED:
            compared = tl.exp(log_from)
            divergence = _product(compared, divergence + log_from - log_to)
        # Less the 1 of g = p_a (log(p_a / p_b) + 1), which is taken out of both.
        total = -compared if DIVERGENCE == "forward" else divergence + compared - 1

    excluded = has_target & (log_mass_b < log_excluded_mass)
    share = tl.where(excluded, 0.0, 1.0)  # of the row's divergence in its KL
    if MASKED:
        share = tl.where(log_mass_b == -_INFINITY, 0.0, share)  # nothing but the target: nothing to keep
    if BY_MASS:
        share *= mass_b
    kl = _product(share, divergence * temperature * temperature)
    kl = tl.where(has_target, kl, whole)
    tl.store(ce_out + row, ce)
    tl.store(kl_out + row, kl)
    tl.store(loss_out + row, tl.where(has_target, ce + weight * kl, whole))
    tl.store(excluded_out + row, excluded)
    if FULL_KL:
        tl.store(full_kl_out + row, whole)
    if STATISTICS:
        entropy = _product(mass_a, tl.log(s_a) - spread / s_a - log_mass_a) - _product(tl.exp(log_y_a), log_y_a)
        tl.store(entropy_out + row, entropy)
        tl.store(is_top1_out + row, has_target & (y_a >= m_a))

    if GRADIENT:
        gradient += row * stride_gradient
        factor = weight * share * temperature  # of dD/du in d loss / dz: T^2 times the 1/T of u = z / T
        ce_part = _inverse(s_a) * mass_a  # p_a(c) is exp(z_a - m_a) * ce_part
        p_y = tl.exp(ly_a)
        if not MASKED:
            if DIVERGENCE == "forward":
                # p_a(y) - p_b(y), from the smaller of the probabilities and their complements.
                slope_y = tl.where(ly_a > lm_a, tl.exp(lm_b) - tl.exp(lm_a), p_y - tl.exp(ly_b))
            elif DIVERGENCE == "reverse":
                slope_y = _product(p_y, ly_a - ly_b - total)
            else:
                slope_y = _product(p_y, (_LOG_2 - _softplus(ly_b - ly_a)) / 2 - total)
        elif not RENORMALIZED:
            # p_a is over the whole vocabulary, so the target moves it too.
            slope_y = -_product(p_y, total + 1 if DIVERGENCE == "reverse" else total)
        else:
            slope_y = zero
        slope_y = _product(factor, slope_y) - mass_a

        # A row without a target gets p_a - p_b, whatever the options. It and the forward KL at temperature 1 are sums
        # of two exponentials; the other options take a loop of their own.
        if DIVERGENCE == "forward" and not TEMPERED:
            of_a = tl.where(has_target, ce_part - factor * part_a * total, _inverse(s_a))
            of_b = tl.where(has_target, factor * part_b, _inverse(s_b))
            plain = True
        else:
            of_a = _inverse(s_a)
            of_b = _inverse(s_b)
            plain = label < 0
        if plain:
            for start in range(0, vocabulary, BLOCK):
                columns = start + tl.arange(0, BLOCK)
                inside = columns < vocabulary
                x = tl.load(x_a + columns, mask=inside, other=0.0)
                z_a = _logits(x, scale, softcap, CAPPED)
                z_b = _non_targets(x_b, columns, vocabulary, label, base_scale, base_softcap, BASE_CAPPED)
                slope = tl.exp(z_a - m_a) * of_a - tl.exp(z_b - m_b) * of_b
                slope = tl.where(columns == label, slope_y, slope) * _derivative(x, scale, softcap, CAPPED)
                tl.store(gradient + columns, slope.to(gradient.dtype.element_ty), mask=inside)
        else:
            for start in range(0, vocabulary, BLOCK):
                columns = start + tl.arange(0, BLOCK)
                inside = columns < vocabulary
                x = tl.load(x_a + columns, mask=inside, other=0.0)
                z_a = _logits(x, scale, softcap, CAPPED)
                z_b = _non_targets(x_b, columns, vocabulary, label, base_scale, base_softcap, BASE_CAPPED)
                p_a = tl.exp((z_a - m_a) / temperature) * part_a
                if DIVERGENCE == "forward":
                    slope = -tl.exp((z_b - m_b) / temperature) * part_b - p_a * total
                else:
                    ratio = (z_a - z_b) / temperature - offset
                    if DIVERGENCE == "reverse":
                        slope = _product(p_a, ratio - total)
                    else:
                        slope = _product(p_a, (_LOG_2 - _softplus(-ratio)) / 2 - total)
                # A row of no weight may hold NaN (no non-target), which 0 would not erase.
                slope = tl.exp(z_a - m_a) * ce_part + tl.where(factor > 0, factor * slope, 0.0)
                slope = tl.where(columns == label, slope_y, slope) * _derivative(x, scale, softcap, CAPPED)
                tl.store(gradient + columns, slope.to(gradient.dtype.element_ty), mask=inside)


@triton.jit
def _logits(x, scale, softcap, CAPPED: tl.constexpr):
    """``softcap * tanh(scale * x / softcap)``, or ``scale * x``, in float32."""
    z = x.to(tl.float32) * scale
    if CAPPED:
        # tanh as in Cephes: a polynomial near 0, where 1 - exp would cancel. libdevice's is not in the interpreter.
        t = z / softcap
        e = tl.exp(-2.0 * tl.abs(t))
        far = tl.where(t < 0, -1.0, 1.0) * ((1.0 - e) / (1.0 + e))
        q = t * t
        p = (((-5.70498872745e-3 * q + 2.06390887954e-2) * q - 5.37397155531e-2) * q + 1.33314422036e-1) * q
        near = t + t * q * (p - 3.33332819422e-1)
        z = softcap * tl.where(tl.abs(t) < 0.625, near, far)
    return z


@triton.jit
def _derivative(x, scale, softcap, CAPPED: tl.constexpr):
    """Of the logit in ``x``; ``1 - tanh^2 = 4 e / (1 + e)^2`` does not cancel where the soft cap is reached."""
    if CAPPED:
        e = tl.exp(-2.0 * tl.abs(x.to(tl.float32) * scale / softcap))
        return scale * (4.0 * e / ((1.0 + e) * (1.0 + e)))
    else:
        return scale


@triton.jit
def _non_targets(x, columns, vocabulary, label, scale, softcap, CAPPED: tl.constexpr):
    """Logits of a row's block in float32, -inf at the target and past the vocabulary."""
    z = _logits(tl.load(x + columns, mask=columns < vocabulary, other=0.0), scale, softcap, CAPPED)
    return tl.where((columns < vocabulary) & (columns != label), z, -_INFINITY)


@triton.jit
def _softplus(x):
    """``log(1 + exp(x))``, relatively exact also where it is tiny."""
    e = tl.exp(-tl.abs(x))
    u = 1.0 + e
    rest = u - 1.0  # log1p(e) = log(u) e / (u - 1) cancels the rounding of u
    return tl.maximum(x, 0.0) + tl.where(rest > 0, tl.log(u) * e / tl.where(rest > 0, rest, 1.0), e)


@triton.jit
def _binary(d):
    """``log p(y)`` and ``log(1 - p(y))`` from the target's log-odds."""
    return -_softplus(-d), -_softplus(d)


@triton.jit
def _log_sum(t, y, log_y, log_mass):
    """``log(t + exp(y))``, also where ``t`` or ``exp(y)`` is 0."""
    return tl.where(log_y > log_mass, y - log_y, tl.log(t) - log_mass)


@triton.jit
def _product(p, factor):
    """``p * factor`` with ``0 * anything = 0``."""
    return tl.where(p > 0, p * factor, 0.0)


@triton.jit
def _inverse(s):
    """``1 / s``, and 0 where no token is left."""
    return tl.where(s > 0, 1.0 / s, 0.0)


@triton.jit
def _masked_kl(apart, s_p, s_q, m_p, m_q, temperature):
    """KL(p, q) of the non-targets, in nats: ``apart`` is the sum of ``exp((z_p - m_p) / T) (z_p - z_q)``."""
    kl = (apart / s_p - (m_p - m_q)) / temperature + tl.log(s_q / s_p)
    kl = tl.where(s_q > 0, kl, _INFINITY)
    return tl.where(s_p > 0, kl, 0.0)


@triton.jit
def _binary_kl(log_y_p, log_mass_p, log_y_q, log_mass_q):
    """KL(p, q) of (the target, not the target)."""
    y = _product(tl.exp(log_y_p), log_y_p - log_y_q)
    return y + _product(tl.exp(log_mass_p), log_mass_p - log_mass_q)
