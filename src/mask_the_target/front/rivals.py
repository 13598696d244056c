"""What one would choose instead of target-masked KL: `mtt train --method NAME --rival_weight X`.

All rivals go through the same trainer, data and evaluation. What is evaluated during training is always plain
cross-entropy (CE). Sums over tokens are divided by the number of supervised tokens of the whole step, as for TMKL, so
that gradient accumulation changes nothing (TALR excepted, by its definition). The formulas, and what was chosen where
a definition leaves a choice, are in `rival_losses`.

Penalties, `loss = CE + rival_weight * penalty`, in the loss itself, so that clipping sees the whole gradient:

    ewc     1/2 sum F (theta - theta_0)^2, F the diagonal Fisher on 1,000 training samples
    l2      1/2 sum over layers ||s B A||^2, the squared distance of the weights from the base's
    olora   sum over layers ||A V||^2, V the base weight's top r right singular vectors

Weights w of each token's cross-entropy, without gradient, `loss = sum w CE / supervised tokens`:

    dft     the target's probability
    eaft    normalised entropy of the 20 likeliest tokens, to the power of rival_weight
    talr    exp(-CE / tau), at least 0.01, tau = rival_weight * median of the sequences' mean CE in the batch
    flow    exp(-f / tau), f the base's mean CE on the sequence, tau = rival_weight * median of f over the data
    asft    dft, and rival_weight * KL(base || adapted) over the full vocabulary is added to each token's loss

A gate: `stable` is CE, but a step whose tokens have a mean KL(base || adapted) above rival_weight is not taken.

The other rivals are options of TMKL or of the study, and need no method of their own:

    full-vocabulary KL (LwF, "SFT+KL")      tmkl_mask_target: false
    reverse KL, Jensen-Shannon              tmkl_divergence: reverse, jsd
    weighted by the non-target mass         tmkl_position_weight: non_target_mass
    not renormalised                        tmkl_renormalize: false
    plain CE; at other learning rates       method: ce; learning_rate in its grid
    early stopping; scaling the adapter     checkpoints and scales of a study
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Rival:
    """One rival: its name and source for people, and what `rival_weight` is for it (None: it has no strength)."""

    title: str
    source: str
    strength: str | None
    default: float | None
    grid: str = ""  # of "Mask the Target", where it has the rival
    uses_base: bool = False
    lora_only: bool = False  # defined by LoRA's update s B A


RIVALS = {
    "ewc": Rival("EWC", "Kirkpatrick et al., 2017, arXiv 1612.00796", "lambda", 1.0, "0.01 to 100"),
    "l2": Rival("L2-SP", "Li et al., 2018, arXiv 1802.01483", "lambda", 0.01, "1e-4 to 1", lora_only=True),
    "olora": Rival("O-LoRA", "Wang et al., 2023, arXiv 2310.14152", "lambda", 1.0, "0.1 to 100", lora_only=True),
    "stable": Rival(
        "STABLE", "Hoy and Celik, 2025, arXiv 2510.16089", "the KL allowed, nats per token", 0.1, "0.01 to 1", True
    ),
    "dft": Rival("DFT", "Wu et al., 2025, arXiv 2508.05629", None, None),
    "eaft": Rival("EAFT", "Diao et al., 2026, arXiv 2601.02151", "exponent", 1.0),
    "talr": Rival("TALR", "Lin et al., 2025, arXiv 2509.20758", "tau over the median loss", 1.0),
    "flow": Rival("FLOW", "Sanyal et al., 2025, arXiv 2502.02797", "tau over the median loss", 1.0, uses_base=True),
    "asft": Rival("ASFT", "Zhu et al., 2025, arXiv 2509.23753", "factor of the KL", 0.1, uses_base=True),
}
METHODS = ("tmkl", "ce", *RIVALS)
METHOD_HELP = (
    "tmkl: cross-entropy plus target-masked KL. ce: plain cross-entropy (TRL). Rivals: "
    + ", ".join(f"{name} ({rival.title}, {rival.source})" for name, rival in RIVALS.items())
    + "."
)
STRENGTH_HELP = (
    "Strength of a rival method. "
    + "; ".join(
        f"{name}: {rival.strength}, default {rival.default:g}"
        + (f" (Mask the Target tries {rival.grid})" if rival.grid else "")
        for name, rival in RIVALS.items()
        if rival.default is not None
    )
    + "."
)


def strength_of(method: str, rival_weight: float | None) -> float | None:
    """`rival_weight`, or the method's default. Raises ValueError for a value that the method can't have."""
    rival = RIVALS.get(method)
    if rival is None or rival.strength is None:
        if rival_weight is not None:
            instead = "tmkl_weight is its strength" if method == "tmkl" else "it has no strength"
            raise ValueError(f"rival_weight is {rival_weight:g}, and method {method!r} doesn't take it: {instead}.")
        return None
    if rival_weight is None:
        return rival.default
    if not (math.isfinite(rival_weight) and rival_weight > 0):
        raise ValueError(
            f"rival_weight is {rival_weight}: for {method!r} it is the {rival.strength.removeprefix('the ')}, a number "
            "above 0. Without it the method is plain cross-entropy: method: ce."
        )
    return rival_weight


def check_settings(settings: Any) -> None:
    """Refuse settings that a method can't work with: ValueError with a sentence. Nothing is loaded."""
    training, options = settings.training, settings.tmkl
    method = options.method
    strength_of(method, options.rival_weight)
    if method not in RIVALS:
        return
    if training.label_smoothing_factor > 0:
        raise ValueError(
            f"label_smoothing_factor is {training.label_smoothing_factor}: {method} is defined with plain "
            "cross-entropy. Remove it."
        )
    if getattr(training, "loss_type", None) == "dft":
        raise ValueError(f"loss_type is 'dft', and method {method!r} has a loss of its own. Remove one of the two.")
    if RIVALS[method].lora_only:
        _check_lora(settings)
    if method in ("flow", "asft") and options.base == "cached":
        raise ValueError(f"method {method!r} runs the base itself and keeps nothing on disk. Leave base at auto.")
    if training.use_liger_kernel and method not in ("l2", "olora", "stable"):
        raise ValueError(f"method {method!r} reads logits, and Liger's loss makes none. Remove use_liger_kernel.")
    if method in ("ewc", "flow") and settings.script.dataset_streaming:
        raise ValueError(f"method {method!r} goes through the data before training. Remove dataset_streaming.")
    if method in ("talr", "flow") and (training.packing or getattr(training, "padding_free", False)):
        raise ValueError(
            f"{method} compares whole sequences, and packing or padding_free joins several of them in one row. Remove "
            "packing and padding_free."
        )
    if method == "stable":
        _check_gate(settings)


