"""What one would choose instead of target-masked KL: `mtt train --method NAME --rival_weight X`.

All of them go through the same trainer, data and evaluation. What is evaluated during training is always plain
cross-entropy. Sums over tokens are divided by the number of supervised tokens of the whole step, as for TMKL, so that
gradient accumulation changes nothing (TALR excepted, by its definition).

Penalties, `loss = CE + rival_weight * penalty`, in the loss itself, so that clipping sees the whole gradient:

    ewc     1/2 sum F (theta - theta_0)^2
    l2      1/2 sum over layers ||s B A||^2, the squared distance of the weights from the base's
    olora   sum over layers ||A V||^2, V the base weight's top r right singular vectors

Weights w of each token's cross-entropy, without gradient, `loss = sum w CE / supervised tokens`:

    dft     the target's probability
    eaft    normalised entropy of the 20 likeliest tokens, to the power of rival_weight
    talr    exp(-CE / tau), at least 0.01, tau = rival_weight * median of the sequences' mean CE in the batch
    flow    exp(-f / tau), f the base's mean CE on the sequence, tau = rival_weight * median of f over the data
    asft    dft, and rival_weight * KL(base || adapted) over the full vocabulary is added to each token's loss

A gate: `stable` is plain CE, but a step whose tokens have a mean KL(base || adapted) above rival_weight is not taken.

Others are options that exist already: full-vocabulary KL (LwF) is `--tmkl_mask_target false`. The token weights are
computed from the logits of a whole batch, `[tokens, vocabulary]`, in float32: simple and exact, and it takes memory.
"""

from __future__ import annotations

import difflib
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers import TrainerCallback

from mask_the_target import TMKL, TMKLCallback
from mask_the_target.attach import Totals, unwrap
from mask_the_target.base import Base, resolve_base
from mask_the_target.head import evaluating
from mask_the_target.objective import IGNORE_INDEX, denominator

if TYPE_CHECKING:
    from mask_the_target.front.options import TMKLArguments

FISHER_SAMPLES = 1000
EAFT_TOKENS = 20
TALR_LEAST = 0.01


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
    "talr": Rival("TALR", "Lin et al., 2025, arXiv 2509.20758", "factor of the median tau", 1.0),
    "flow": Rival("FLOW", "Sanyal et al., 2025, arXiv 2502.02797", "factor of the median tau", 1.0, uses_base=True),
    "asft": Rival("ASFT", "Zhu et al., 2025, arXiv 2509.23753", "factor of the KL", 0.1, uses_base=True),
}
METHODS = ("tmkl", "ce", *RIVALS)
HELP = "Strength of a rival method. " + "; ".join(
    f"{name}: {rival.strength}, default {rival.default:g}" + (f", {rival.grid} in the paper" if rival.grid else "")
    for name, rival in RIVALS.items()
    if rival.strength is not None and rival.default is not None
)


def check_method(name: str) -> None:
    """Raises ValueError, with the nearest valid name, if there is no such method."""
    if name in METHODS:
        return
    close = difflib.get_close_matches(name.lower().replace("-", "").replace("_", ""), METHODS, n=1, cutoff=0.5)
    hint = f"Did you mean {close[0]!r}? " if close else ""
    raise ValueError(f"Unknown method {name!r}. {hint}Known: {', '.join(METHODS)}.")


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
            f"rival_weight is {rival_weight}: for {method!r} it is the {rival.strength}, a number above 0. Without it "
            "the method is plain cross-entropy: method: ce."
        )
    return rival_weight


