"""The objective from hidden states and a head's weight: no ``[N, V]`` tensor of either model at any moment.

Token chunks; each chunk's logits live until its gradient in the hidden states is taken, inside the forward. A frozen
head gets no gradient, so the work is three products: adapted logits, base logits and dX, ``6 N d V`` operations.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, library

from mask_the_target import rows_torch
from mask_the_target.head import Head, LogitTransform
from mask_the_target.objective import (
    CONTEXT_INDEX,
    IGNORE_INDEX,
    TMKL,
    Divergence,
    PositionWeight,
    TMKLResult,
    check_labels,
    check_rows,
    reduce_rows,
)
from mask_the_target.rows_torch import Rows, VocabularyShard, join_rows
from mask_the_target.sharding import is_distributed

# One model's logits of a chunk. On a CPU both models' together are 32 MiB, the most that glibc gives from memory that
# it holds already: 0.97 of the three products alone, against 1.03 to 1.17 with 2 to 4 times as much, whose pages are
# new each time (1024 x 576 x 49152, AMD EPYC, 2 threads).
_CHUNK_BYTES = {"cpu": 2**24}
_CHUNK_BYTES_ELSEWHERE = 2**28
# Fewer rows than this make a slow product, whatever the memory: 1.71 with 16 rows, 1.05 with 64, 0.89 with 128 of a
# vocabulary of 262,144.
_FEWEST_ROWS = 96


def linear_target_masked_kl(
    hidden: Tensor,
    base_hidden: Tensor,
    head_weight: Tensor,
    labels: Tensor,
    options: TMKL = TMKL(),
    *,
    head_bias: Tensor | None = None,
    logit_transform: LogitTransform | None = None,
    base_head: Head | None = None,
    num_items: int | float | Tensor | None = None,
    num_context: int | float | Tensor | None = None,
    token_weights: Tensor | None = None,
    chunk_tokens: int | None = None,
    logits_dtype: torch.dtype | None = None,
) -> TMKLResult:
    """CE + weight * target-masked KL from final hidden states: :func:`~mask_the_target.target_masked_kl`, fused.

    Args:
        hidden: adapted model's final hidden states, ``[N, d]``, row ``i`` predicting ``labels[i]``.
        base_hidden: base model's, ``[N, d_b]``; no gradient flows into them.
        head_weight: ``[V, d]``. Its gradient is computed only when it requires one. A DTensor whose vocabulary is
            sharded (tensor parallelism) is never gathered: each rank makes the logits of its part, with the same rows
            and labels, and only statistics of rows and ``[N, d]`` gradients are reduced.
        labels: ``[N]`` int64; rows with -100 are never multiplied with the head. Rows with -1 (only with
            ``context_weight``) are context rows.
        options: see :class:`~mask_the_target.TMKL`.
        head_bias: ``[V]``, where the head has one.
        logit_transform: soft cap and scale between head and softmax.
        base_head: the base's own head (weight, bias, transform) where it isn't the adapted model's, as with a separate
            base model. By default both share one head, and ``d_b = d``.
        num_items: the denominator in tokens; the supervised rows by default.
        num_context: the same of context rows.
        token_weights: ``[N]``, a factor of each row's CE and KL; 1 by default. It needs a frozen head.
        chunk_tokens: rows of logits alive at a time. The default keeps one model's at 16 MiB on a CPU, 256 MiB
            elsewhere, but at 96 rows at least.
        logits_dtype: ``torch.bfloat16`` or ``torch.float16`` to round the logits of inputs of that dtype: half the
            memory, but a floor under small KLs (about 1e-5 nats at a peak logit of 20). Float32 by default.

    Returns:
        A :class:`~mask_the_target.objective.TMKLResult`. Statistics are float32 whatever the inputs' dtype (float64 for
        float64); bfloat16 and float16 products are accumulated into float32 logits.

    Raises:
        ValueError: if shapes don't match, a label lies outside the vocabulary (checked where that needs no device
            sync: on the CPU), ``chunk_tokens < 1``, ``logits_dtype`` is not the inputs', or a head is a DTensor in
            another layout than the other head's.
    """
    check_rows("hidden", hidden, "base_hidden", base_hidden, labels)
    head = Head(head_weight, head_bias, logit_transform or LogitTransform())
    _check_head("head_weight", head, "hidden", hidden)
    _check_head("base_head" if base_head else "head_weight", base_head or head, "base_hidden", base_hidden)
    if logits_dtype not in (None, torch.float32, hidden.dtype):
        raise ValueError(
            f"logits_dtype={logits_dtype} doesn't go with hidden states in {hidden.dtype}: logits are float32, or "
            "rounded to the inputs' own dtype."
        )
    if labels.device.type == "cpu" and not torch.compiler.is_compiling():
        check_labels(labels, vocabulary=head_weight.shape[0], context=options.context_weight > 0)

    def compute(labels: Tensor) -> Rows:
        return linear_rows(
            hidden,
            base_hidden,
            head,
            labels,
            options,
            base_head=base_head,
            chunk_tokens=chunk_tokens,
            logits_dtype=logits_dtype,
            skip_ignored=True,
        )

    rows = compute(labels if not options.context_weight else labels.masked_fill(labels == CONTEXT_INDEX, IGNORE_INDEX))
    # Apart, because their losses have another factor than the rest's, and a trainable head takes one factor a call.
    context_kl = None
    if options.context_weight:
        context_kl = compute(labels.masked_fill(labels != CONTEXT_INDEX, IGNORE_INDEX)).loss
    row_loss, ce, kl = rows.loss, rows.ce, rows.kl
    if token_weights is not None:
        row_loss, ce, kl = row_loss * token_weights, ce * token_weights, kl * token_weights
        context_kl = None if context_kl is None else context_kl * token_weights
    return reduce_rows(row_loss, ce, kl, rows.excluded, labels, options, num_items, context_kl, num_context)


def linear_rows(
    hidden: Tensor,
    base_hidden: Tensor,
    head: Head,
    labels: Tensor,
    options: TMKL,
    *,
    base_head: Head | None = None,
    chunk_tokens: int | None = None,
    logits_dtype: torch.dtype | None = None,
    full_kl: bool = False,
    token_statistics: bool = False,
    skip_ignored: bool = False,
) -> Rows:
    """Per-row results, ``[N]``; ``.loss`` is differentiable row by row, so rows may be weighted one by one.

    A row with a negative label has no target, see :class:`~mask_the_target.rows_torch.Rows`; with ``skip_ignored``,
    rows with -100 are left out of all products and their results are 0. A trainable head needs every row's gradient to
    be the same (a sum over the rows), since its gradient is summed in the forward; this is checked in the backward.
    """
    if chunk_tokens is None:
        chunk_tokens = 0
    elif chunk_tokens < 1:
        raise ValueError(f"chunk_tokens={chunk_tokens} must be at least 1: the rows of logits computed at a time.")
    with_graph = torch.is_grad_enabled()
    weight, bias, shard = _own_part(head)
    base_weight, base_bias, base_shard = (None, None, shard) if base_head is None else _own_part(base_head)
    if base_shard != shard:
        raise ValueError(
            "the adapted model's head and the base's are not sharded over the vocabulary in the same way. Load both "
            "with the same tensor parallelism."
        )
    if hidden.device.type != "cpu" and torch.is_autocast_enabled(hidden.device.type):
        # What autocast does at the model's own head. On CPUs the products are float32 anyway, and exact.
        dtype = torch.get_autocast_dtype(hidden.device.type)
        hidden, weight = hidden.to(dtype), weight.to(dtype)
    outputs = _linear_rows(
        hidden,
        weight,
        bias,
        base_hidden,
        base_weight,
        base_bias,
        labels,
        *_numbers(head.transform),
        *_numbers((base_head or head).transform),
        options.weight,
        options.divergence,
        options.mask_target,
        options.renormalize,
        options.position_weight,
        options.temperature,
        options.exclude_base_above,
        chunk_tokens,
        logits_dtype in (torch.bfloat16, torch.float16),
        *(shard or (0, 0, None)),
        full_kl,
        token_statistics,
        skip_ignored,
        with_graph and hidden.requires_grad,
        with_graph and weight.requires_grad,
        with_graph and bias is not None and bias.requires_grad,
    )
    loss, ce, kl, excluded, full, entropy, is_top1 = outputs[:7]
    return Rows(
        loss,
        ce.detach(),
        kl.detach(),
        excluded,
        full.detach() if full_kl else None,
        entropy.detach() if token_statistics else None,
        is_top1 if token_statistics else None,
    )


def _own_part(head: Head) -> tuple[Tensor, Tensor | None, VocabularyShard | None]:
    """Weight and bias as this process has them, and which part of the vocabulary that is: None for all of it."""
    weight, bias = head.weight, head.bias
    if not is_distributed(weight):
        return weight, bias, None
    from torch.distributed.tensor import DTensor, Shard

    assert isinstance(weight, DTensor)
    if tuple(weight.placements) != (Shard(0),):
        raise ValueError(
            f"the head's weight is a DTensor with placements {list(weight.placements)}; only one whose vocabulary is "
            "sharded over one dimension of the mesh, [Shard(0)], is supported."
        )
    mesh = weight.device_mesh
    size = -(-len(weight) // mesh.size())
    own = weight.to_local()
    if len(weight) <= size * (mesh.size() - 1):
        raise ValueError(
            f"a vocabulary of {len(weight)} tokens over {mesh.size()} processes leaves one of them without a token; "
            "use fewer processes."
        )
    part = VocabularyShard(mesh.get_local_rank() * size, size, mesh.get_group().group_name)
    return own, bias.to_local() if isinstance(bias, DTensor) else bias, part


def _numbers(transform: LogitTransform) -> tuple[float, float | None]:
    return float(transform.scale), None if transform.softcap is None else float(transform.softcap)


# One operator to torch.compile, which traces through it without a graph break: chunks, buffers, the choice of kernels
# and the compaction of ignored rows (whose number the device alone knows) are its own business.
@library.custom_op("mask_the_target::linear_rows", mutates_args=())
def _linear_rows(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    base_hidden: Tensor,
    base_weight: Tensor | None,
    base_bias: Tensor | None,
    labels: Tensor,
    scale: float,
    softcap: float | None,
    base_scale: float,
    base_softcap: float | None,
    kl_weight: float,
    divergence: str,
    mask_target: bool,
    renormalize: bool,
    position_weight: str,
    temperature: float,
    exclude_base_above: float | None,
    chunk_tokens: int,
    rounded_logits: bool,
    shard_first: int,
    shard_size: int,
    shard_group: str | None,
    full_kl: bool,
    token_statistics: bool,
    skip_ignored: bool,
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The seven columns of :class:`Rows`, and d loss / d hidden, weight and bias summed over rows; empty if not asked.

    Written with ``options`` spelled out, as operators take numbers and strings only.
    """
    options = TMKL(
        kl_weight,
        cast(Divergence, divergence),
        mask_target,
        renormalize,
        cast(PositionWeight, position_weight),
        temperature,
        exclude_base_above,
    )
    shard = None if shard_group is None else VocabularyShard(shard_first, shard_size, shard_group)
    positions, kept = len(labels), None
    if skip_ignored:
        kept = (labels != IGNORE_INDEX).nonzero().squeeze(1)  # [n]
        if len(kept) == positions:
            kept = None
        else:
            hidden, base_hidden, labels = hidden[kept], base_hidden[kept], labels[kept]
    statistics = torch.promote_types(torch.promote_types(hidden.dtype, weight.dtype), torch.float32)
    product = hidden.dtype if hidden.dtype == weight.dtype and hidden.device.type != "cpu" else statistics
    # A CPU without bfloat16 units is a hundred times slower at bfloat16 products than at float32's, and one with them
    # reaches them through float32 as well (_matrix_units). One copy of the weight a call; float32 weights need none.
    own, other = weight.to(product), None if base_weight is None else base_weight.to(product)
    logits_dtype = hidden.dtype if rounded_logits else statistics
    gradient_dtype = product if logits_dtype == statistics else logits_dtype
    d_hidden = torch.empty(len(labels), hidden.shape[1] if need_hidden else 0, dtype=hidden.dtype, device=hidden.device)
    d_weight = torch.zeros(weight.shape if need_weight else (0,), dtype=statistics, device=hidden.device)
    d_bias = torch.zeros(len(weight) if need_bias else 0, dtype=statistics, device=hidden.device)
    with_gradient = need_hidden or need_weight or need_bias
    columns = len(weight) if shard is None else shard.size  # the same on each process, for the same chunks
    chunk_tokens = chunk_tokens or rows_of_chunk(hidden.device.type, logits_dtype.itemsize, columns)
    blocks: list[Rows] = []
    compute_rows = row_kernel(hidden.device.type)
    if shard is not None:
        compute_rows = functools.partial(rows_torch.compute_rows, shard=shard)
    # Autocast would send the products to bfloat16 logits; their dtype is chosen here.
    with torch.autocast(hidden.device.type, enabled=False), _matrix_units(hidden.dtype, weight.dtype):
        # One pass over an empty batch, so that the results have their dtype.
        for start in range(0, max(1, len(labels)), chunk_tokens):
            chunk = slice(start, start + chunk_tokens)
            count = len(labels[chunk])
            # [c, d] each; a cache may hold the base's in a narrower dtype
            h_a, h_b = hidden[chunk].to(product), base_hidden[chunk].to(product)
            if other is None:  # one product: the weight is read once for both models
                x = _logits(torch.cat([h_a, h_b]), own, bias, logits_dtype)  # [2c, V]
                x_a, x_b = x[:count], x[count:]
                del x
            else:
                x_a, x_b = _logits(h_a, own, bias, logits_dtype), _logits(h_b, other, base_bias, logits_dtype)
            in_place = x_a.dtype == gradient_dtype
            gradient = None if not with_gradient else x_a if in_place else torch.empty_like(x_a, dtype=gradient_dtype)
            blocks.append(
                compute_rows(
                    x_a,
                    x_b,
                    labels[chunk],
                    options,
                    transform=LogitTransform(scale, softcap),
                    base_transform=LogitTransform(base_scale, base_softcap),
                    gradient=gradient,
                    full_kl=full_kl,
                    token_statistics=token_statistics,
                )
            )
            if gradient is None:
                continue
            if need_hidden:
                d_hidden[chunk] = gradient.to(own.dtype) @ own
            if need_weight:
                d_weight.addmm_(gradient.t().to(statistics), h_a.to(statistics))
            if need_bias:
                d_bias += gradient.sum(0, dtype=statistics)
            del x_a, x_b, gradient  # freed before the next chunk's are made
    if shard is not None and need_hidden:
        d_hidden = shard.reduced(d_hidden, "sum")
    empty = torch.empty(0, dtype=statistics, device=hidden.device)
    results = [empty.clone() if column is None else column for column in join_rows(blocks)]
    if kept is not None:
        wanted = [True] * 4 + [full_kl, token_statistics, token_statistics]
        results = [
            _spread(column, kept, positions) if asked else column for column, asked in zip(results, wanted, strict=True)
        ]
        d_hidden = _spread(d_hidden, kept, positions) if need_hidden else d_hidden
    return (*results, d_hidden, d_weight, d_bias)  # type: ignore[return-value]