def _check_lora(settings: Any) -> None:
    model, options = settings.model, settings.tmkl
    other = options.adapter if options.adapter not in (None, "lora", "rslora") else "dora" if model.use_dora else None
    if other is not None:
        raise ValueError(
            f"method {options.method!r} is defined by LoRA's update s B A, and {other}'s is another. Use adapter: lora "
            "or rslora."
        )
    for option in ("lora_modules_to_save", "lora_target_parameters"):
        if getattr(model, option):
            raise ValueError(
                f"method {options.method!r} is defined by LoRA's update s B A, and {option} trains weights in another "
                "way. Remove it."
            )
    if options.method == "olora" and (model.load_in_4bit or model.load_in_8bit):
        raise ValueError("olora takes singular vectors of the base's weights, which must not be quantised.")


def _check_gate(settings: Any) -> None:
    """Whatever moves weights without the gradients that the gate drops would take a step that it blocked."""
    training = settings.training
    if training.fp16:
        raise ValueError("stable drops gradients, and fp16's scaler needs one in each step. Use bf16.")
    if settings.tmkl.adapter == "adalora":
        raise ValueError(
            "stable drops a step's gradients, and AdaLoRA adds its own penalty's and prunes. Use another adapter."
        )
    if training.deepspeed:
        raise ValueError("stable drops a step's gradients, which DeepSpeed keeps elsewhere. Remove deepspeed.")
    name = str(getattr(training.optim, "value", training.optim))
    if "lomo" in name or "layerwise" in name:
        raise ValueError(
            f"optim is {name!r}, which steps during the backward pass, before stable can block the step. Use another."
        )
