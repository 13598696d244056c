"""The rivals' formulas, and how each is put into a trainer. `rivals` says which there are.

The token weights are computed from the logits of a whole batch, `[tokens, vocabulary]`, in float32: simple and exact,
and it takes memory.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import TrainerCallback

from mask_the_target import TMKL, TMKLCallback
from mask_the_target.attach import unwrap
from mask_the_target.base import Base, resolve_base
from mask_the_target.front.rivals import strength_of
from mask_the_target.head import evaluating
from mask_the_target.objective import IGNORE_INDEX, denominator, kl_of_rows, widen

if TYPE_CHECKING:
    from mask_the_target.front.options import TMKLArguments

FISHER_SAMPLES = 1000
EAFT_TOKENS = 20
TALR_LEAST = 0.01


# -------------------------------------------------------------------------------------------------------- formulas


def squared_update(a: Tensor, b: Tensor, scaling: float) -> Tensor:
    """`||s B A||^2` (Frobenius) from `A [r, in]` and `B [out, r]`, without the `[out, in]` product.

    `||B A||^2 = trace(A A' B' B)`, in float32 or wider.
    """
    a, b = widen(a), widen(b)
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
    """DFT: the target's probability, `[n] -> [n]`. It undoes the 1/p in the gradient of log p.

    What is left is the gradient of `-p`: targets that the model finds unlikely are hardly learned, and on data far from
    the base the logged CE may rise.
    """
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
    """`KL(base || adapted)` over the full vocabulary in nats, `[n, V], [n, V] -> [n]`; no gradient into the base.

    ASFT's direction: its paper writes the reverse one, its code computes this one, and so do the ports of it.
    """
    return kl_of_rows(base_logits.detach().log_softmax(1), logits.log_softmax(1))


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
        terms = ((f * (widen(p) - widen(s)).square()).sum() for p, s, f in zip(parameters, start, fisher, strict=True))
        return 0.5 * torch.stack(list(terms)).sum()

    return penalty


def diagonal_fisher(trainer: Any, parameters: list[nn.Parameter]) -> list[Tensor]:
    """The mean over training samples of the squared gradient of each one's mean cross-entropy, like `parameters`.

    Random numbers, training modes and the weights' gradients are left as they are.
    """
    rows = trainer.train_dataset
    # Of its own generator, so that training draws the same numbers as without.
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(trainer.args.seed))[:FISHER_SAMPLES]
    fisher = [torch.zeros_like(widen(parameter)) for parameter in parameters]
    used = 0
    for number in tqdm(order.tolist(), desc="EWC's Fisher", unit="sample", disable=trainer.args.disable_tqdm):
        batch = trainer._prepare_inputs(trainer.data_collator([rows[number]]))
        with torch.enable_grad(), evaluating(trainer.model), trainer.accelerator.autocast():
            found = _rows(trainer.model, batch)
        if not len(found.ce):
            continue
        used += 1
        gradients = torch.autograd.grad(found.ce.mean(), parameters, allow_unused=True)
        for total, gradient in zip(fisher, gradients, strict=True):
            if gradient is not None:
                total += widen(gradient).square()
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
        layers.append((a, top_directions(weight, len(a)).to(widen(a))))

    def penalty() -> Tensor:
        return torch.stack([(widen(a) @ directions.T).square().sum() for a, directions in layers]).sum()

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
    values: list[Tensor] = []  # of each forward since the last log
    shares: list[float] = []  # of a step that each forward is

    def compute_loss(model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None) -> Any:
        loss = plain(model, inputs, return_outputs=return_outputs, num_items_in_batch=num_items_in_batch)
        if not trainer.model.training:
            return loss
        loss, *outputs = loss if return_outputs else (loss,)
        share = 1 / trainer.current_gradient_accumulation_steps
        value = weight * penalty()
        values.append(value.detach() * share)
        shares.append(share)
        # Without num_items_in_batch the trainer divides the whole loss by the accumulated steps itself.
        loss = loss + (value if num_items_in_batch is None else value * share)
        return (loss, *outputs) if return_outputs else loss

    def terms(logs: dict[str, float]) -> dict[str, float]:
        if not values:
            return {}
        mean = float(torch.stack(values).sum()) / sum(shares)
        values.clear()
        shares.clear()
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
    """By the model's own forward, which computes the logits of every position."""
    unlabelled = {name: value for name, value in inputs.items() if name != "labels"}
    logits = model(**(unlabelled | {"use_cache": False})).logits
    targets = inputs["labels"][:, 1:].to(logits.device)
    supervised = targets != IGNORE_INDEX  # [B, T - 1]
    kept = widen(logits[:, :-1][supervised])
    ce = F.cross_entropy(kept, targets[supervised], reduction="none")
    return _Rows(kept, ce, supervised.nonzero()[:, 0])


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
    totals: list[Tensor] = []  # tokens, ce and kl (if there is one) of each forward since the last log

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
    for start in tqdm(range(0, len(rows), size), desc="base's losses", disable=trainer.args.disable_tqdm):
        numbers = range(start, min(start + size, len(rows)))
        batch = trainer._prepare_inputs(trainer.data_collator([rows[number] for number in numbers]))
        with trainer.accelerator.autocast():
            computed = _base_rows(base, batch)
        for row, content in enumerate(_contents(batch)):
            ce = computed.ce[computed.sequences == row]
            if len(ce):
                found.append((content, float(ce.mean())))
    return found