def check_settings(settings: Any) -> None:
    """Refuse settings that a rival can't work with: ValueError with a sentence. Nothing is loaded."""
    training, model, options = settings.training, settings.model, settings.tmkl
    method = options.method
    check_method(method)
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
        _check_lora_only(settings)
    if method == "olora" and (model.load_in_4bit or model.load_in_8bit):
        raise ValueError("olora takes singular vectors of the base's weights, which must not be quantised.")
    if method in ("flow", "asft") and options.base == "cached":
        raise ValueError(f"method {method!r} runs the base itself and keeps nothing on disk. Leave base at auto.")
    if training.use_liger_kernel and method not in ("l2", "olora", "stable"):
        raise ValueError(f"method {method!r} reads logits, and Liger's loss makes none. Remove use_liger_kernel.")
    if method in ("ewc", "flow") and settings.script.dataset_streaming:
        raise ValueError(f"method {method!r} goes through the data before training. Remove dataset_streaming.")
    if method == "flow" and (training.packing or getattr(training, "padding_free", False)):
        raise ValueError("flow weighs whole sequences, and packing joins several of them in one row. Remove packing.")
    if method == "stable" and training.fp16:
        raise ValueError("stable drops gradients, and fp16's scaler needs one in each step. Use bf16.")


def _check_lora_only(settings: Any) -> None:
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


# -------------------------------------------------------------------------------------------------------- formulas


def squared_update(a: Tensor, b: Tensor, scaling: float) -> Tensor:
    """`||s B A||^2` (Frobenius) from `A [r, in]` and `B [out, r]`, without the `[out, in]` product.

    `||B A||^2 = trace(A A' B' B)`, in float32 or wider.
    """
    a, b = _wide(a), _wide(b)
    return scaling**2 * ((a @ a.T) * (b.T @ b)).sum()


def top_directions(weight: Tensor, rank: int) -> Tensor:
    """The right singular vectors of `weight [out, in]` with the largest singular values, `[<= rank, in]`, orthonormal.

    From the eigenvectors of the smaller of its two Gram matrices, in float64.
    """
    weight = weight.detach().double()
    rank = min(rank, *weight.shape)
    if weight.shape[0] >= weight.shape[1]:
        return torch.linalg.eigh(weight.T @ weight).eigenvectors[:, -rank:].T
    left = torch.linalg.eigh(weight @ weight.T).eigenvectors[:, -rank:]  # [out, rank]
    # Orthonormal to rounding already, but for singular values near 0, whose directions QR completes.
    return torch.linalg.qr(weight.T @ left).Q.T


def dft_weights(ce: Tensor) -> Tensor:
    """DFT: the target's probability, `[n] -> [n]`. It undoes the 1/p in the gradient of log p."""
    return (-ce.detach()).exp()


def eaft_weights(logits: Tensor, power: float = 1.0) -> Tensor:
    """EAFT: entropy of the 20 likeliest tokens, renormalised, over its maximum `ln 20`, to `power`; `[n, V] -> [n]`.

    The paper's definition; its code divides by 3.0 for `ln 20 = 2.996`. A vocabulary below 20 tokens is taken whole.
    """
    top = logits.detach().topk(min(EAFT_TOKENS, logits.shape[1]), dim=1).values.log_softmax(1)
    entropy = torch.special.entr(top.exp()).sum(1)
    return (entropy / math.log(top.shape[1])).clamp(0, 1) ** power


def talr_weights(ce: Tensor, sequences: Tensor, factor: float = 1.0) -> Tensor:
    """TALR: `exp(-CE / tau)`, at least 0.01; `[n], [n] -> [n]`.

    tau is `factor` times the median over the sequences of their mean CE. The paper takes it anew in each batch; a batch
    is what one forward sees, so that accumulated steps differ from large ones. It normalises the weights to sum to one
    over the tokens in its derivation; here, as in implementations of it, the sum is divided by the number of tokens.

    Args:
        ce: cross-entropies in nats.
        sequences: the sequence that each belongs to, any integers.
    """
    ce = ce.detach()
    if not len(ce):
        return ce
    _, index = sequences.unique(return_inverse=True)
    count = torch.bincount(index)
    means = torch.zeros(len(count), dtype=ce.dtype, device=ce.device).index_add_(0, index, ce) / count
    tau = factor * means.quantile(0.5).clamp(min=1e-6)
    return (-ce / tau).exp().clamp(min=TALR_LEAST)


