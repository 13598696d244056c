"""What TRL's SFTTrainer reads from a forward, by version. Its contract moved three times within a year:

- up to 1.3, and ``loss_type="nll"`` up to 1.14 ("plain"): ``outputs.loss``, and ``outputs.logits`` for its metrics;
- ``loss_type="chunked_nll"``, 1.4 to 1.14: ``outputs.loss``, and three counters for its metrics;
- from 1.15 ("fused"): calls with ``fused_lm_head=True`` and builds the loss itself, from ``outputs.log_probs``. A
  forward that changes only ``.loss`` would train without the regulariser and without a word.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from mask_the_target.rows_torch import Rows

# TRL passes these to Liger's forward.
_LIGER_ARGUMENTS = ("skip_logits", "return_token_accuracy", "use_token_scaling")


def reads_token_statistics(forward: Callable[..., Any]) -> bool:
    """Whether TRL's chunked_nll forward lies somewhere under ``forward``."""
    function: Any = forward
    while function is not None:
        function = getattr(function, "__func__", function)
        if getattr(function, "__name__", "") == "_chunked_ce_forward" or "_chunked_ce_forward" in getattr(
            function, "__qualname__", ""
        ):
            return True
        function = getattr(function, "__wrapped__", None)
    return False


def take_loss_arguments(kwargs: dict[str, Any], known: list[str]) -> bool:
    """Take TRL's own arguments out of ``kwargs``; True if the caller wants per-token results (``fused_lm_head``).

    Raises:
        ValueError: for DFT through Liger, which weights each token's loss.
    """
    fused = bool(kwargs.pop("fused_lm_head", False))
    for name in _LIGER_ARGUMENTS:
        if name not in known and kwargs.pop(name, None) and name == "use_token_scaling":
            raise ValueError("loss_type='dft' replaces the cross-entropy that TMKL is defined with; use 'nll'.")
    return fused


def fused_output(
    rows: Rows, losses: Tensor, positions: Tensor, targets: Tensor, loss: Tensor, aux: Any, *, shifted: bool
) -> Any:
    """Answer ``fused_lm_head=True``: per token ``-(ce + weight * kl)`` in ``log_probs``' place.

    The trainer's loss is minus their sum over its denominator, which is exact under each of its normalisations.

    Args:
        rows: results of the supervised positions, ``[n]``.
        losses: whose sum over the trainer's denominator is the loss, ``[n]`` or more: context positions follow. The
            trainer sums ``log_probs`` without looking at ``label_mask``.
        positions: the indices of ``losses`` in the flattened ``[B * T]`` positions.
        targets: shifted labels, ``[B, T]``.
        loss: the scalar loss.
        aux: the router's auxiliary loss or None.
        shifted: the caller gave ``shift_labels``: answer ``[B, T]`` instead of ``[B, T - 1]``.
    """
    from trl.trainer.utils import FusedCausalLMOutput

    def spread(values: Tensor) -> Tensor:  # [n] -> [B, T] or [B, T - 1]; differentiable
        flat = values.new_zeros(targets.numel()).index_put((positions[: len(values)],), values)
        flat = flat.view(targets.shape)
        return flat if shifted else flat[..., :-1]

    assert rows.entropy is not None
    assert rows.is_top1 is not None
    mask = (targets != -100).to(loss.device)
    return FusedCausalLMOutput(
        loss=loss,
        log_probs=spread(-losses),
        entropy=spread(rows.entropy),
        is_top1=spread(rows.is_top1),
        label_mask=mask if shifted else mask[..., :-1],
        aux_loss=aux,
    )


def add_token_statistics(output: Any, rows: Rows, count: Tensor) -> None:
    """The three counters that TRL's chunked_nll trainer reads, as items of the model's own output."""
    assert rows.entropy is not None
    assert rows.is_top1 is not None
    output["num_correct_tokens"] = rows.is_top1.sum().float()
    output["entropy_sum"] = rows.entropy.sum()
    output["num_valid_tokens"] = count


def reads_logits(args: Any) -> bool:
    """Whether the trainer with these arguments reads ``outputs.logits`` in training (the plain contract)."""
    import trl
    from packaging.version import Version

    if Version(trl.__version__) >= Version("1.15.0.dev0") or getattr(args, "use_liger_kernel", False):
        return False
    return getattr(args, "loss_type", "nll") == "nll"
