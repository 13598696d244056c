"""The objective where the head carries an adapter, so that base and adapted model don't share one head.

Any adapter, by the head's own forward: a low-rank update stays two thin products beside the frozen one, a saved copy
(``modules_to_save``) is a head of its own. As in :mod:`~mask_the_target.linear`, a chunk's logits live until its
gradient is taken, inside the forward, and no ``[N, V]`` tensor exists.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from mask_the_target.head import LogitTransform
from mask_the_target.linear import one_factor, row_kernel, rows_of_chunk
from mask_the_target.objective import TMKL
from mask_the_target.rows_torch import Rows, join_rows


@torch.compiler.disable  # it takes gradients in its forward
def adapted_head_rows(
    hidden: Tensor,
    base_hidden: Tensor,
    head: Callable[[Tensor], Tensor],
    base_head: Callable[[Tensor], Tensor],
    labels: Tensor,
    options: TMKL,
    *,
    parameters: Sequence[Tensor],
    vocabulary: int,
    transform: LogitTransform = LogitTransform(),
    base_transform: LogitTransform = LogitTransform(),
    full_kl: bool = False,
    token_statistics: bool = False,
) -> Rows:
    """Per-row results as :func:`~mask_the_target.linear.linear_rows` gives them, ``[N]``.

    Args:
        hidden: adapted model's final hidden states, ``[N, d]``.
        base_hidden: base model's, ``[N, d_b]``.
        head: the adapted head, ``[n, d] -> [n, V]``, before the transform; differentiable in its input and in
            ``parameters``. Logits keep its dtype.
        base_head: the base's, ``[n, d_b] -> [n, V]``, run without gradient.
        labels: ``[N]`` int64; a negative label marks a row without a target.
        options: see :class:`~mask_the_target.TMKL`.
        parameters: trainable weights that ``head`` may use; those that it doesn't use get no gradient.
        vocabulary: V.
        transform: the adapted model's, from head output to logits.
        base_transform: the base's.
        full_kl: also compute the full-vocabulary KL.
        token_statistics: also compute entropy and is_top1.
    """
    compute_rows = row_kernel(hidden.device.type)
    step = rows_of_chunk(hidden.device.type, torch.promote_types(hidden.dtype, torch.float32).itemsize, vocabulary)

    def compute(chunk: slice, hidden: Tensor, gradient_of: list[Tensor]) -> tuple[Rows, list[Tensor | None]]:
        """A chunk's rows, and the gradient of their losses' sum in ``gradient_of``."""
        with torch.no_grad():
            x_b = base_head(base_hidden[chunk].to(hidden.dtype))
        with torch.set_grad_enabled(bool(gradient_of)):
            x_a = head(hidden)
        gradient = torch.empty_like(x_a) if gradient_of else None
        rows = compute_rows(
            x_a.detach(),
            x_b,
            labels[chunk],
            options,
            transform=transform,
            base_transform=base_transform,
            gradient=gradient,
            full_kl=full_kl,
            token_statistics=token_statistics,
        )
        if not gradient_of:
            return rows, []
        return rows, list(torch.autograd.grad(x_a, gradient_of, gradient, allow_unused=True))

    class AdaptedHead(torch.autograd.Function):
        """Gradients are taken chunk by chunk in the forward; the backward scales them."""

        @staticmethod
        def forward(ctx: Any, hidden: Tensor, *parameters: Tensor) -> tuple[Tensor | None, ...]:
            ctx.set_materialize_grads(False)
            needed = ctx.needs_input_grad
            blocks: list[Rows] = []
            d_hidden = torch.empty_like(hidden) if needed[0] else None
            sums: list[Tensor | None] = [None] * len(parameters)
            for start in range(0, max(1, len(hidden)), step):
                chunk = slice(start, start + step)
                part = hidden[chunk].detach().requires_grad_(needed[0])
                wanted = [part] * needed[0] + [p for p, need in zip(parameters, needed[1:], strict=True) if need]
                rows, gradients = compute(chunk, part, wanted)
                blocks.append(rows)
                found = iter(gradients)
                if d_hidden is not None:
                    of_hidden = next(found)
                    assert of_hidden is not None
                    d_hidden[chunk] = of_hidden
                for index, need in enumerate(needed[1:]):
                    gradient = next(found) if need else None
                    if gradient is not None:
                        total = sums[index]
                        sums[index] = gradient if total is None else total.add_(gradient)
            ctx.save_for_backward(d_hidden, *sums)
            results = tuple(join_rows(blocks))
            ctx.mark_non_differentiable(*(column for column in results[1:] if column is not None))
            return results

        @staticmethod
        def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
            d_hidden, *sums = ctx.saved_tensors
            row = gradients[0]
            if row is None:
                return (None,) * (1 + len(sums))
            factor = one_factor(row)
            return (
                None if d_hidden is None else (d_hidden * row[:, None]).to(d_hidden.dtype),
                *(None if total is None else total * factor for total in sums),
            )

    results = AdaptedHead.apply(hidden, *parameters)
    return Rows(*results)