def flow_weights(losses: Sequence[float], factor: float = 1.0) -> list[float]:
    """FLOW: `exp(-f / tau)` of each sequence, `f` the base's mean CE on it, tau `factor` times their median.

    Weights are fixed before training and not normalised, as in the paper; the median sequence has weight `1/e`.
    """
    tau = factor * max(statistics.median(losses), 1e-6)
    return [math.exp(-loss / tau) for loss in losses]


def full_kl(base_logits: Tensor, logits: Tensor) -> Tensor:
    """`KL(base || adapted)` over the full vocabulary in nats, `[n, V], [n, V] -> [n]`; no gradient into the base."""
    log_p_b, log_p_a = base_logits.detach().log_softmax(1), logits.log_softmax(1)
    p_b = log_p_b.exp()
    return torch.where(p_b > 0, p_b * (log_p_b - log_p_a), 0).sum(1)


def _wide(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()


# ------------------------------------------------------------------------------------------------------- penalties


def ewc_penalty(trainer: Any) -> Callable[[], Tensor]:
    """EWC on the trained weights: `1/2 sum F (theta - theta_0)^2`.

    theta are the adapter's weights and theta_0 their start, where LoRA's update is zero and the model is the base. F is
    the diagonal of the empirical Fisher information there: the mean over 1,000 training samples (all, if there are
    fewer) of the squared gradient of a sample's mean cross-entropy, dropout off. "Mask the Target" takes F on target
    data too, as pretraining data is what one doesn't have; it doesn't say over which weights.

    The alternative, F and the update as `[out, in]` matrices of the base's weights, costs two copies of the model.
    On LoRA's factors, F of A is 0 at the start, since B is: A moves freely, and the update is held back through B.
    """
    parameters = [parameter for parameter in trainer.model.parameters() if parameter.requires_grad]
    start = [parameter.detach().clone() for parameter in parameters]
    fisher = diagonal_fisher(trainer, parameters)

    def penalty() -> Tensor:
        terms = ((f * (_wide(p) - _wide(s)).square()).sum() for p, s, f in zip(parameters, start, fisher, strict=True))
        return 0.5 * torch.stack(list(terms)).sum()

    return penalty


def diagonal_fisher(trainer: Any, parameters: list[nn.Parameter]) -> list[Tensor]:
    """The mean over training samples of the squared gradient of each one's mean cross-entropy, like `parameters`."""
    rows = trainer.train_dataset
    # Samples of their own generator, in an order that doesn't touch the one which training draws from.
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(trainer.args.seed))
    fisher = [torch.zeros_like(_wide(parameter)) for parameter in parameters]
    used = 0
    for number in order[:FISHER_SAMPLES].tolist():
        batch = trainer._prepare_inputs(trainer.data_collator([rows[number]]))
        with torch.enable_grad(), evaluating(trainer.model), trainer.accelerator.autocast():
            found = _rows(trainer.model, batch)
        if not len(found.ce):
            continue
        used += 1
        for total, gradient in zip(
            fisher, torch.autograd.grad(found.ce.mean(), parameters, allow_unused=True), strict=True
        ):
            if gradient is not None:
                total += _wide(gradient).square()
    return [total / max(used, 1) for total in fisher]


def l2_penalty(trainer: Any) -> Callable[[], Tensor]:
    """L2-SP towards the base: `1/2 sum over layers ||s B A||^2`, on the update and not on its factors."""
    layers = lora_layers(trainer.model)

    def penalty() -> Tensor:
        terms = (
            squared_update(layer.lora_A[name].weight, layer.lora_B[name].weight, layer.scaling[name])
            for layer, name in layers
        )
        return 0.5 * torch.stack(list(terms)).sum()

    return penalty


