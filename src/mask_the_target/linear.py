"""The objective from hidden states and a head's weight: no ``[N, V]`` tensor of either model at any moment.

Token chunks; each chunk's logits live until its gradient in the hidden states is taken, inside the forward. A frozen
head gets no gradient, so the work is three products: adapted logits, base logits and dX, ``6 N d V`` operations.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from mask_the_target.head import Head, LogitTransform
from mask_the_target.objective import (
    IGNORE_INDEX,
    TMKL,
    TMKLResult,
    check_labels,
    check_rows,
    reduce_rows,
)
from mask_the_target.rows_torch import Rows, compute_rows

# One float32 buffer of a chunk's logits is 8 MiB; three are alive at the peak, about ten with other options than the
# default's. Smaller chunks are as fast on a CPU, whose cache they stay closer to.
_CHUNK_ELEMENTS = 2**21
# Rows of a bfloat16 head that are converted to float32 at a time on devices without a mixed-precision product.
_HEAD_BLOCK = 8192


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
    chunk_tokens: int | None = None,
) -> TMKLResult:
    """CE + weight * target-masked KL from final hidden states: :func:`~mask_the_target.target_masked_kl`, fused.

    Args:
        hidden: adapted model's final hidden states, ``[N, d]``, row ``i`` predicting ``labels[i]``.
        base_hidden: base model's, ``[N, d_b]``; no gradient flows into them.
        head_weight: ``[V, d]``. Its gradient is computed only when it requires one.
        labels: ``[N]`` int64; rows with -100 are never multiplied with the head.
        options: see :class:`~mask_the_target.TMKL`.
        head_bias: ``[V]``, where the head has one.
        logit_transform: soft cap and scale between head and softmax.
        base_head: the base's own head (weight, bias, transform) where it isn't the adapted model's, as with a separate
            base model. By default both share one head, and ``d_b = d``.
        num_items: the denominator in tokens; the supervised rows by default.
        chunk_tokens: rows of logits alive at a time. The default keeps one float32 buffer of them at 8 MiB.

    Returns:
        :class:`~mask_the_target.objective.TMKLResult`. Statistics are float32 whatever the inputs' dtype (float64 for
        float64); bfloat16 and float16 products are accumulated into float32 logits.

    Raises:
        ValueError: if shapes don't match, a label lies outside the vocabulary (checked where that needs no device
            sync: on the CPU), or ``chunk_tokens < 1``.
    """
    check_rows("hidden", hidden, "base_hidden", base_hidden, labels)
    head = Head(head_weight, head_bias, logit_transform or LogitTransform())
    _check_head("head_weight", head, "hidden", hidden)
    _check_head("base_head" if base_head else "head_weight", base_head or head, "base_hidden", base_hidden)
    if labels.device.type == "cpu":
        check_labels(labels, vocabulary=head_weight.shape[0])
    rows = (labels != IGNORE_INDEX).nonzero().squeeze(1)  # [n]
    result = linear_rows(
        hidden[rows],
        base_hidden[rows],
        head,
        labels[rows],
        options,
        base_head=base_head,
        chunk_tokens=chunk_tokens,
    )
    return reduce_rows(result.loss, result.ce, result.kl, result.excluded, num_items)


def linear_rows(
    hidden: Tensor,
    base_hidden: Tensor,
    head: Head,
    labels: Tensor,
    options: TMKL,
    *,
    base_head: Head | None = None,
    chunk_tokens: int | None = None,
    full_kl: bool = False,
    token_statistics: bool = False,
) -> Rows:
    """Per-row results for supervised rows only; ``.loss`` is differentiable row by row.

    A trainable head needs every row's gradient to be the same (a sum over the rows), since its gradient is summed in
    the forward; this is checked in the backward.
    """
    if chunk_tokens is None:
        chunk_tokens = max(1, _CHUNK_ELEMENTS // head.weight.shape[0])
    elif chunk_tokens < 1:
        raise ValueError(f"chunk_tokens={chunk_tokens} must be at least 1: the rows of logits computed at a time.")
    work = _Work(head.transform, base_head or head, options, chunk_tokens, full_kl, token_statistics)
    loss, *statistics = _LinearRows.apply(hidden, head.weight, head.bias, base_hidden, labels, work)
    return Rows(loss, *statistics)


@dataclass(frozen=True)
class _Work:
    """The arguments of one call that are not differentiable tensors."""

    transform: LogitTransform
    base_head: Head
    options: TMKL
    chunk_tokens: int
    full_kl: bool
    token_statistics: bool


class _LinearRows(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        base_hidden: Tensor,
        labels: Tensor,
        work: _Work,
    ) -> tuple[Tensor | None, ...]:
        need_hidden, need_weight, need_bias = ctx.needs_input_grad[:3]
        with_gradient = need_hidden or need_weight or need_bias
        dtype = _logits_dtype(hidden, weight)
        d_hidden = torch.empty_like(hidden, memory_format=torch.contiguous_format) if need_hidden else None
        d_weight = torch.zeros_like(weight, dtype=dtype) if need_weight else None
        d_bias = torch.zeros_like(bias, dtype=dtype) if need_bias and bias is not None else None
        blocks: list[Rows] = []
        chunk_tokens = max(1, min(work.chunk_tokens, len(labels)))
        buffers = torch.empty(3, chunk_tokens, weight.shape[0], dtype=dtype, device=hidden.device)
        # Autocast would send the products below to bfloat16 logits; their dtype is chosen here.
        with torch.autocast(hidden.device.type, enabled=False):
            # One pass over an empty batch, so that the results have their dtype and the graph its node.
            for start in range(0, max(1, len(labels)), chunk_tokens):
                chunk = slice(start, start + chunk_tokens)
                z_a, z_b, scratch = buffers[:, : len(labels[chunk])]  # [c, V] each
                work.transform(_logits(hidden[chunk], weight, bias, z_a))
                base = work.base_head
                base.transform(_logits(base_hidden[chunk], base.weight, base.bias, z_b))
                derivative = work.transform.derivative(z_a) if with_gradient else None
                blocks.append(
                    compute_rows(
                        z_a,
                        z_b,
                        labels[chunk],
                        work.options,
                        scratch=scratch,
                        with_gradient=with_gradient,
                        full_kl=work.full_kl,
                        token_statistics=work.token_statistics,
                    )
                )
                if not with_gradient:
                    continue
                d_logits = z_a if derivative is None else z_a.mul_(derivative)  # [c, V]
                if d_hidden is not None:
                    product_dtype = torch.promote_types(hidden.dtype, weight.dtype)
                    d_hidden[chunk] = (d_logits.to(product_dtype) @ weight.to(product_dtype)).to(hidden.dtype)
                if d_weight is not None:
                    d_weight.addmm_(d_logits.t(), hidden[chunk].to(dtype))
                if d_bias is not None:
                    d_bias += d_logits.sum(0)
        ctx.save_for_backward(d_hidden, d_weight, d_bias)
        ctx.dtypes = (weight.dtype, None if bias is None else bias.dtype)
        outputs = tuple(_concatenate([getattr(block, field.name) for block in blocks]) for field in fields(Rows))
        ctx.mark_non_differentiable(*(output for output in outputs[1:] if output is not None))
        return outputs

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        d_hidden, d_weight, d_bias = ctx.saved_tensors
        row = gradients[0]  # [n]: the factor of each row's loss
        assert row is not None
        if d_hidden is not None:
            d_hidden = (d_hidden * row[:, None]).to(d_hidden.dtype)  # a fresh tensor: callers may write into it
        if d_weight is not None or d_bias is not None:
            factor = row[:1].sum()  # 0 for an empty batch
            if not torch.equal(row, factor.expand_as(row)):
                raise ValueError(
                    "the rows' losses were weighted one by one, which needs a frozen head: a trainable head's gradient "
                    "is summed over the rows in the forward. Freeze the head, or reduce the rows by a plain sum."
                )
            weight_dtype, bias_dtype = ctx.dtypes
            d_weight = None if d_weight is None else (d_weight * factor).to(weight_dtype)
            d_bias = None if d_bias is None else (d_bias * factor).to(bias_dtype)
        return d_hidden, d_weight, d_bias, None, None, None


def _logits_dtype(hidden: Tensor, weight: Tensor) -> torch.dtype:
    return torch.promote_types(torch.promote_types(hidden.dtype, weight.dtype), torch.float32)


def _logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> Tensor:
    """``hidden @ weight.T + bias`` into ``out``, float32 or better: ``[c, d], [V, d], [V] -> [c, V]``.

    Logits rounded to bfloat16 would put a floor under small KLs (2e-6 nats measured as 9e-6 at a peak logit of 20), so
    the product of two bfloat16 tensors is taken out in float32.
    """
    if hidden.dtype == weight.dtype == out.dtype:
        torch.mm(hidden, weight.t(), out=out)
    elif hidden.dtype == weight.dtype and hidden.device.type == "cuda":
        out.copy_(torch.mm(hidden, weight.t(), out_dtype=out.dtype))
    else:
        hidden = hidden.to(out.dtype)
        for start in range(0, weight.shape[0], _HEAD_BLOCK):
            block = slice(start, start + _HEAD_BLOCK)
            out[:, block] = hidden @ weight[block].to(out.dtype).t()
    return out if bias is None else out.add_(bias)


def _concatenate(blocks: list[Tensor | None]) -> Tensor | None:
    tensors = [block for block in blocks if block is not None]
    return torch.cat(tensors) if tensors else None


def _check_head(name: str, head: Head, hidden_name: str, hidden: Tensor) -> None:
    weight, bias = head.weight, head.bias
    if weight.dim() != 2 or weight.shape[1] != hidden.shape[1]:
        raise ValueError(
            f"{name} {list(weight.shape)} must be [vocabulary, {hidden.shape[1]}] to fit {hidden_name} "
            f"{list(hidden.shape)}."
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"the bias {list(bias.shape)} must be [{weight.shape[0]}] to fit {name} {list(weight.shape)}.")
