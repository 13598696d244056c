"""The dense two-model reference: a separate, untouched copy of the base, and full logits of both."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from mask_the_target import TMKL, target_masked_kl


def reference_loss(
    model: nn.Module,
    base: nn.Module,
    batch: dict[str, Any],
    options: TMKL,
    num_items: float | None = None,
    num_context: float | None = None,
    shifts_labels: bool = True,
) -> Any:
    """TMKL's result for one batch from the models' own logits, without attaching anything."""
    inputs = model_inputs(batch)
    logits = model(**inputs).logits
    with torch.no_grad():
        base_logits = base.eval()(**inputs).logits
    targets = batch.get("shift_labels")
    if targets is None:
        targets = F.pad(batch["labels"][:, 1:], (0, 1), value=-100) if shifts_labels else batch["labels"]
    if options.context_weight:
        targets = targets.clone()
        for row, position in context_positions(batch):
            assert targets[row, position] == -100
            targets[row, position] = -1
    rows = logits.flatten(0, 1), base_logits.flatten(0, 1), targets.flatten()
    return target_masked_kl(*rows, options, num_items=num_items, num_context=num_context)


def context_positions(batch: dict[str, Any], placeholders: tuple[int, ...] = ()) -> list[tuple[int, int]]:
    """(row, position) of every real token that is followed by a real, unsupervised token of the same document."""
    ids = batch["input_ids"].tolist()
    mask = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).tolist()
    counted = torch.arange(batch["input_ids"].shape[1])
    positions = batch.get("position_ids", counted).expand_as(batch["input_ids"]).tolist()
    found = []
    for row, tokens in enumerate(ids):
        for position in range(len(tokens) - 1):
            after = position + 1
            real = mask[row][position] and mask[row][after]
            real = real and positions[row][after] == positions[row][position] + 1
            supervised = batch["labels"][row, after] != -100
            if real and not supervised and not {tokens[position], tokens[after]} & set(placeholders):
                found.append((row, position))
    return found


def shifts_labels(model: nn.Module, batch: dict[str, Any], aux_coefficient: float = 0.0) -> bool:
    """Whether the model's own loss compares logits with the next position's labels rather than with their own's.

    ``aux_coefficient``: factor of a router's loss in it.
    """
    with torch.no_grad():
        output = model.eval()(**model_inputs(batch), labels=batch["labels"])
    logits, labels = output.logits, batch["labels"]
    shifted = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    unshifted = F.cross_entropy(logits.flatten(0, 1), labels.flatten())
    aux = output.get("aux_loss")
    ce = output.loss if aux is None else output.loss - aux_coefficient * aux
    return bool((ce - shifted).abs() <= (ce - unshifted).abs())


def model_inputs(batch: dict[str, Any]) -> dict[str, Any]:
    """What a forward without labels takes."""
    inputs = {k: v for k, v in batch.items() if k not in ("labels", "shift_labels")}
    # With a cache, transformers doesn't look for packed documents in position_ids.
    return inputs | {"use_cache": False}


def gradients(loss: torch.Tensor, model: nn.Module) -> dict[str, torch.Tensor]:
    """Gradient of every trainable weight, by name without the PEFT wrapper's prefix."""
    named = {n: p for n, p in model.named_parameters() if p.requires_grad}
    values = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
    return {n: torch.zeros_like(p) if g is None else g for (n, p), g in zip(named.items(), values, strict=True)}


def distance(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    """Relative distance of two sets of gradients."""
    assert a.keys() == b.keys()
    difference = sum(float((a[n] - b[n]).double().square().sum()) for n in a)
    return (difference / sum(float(b[n].double().square().sum()) for n in b)) ** 0.5