def olora_penalty(trainer: Any) -> Callable[[], Tensor]:
    """O-LoRA's orthogonality for a single task: `sum over layers ||A V||^2`.

    O-LoRA keeps the rows of a new task's A orthogonal to those of earlier tasks' A. Here the only earlier task is
    pretraining, whose subspace is taken as that of the r inputs which the base's weight amplifies most: the columns of
    V are its top r right singular vectors, r the adapter's rank. The sum is of squares, as in the paper; its code sums
    absolute values. Its second term, an L2 norm of the new factors, has weight 0 by default there and is left out.
    """
    layers = []
    for layer, name in lora_layers(trainer.model):
        a, weight = layer.lora_A[name].weight, layer.get_base_layer().weight
        if getattr(layer, "fan_in_fan_out", False):
            weight = weight.T
        layers.append((a, top_directions(weight, len(a)).to(_wide(a))))

    def penalty() -> Tensor:
        return torch.stack([(_wide(a) @ directions.T).square().sum() for a, directions in layers]).sum()

    return penalty


def lora_layers(model: nn.Module) -> list[tuple[Any, str]]:
    """Each LoRA layer and its adapter's name. Raises ValueError for layers whose update is not `s B A` of matrices."""
    found = []
    for path, layer in model.named_modules():
        if not isinstance(layer, LoraLayer):
            continue
        for name in layer.active_adapters:
            matrices = name in layer.lora_A and layer.lora_A[name].weight.dim() == 2  # type: ignore[operator]
            if not matrices or layer.use_dora.get(name, False):
                raise ValueError(f"{path} is not a plain LoRA layer of a matrix, whose update is s B A. Leave it out.")
            found.append((layer, name))
    if not found:
        raise ValueError("the model has no LoRA layer, whose update is s B A. Use adapter: lora.")
    return found


PENALTIES = {"ewc": ewc_penalty, "l2": l2_penalty, "olora": olora_penalty}


def _add_penalty(trainer: Any, weight: float, penalty: Callable[[], Tensor]) -> None:
    """Add `weight * penalty()` to the loss that `trainer` trains on; log it as `penalty`, and the rest as `ce`."""
    plain = trainer.compute_loss
    values: list[Tensor] = []  # since the last log
    first_step = 0

    def compute_loss(model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None) -> Any:
        nonlocal first_step
        loss = plain(model, inputs, return_outputs=return_outputs, num_items_in_batch=num_items_in_batch)
        if not trainer.model.training:
            return loss
        loss, *outputs = loss if return_outputs else (loss,)
        first_step = first_step if values else trainer.state.global_step
        value = weight * penalty()
        steps = trainer.current_gradient_accumulation_steps
        values.append(value.detach() / steps)
        # Without num_items_in_batch the trainer divides the whole loss by the accumulated steps itself.
        loss = loss + (value if num_items_in_batch is None else value / steps)
        return (loss, *outputs) if return_outputs else loss

    def terms(logs: dict[str, float]) -> dict[str, float]:
        if not values:
            return {}
        mean = float(torch.stack(values).sum()) / max(trainer.state.global_step - first_step, 1)
        values.clear()
        return {"ce": logs["loss"] - mean, "penalty": mean}

    trainer.compute_loss = compute_loss
    _log_too(trainer, terms)