@_linear_rows.register_fake
def _(hidden: Tensor, weight: Tensor, bias: Tensor | None, base_hidden: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    labels, flags = rest[2], rest[-6:]
    full_kl, token_statistics, _, need_hidden, need_weight, need_bias = flags
    statistics = torch.promote_types(torch.promote_types(hidden.dtype, weight.dtype), torch.float32)
    n = labels.shape[0]

    def column(wanted: bool = True, dtype: torch.dtype = statistics) -> Tensor:
        return hidden.new_empty(n if wanted else 0, dtype=dtype)

    return (
        column(),
        column(),
        column(),
        column(dtype=torch.bool),
        column(full_kl),
        column(token_statistics),
        column(token_statistics, torch.bool if token_statistics else statistics),
        hidden.new_empty(n, hidden.shape[1] if need_hidden else 0),
        hidden.new_empty(weight.shape if need_weight else (0,), dtype=statistics),
        hidden.new_empty(weight.shape[0] if need_bias else 0, dtype=statistics),
    )


def _keep_gradients(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*output[7:])
    weight, bias = inputs[1], inputs[2]
    ctx.needed = inputs[-3:]
    ctx.dtypes = (weight.dtype, None if bias is None else bias.dtype)
    ctx.arguments = len(inputs)


def _backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
    d_hidden, d_weight, d_bias = ctx.saved_tensors
    need_hidden, need_weight, need_bias = ctx.needed
    nothing = [None] * (ctx.arguments - 3)
    row = gradients[0]  # [n]: the factor of each row's loss
    if row is None:
        return (None, None, None, *nothing)
    # A fresh tensor: callers may write into it.
    d_hidden = (d_hidden * row[:, None]).to(d_hidden.dtype) if need_hidden else None
    if need_weight or need_bias:
        factor = one_factor(row)
        d_weight = (d_weight * factor).to(ctx.dtypes[0]) if need_weight else None
        d_bias = (d_bias * factor).to(ctx.dtypes[1]) if need_bias else None
    return (d_hidden, d_weight if need_weight else None, d_bias if need_bias else None, *nothing)


_linear_rows.register_autograd(_backward, setup_context=_keep_gradients)


def one_factor(row: Tensor) -> Tensor:
    """The factor that all rows share, a scalar; 0 for an empty batch. Raises ValueError where they differ."""
    factor = row[:1].sum()
    if not torch.equal(row, factor.expand_as(row)):
        raise ValueError(
            "the rows' losses were weighted one by one, which needs a frozen head: a trainable head's gradient "
            "is summed over the rows in the forward. Freeze the head, or reduce the rows by a plain sum."
        )
    return factor


def rows_of_chunk(device: str, itemsize: int, vocabulary: int) -> int:
    """Rows of logits, of ``itemsize`` bytes each, that are alive at a time."""
    return max(_FEWEST_ROWS, _CHUNK_BYTES.get(device, _CHUNK_BYTES_ELSEWHERE) // itemsize // vocabulary)


@functools.cache
def row_kernel(device: str) -> Callable[..., Rows]:
    """Triton's on GPUs that have it, else PyTorch's."""
    if device == "cuda" and importlib.util.find_spec("triton") is not None:
        from mask_the_target import rows_triton

        return rows_triton.compute_rows
    return rows_torch.compute_rows


@contextmanager
def _matrix_units(*dtypes: torch.dtype) -> Iterator[None]:
    """On CPUs with AVX512_BF16 or AMX, float32 products of bfloat16 numbers run on them: exact inputs, float32 out.

    Before torch 2.9 there is no such setting, and they take their time.
    """
    units = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    settings: Any = getattr(torch.backends.mkldnn, "matmul", None)
    if settings is None or not units or any(dtype != torch.bfloat16 for dtype in dtypes):
        yield
        return
    before = settings.fp32_precision
    settings.fp32_precision = "bf16"
    try:
        yield
    finally:
        settings.fp32_precision = before


def _logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """``hidden @ weight.T + bias`` in ``dtype``: ``[c, d], [V, d], [V] -> [c, V]``.

    Logits rounded to bfloat16 would put a floor under small KLs (2e-6 nats measured as 9e-6 at a peak logit of 20), so
    the product of two bfloat16 tensors is taken out in float32.
    """
    if hidden.device.type == "cpu" and hidden.dtype == torch.float32 and torch.backends.mkldnn.is_available():
        # oneDNN's product is 1.1 to 1.5 times as fast as BLAS's at these shapes (AMD EPYC, AVX2, 32 to 256 rows).
        bias = None if bias is None else bias.to(hidden.dtype)
        return torch.ops.mkldnn._linear_pointwise(hidden, weight, bias, "none", [], "").to(dtype)
    if hidden.dtype == dtype or hidden.device.type not in ("cuda", "xpu"):
        return F.linear(hidden, weight, None if bias is None else bias.to(hidden.dtype)).to(dtype)
    logits = torch.mm(hidden, weight.t(), out_dtype=dtype)
    return logits if bias is None else logits.add_(bias)


def _spread(values: Tensor, index: Tensor, length: int) -> Tensor:
    """``values [n, ..]`` at ``index [n]`` of zeros ``[length, ..]``."""
    return values.new_zeros(length, *values.shape[1:]).index_copy_(0, index, values)


def _check_head(name: str, head: Head, hidden_name: str, hidden: Tensor) -> None:
    weight, bias = head.weight, head.bias
    if weight.dim() != 2 or weight.shape[1] != hidden.shape[1]:
        raise ValueError(
            f"{name} {list(weight.shape)} must be [vocabulary, {hidden.shape[1]}] to fit {hidden_name} "
            f"{list(hidden.shape)}."
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"the bias {list(bias.shape)} must be [{weight.shape[0]}] to fit {name} {list(weight.shape)}.")