def _contents(inputs: Any) -> list[bytes]:
    """What each row of a batch holds beside its padding: token ids and labels."""
    ids, labels, mask = (inputs[name].cpu() for name in ("input_ids", "labels", "attention_mask"))
    both = torch.stack([ids, labels], 1)  # [B, 2, T]
    return [row[:, kept].numpy().tobytes() for row, kept in zip(both, mask.bool(), strict=True)]


def _token_losses(
    trainer: Any, method: str, strength: Any, choice: Any
) -> Callable[[_Rows, Any], tuple[Tensor, Tensor | None]]:
    if method == "dft":
        return lambda rows, inputs: (dft_weights(rows.ce) * rows.ce, None)
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
            contents = _contents(inputs)
            of_token = [weights[contents[row]] for row in rows.sequences.tolist()]
            return rows.ce.new_tensor(of_token) * rows.ce, None

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
    schedule of the learning rate goes on. Nothing brings the KL down again: the step that crosses the threshold is
    taken, and afterwards only batches that lie below it move the weights. STABLE's other mode, scaling an adapter until
    it fits, is scaling after training. The KL is in nats over the base's full distribution; its code estimates the
    reverse one from samples, in bits.

    Args:
        source: attached with weight 0 and `full_kl`: the loss is plain cross-entropy, and the KL is measured.
        threshold: nats per token.

    Raises RuntimeError in a step to block whose gradients are not where it can drop them.
    """

    def __init__(self, source: TMKLCallback, threshold: float) -> None:
        self.source = source
        self.threshold = threshold
        self.steps = self.blocked = 0  # since the last log
        self._before: tuple[Tensor | float, Tensor | float] = (0.0, 0.0)

    def _sums(self) -> tuple[Tensor | float, Tensor | float]:
        """Full KL in nats and tokens since the last log, which lies between two steps."""
        attachment = self.source.attachment
        assert attachment is not None
        return attachment.totals.full_kl, attachment.totals.supervised

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._before = self._sums()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        of_step = [torch.as_tensor(now - before) for now, before in zip(self._sums(), self._before, strict=True)]
        step = torch.stack(of_step)
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(step)
        self.steps += 1
        if float(step[0]) <= self.threshold * float(step[1]):
            return  # NaN is not within it
        self.blocked += 1
        held = [parameter for parameter in kwargs["model"].parameters() if parameter.grad is not None]
        if not held:
            raise RuntimeError(
                "stable blocks this step, and finds no gradient to drop: the optimiser keeps them elsewhere, or has "
                "stepped already. Nothing would be blocked. Use another optimiser, without DeepSpeed."
            )
        for parameter in held:
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
    threshold: Any = strength_of(options.method, options.rival_weight)
    source = TMKLCallback(TMKL(weight=0.0), base=options.base_choice(), full_kl=True)
    return [source, KLGate(source, threshold)]


def install(trainer: Any, options: TMKLArguments) -> None:
    """Make a trainer of plain cross-entropy (TRL's) train with the rival `options.method`, before it has started.

    `ewc` and `flow` go through the training data here. Raises ValueError with a sentence for a model that the method
    is not defined for.
    """
    method = options.method
    strength: Any = strength_of(method, options.rival_weight)
    if method == "stable":
        gate = next(c for c in trainer.callback_handler.callbacks if isinstance(c, KLGate))
        _log_too(trainer, gate.terms)
    elif method in PENALTIES:
        _add_penalty(trainer, strength, PENALTIES[method](trainer))
    else:
        _weigh_tokens(trainer, _token_losses(trainer, method, strength, options.base))