def _log_too(trainer: Any, terms: Callable[[dict[str, float]], dict[str, float]]) -> None:
    """Add `terms(logs)` to each entry of the log that has a training loss, before anything reports it."""
    log = trainer.log

    def with_terms(logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        log(logs | terms(logs) if "loss" in logs else logs, *args, **kwargs)

    trainer.log = with_terms


# --------------------------------------------------------------------------------------------------- token weights


@dataclass(frozen=True)
class _Rows:
    """The supervised positions of a batch."""

    logits: Tensor  # [n, V], float32 or float64
    ce: Tensor  # [n], nats
    sequences: Tensor  # [n], the row of the batch that each lies in


def _rows(model: nn.Module, inputs: Any) -> _Rows:
    logits = _logits(model, inputs)
    targets = inputs["labels"][:, 1:].to(logits.device)
    supervised = targets != IGNORE_INDEX  # [B, T - 1]
    kept = _wide(logits[:, :-1][supervised])
    ce = F.cross_entropy(kept, targets[supervised], reduction="none")
    return _Rows(kept, ce, supervised.nonzero()[:, 0])


def _logits(model: nn.Module, inputs: Any) -> Tensor:
    """`[B, T, V]`, by the model's own forward."""
    unlabelled = {name: value for name, value in inputs.items() if name != "labels"}
    return model(**(unlabelled | {"use_cache": False})).logits


def _base_rows(base: Base, inputs: Any) -> _Rows:
    with torch.no_grad(), evaluating(base.model), base.context():
        return _rows(base.model, inputs)


def _weigh_tokens(trainer: Any, token_losses: Callable[[_Rows, Any], tuple[Tensor, Tensor | None]]) -> None:
    """Replace the training loss of `trainer` by a sum over tokens; their mean `ce` (and `kl`) are logged beside it.

    `token_losses(rows, inputs)` gives the loss of each row, `[n]`, and its KL where the method has one.
    """
    if getattr(trainer, "aux_loss_enabled", False):
        raise ValueError("token weights don't go with a router's auxiliary loss. Set output_router_logits to false.")
    plain = trainer.compute_loss
    totals: list[Tensor] = []  # tokens, ce and kl (if there is one) since the last log

    def compute_loss(model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None) -> Any:
        if not trainer.model.training:
            return plain(model, inputs, return_outputs=return_outputs, num_items_in_batch=num_items_in_batch)
        if return_outputs:
            raise ValueError("the logits of weighted tokens are not handed out in training.")
        rows = _rows(model, inputs)
        losses, kl = token_losses(rows, inputs)
        count = torch.tensor(len(losses), device=losses.device)
        totals.append(torch.stack([count.to(losses), *(t.detach().sum() for t in (rows.ce, kl) if t is not None)]))
        loss = losses.sum() / denominator(num_items_in_batch, count)
        if num_items_in_batch is not None and trainer.args.average_tokens_across_devices:
            loss = loss * trainer.accelerator.num_processes  # all ranks' tokens were counted, and DDP averages
        return loss

    def terms(logs: dict[str, float]) -> dict[str, float]:
        if not totals:
            return {}
        tokens, *sums = trainer.accelerator.reduce(torch.stack(totals).sum(0), "sum").tolist()
        totals.clear()
        return {name: value / max(tokens, 1) for name, value in zip(("ce", "kl"), sums, strict=False)}

    trainer.compute_loss = compute_loss
    _log_too(trainer, terms)


def base_losses(trainer: Any, base: Base) -> list[tuple[bytes, float]]:
    """The content of each training sequence that has supervised tokens, and the base's mean cross-entropy on it."""
    rows, size, found = trainer.train_dataset, trainer.args.per_device_train_batch_size, []
    for start in range(0, len(rows), size):
        numbers = range(start, min(start + size, len(rows)))
        batch = trainer._prepare_inputs(trainer.data_collator([rows[number] for number in numbers]))
        with trainer.accelerator.autocast():
            computed = _base_rows(base, batch)
        for number, key in enumerate(_contents(batch)):
            ce = computed.ce[computed.sequences == number]
            if len(ce):
                found.append((key, float(ce.mean())))
    return found


def _contents(inputs: Any) -> list[bytes]:
    """What each row of a batch holds beside its padding: token ids and labels."""
    ids, labels, mask = (inputs[name].cpu() for name in ("input_ids", "labels", "attention_mask"))
    both = torch.stack([ids, labels], 1)  # [B, 2, T]
    return [row[:, kept].numpy().tobytes() for row, kept in zip(both, mask.bool(), strict=True)]


def _token_losses(
    trainer: Any, method: str, strength: float | None, choice: Any
) -> Callable[[_Rows, Any], tuple[Tensor, Tensor | None]]:
    if method == "dft":
        return lambda rows, inputs: (dft_weights(rows.ce) * rows.ce, None)
    assert strength is not None
    if method == "eaft":
        return lambda rows, inputs: (eaft_weights(rows.logits, strength) * rows.ce, None)
    if method == "talr":
        return lambda rows, inputs: (talr_weights(rows.ce, rows.sequences, strength) * rows.ce, None)

    inner, configs = unwrap(trainer.model)
    base = resolve_base(inner, choice, configs=configs)
    if method == "flow":
        contents, losses = zip(*base_losses(trainer, base), strict=True)
        weights = dict(zip(contents, flow_weights(losses, strength), strict=True))

        def flow(rows: _Rows, inputs: Any) -> tuple[Tensor, Tensor | None]:
            of_row = [weights.get(content, 0.0) for content in _contents(inputs)]  # 0: nothing is supervised
            return rows.ce.new_tensor(of_row)[rows.sequences] * rows.ce, None

        return flow

    def asft(rows: _Rows, inputs: Any) -> tuple[Tensor, Tensor | None]:
        kl = full_kl(_base_rows(base, inputs).logits.to(rows.logits), rows.logits)
        return dft_weights(rows.ce) * rows.ce + strength * kl, kl

    return asft


# ------------------------------------------------------------------------------------------------------------ gate


class KLGate(TrainerCallback):
    """STABLE's gate, on optimiser steps: one is not taken if its tokens' mean KL(base || adapted) is above `threshold`.

    STABLE trains an adapter for each of a series of edits and merges it only if the KL to the base, measured on
    anchors, is within a budget. "Mask the Target" compares it, for one run, as "updates gated by full KL" and doesn't
    say what an update is. Here it is an optimiser step, and the KL is that of the step's own supervised tokens before
    it: their forward is there anyway. A blocked step leaves weights and the optimiser's moments as they are; the
    schedule of the learning rate goes on. STABLE's other mode, scaling an adapter until it fits, is scaling after
    training. The KL is in nats over the base's full distribution; its code estimates the reverse one from samples, in
    bits.

    Args:
        source: attached with weight 0 and `full_kl`: the loss is plain cross-entropy, and the KL is measured.
        threshold: nats per token.
    """

    def __init__(self, source: TMKLCallback, threshold: float) -> None:
        self.source = source
        self.threshold = threshold
        self.steps = self.blocked = 0  # since the last log
        self._totals: Totals | None = None
        self._seen: tuple[Tensor | float, Tensor | float] = (0.0, 0.0)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        attachment = self.source.attachment
        assert attachment is not None
        totals = attachment.totals
        if totals is not self._totals:  # logging starts new ones
            self._totals, self._seen = totals, (0.0, 0.0)
        now = (totals.full_kl, totals.supervised)
        step = torch.stack([torch.as_tensor(value - seen) for value, seen in zip(now, self._seen, strict=True)])
        self._seen = now
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(step)
        self.steps += 1
        if float(step[0]) > self.threshold * float(step[1]):
            self.blocked += 1
            for parameter in kwargs["model"].parameters():
                parameter.grad = None  # optimisers pass such weights by

    def terms(self, logs: dict[str, float]) -> dict[str, float]:
        """`blocked`: the share of the steps since the last log that were not taken."""
        share = self.blocked / max(self.steps, 1)
        self.steps = self.blocked = 0
        return {"blocked": share}


# ---------------------------------------------------------------------------------------------------------- install


def callbacks(options: TMKLArguments) -> list[TrainerCallback]:
    """What the trainer of a rival is built with."""
    if options.method != "stable":
        return []
    threshold = strength_of(options.method, options.rival_weight)
    assert threshold is not None
    source = TMKLCallback(TMKL(weight=0.0), base=options.base_choice(), full_kl=True)
    return [source, KLGate(source, threshold)]


def install(trainer: Any, options: TMKLArguments) -> None:
    """Make a trainer of plain cross-entropy (TRL's) train with the rival `options.method`, before it has started.

    `ewc` and `flow` go through the training data here. Raises ValueError with a sentence for a model that the method
    is not defined for.
    """
    method, strength = options.method, strength_of(options.method, options.rival_weight)
    if method == "stable":
        gate = next(c for c in trainer.callback_handler.callbacks if isinstance(c, KLGate))
        _log_too(trainer, gate.terms)
    elif method in PENALTIES:
        assert strength is not None
        _add_penalty(trainer, strength, PENALTIES[method](trainer))
    else:
        _weigh_tokens(trainer, _token_losses(trainer, method, strength, options.base))
