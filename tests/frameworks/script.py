"""A recipe of a framework that has no trainer class: run as a script, and the reference of what it logged."""

import runpy
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from mask_the_target import TMKL
from reference import distance, gradients, reference_loss


class Step(NamedTuple):
    """The trainable weights as an optimizer's step finds them, and their gradients."""

    weights: list[Tensor]
    gradients: list[Tensor]


def run_script(monkeypatch: pytest.MonkeyPatch, script: Path, *arguments: str) -> list[Step]:
    """Runs the file as ``python SCRIPT ARGUMENTS``, in this process so that each step can be kept."""
    steps: list[Step] = []

    def keep(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        trained = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        steps.append(Step([p.detach().clone() for p in trained], [p.grad.clone() for p in trained]))

    monkeypatch.setattr(sys, "argv", [str(script), *arguments])
    hook = register_optimizer_step_pre_hook(keep)
    try:
        runpy.run_path(str(script), run_name="__main__")
    except SystemExit:  # of sys.exit(None)
        pass
    finally:
        hook.remove()
    return steps


class WithLogits(nn.Module):
    """A model that returns its logits, as the reference calls one."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, **_: Any) -> SimpleNamespace:
        return SimpleNamespace(logits=self.model(input_ids))


def check(
    logs: list[dict[str, float]],
    steps: list[Step],
    batches: list[list[dict[str, Tensor]]],
    adapted: nn.Module,
    base: nn.Module,
    options: TMKL,
    *,
    by_tokens: bool,
    exact: float = 1e-4,
) -> None:
    """What was logged of each step, and its gradients, are the reference's: ``base`` is loaded apart, and ``adapted``
    takes each step's weights; both give dense logits.

    A step's mean is over the tokens of its batches (``by_tokens``), or over the batches' own means.
    """
    assert len(logs) == len(steps) == len(batches)
    adapted, base = WithLogits(adapted).double(), base.double()
    trained = [p for p in adapted.parameters() if p.requires_grad]
    for entry, step, parts in zip(logs, steps, batches, strict=True):
        with torch.no_grad():
            for parameter, value in zip(trained, step.weights, strict=True):
                parameter.copy_(value)
        items = sum(int((part["labels"][:, 1:] != -100).sum()) for part in parts)
        results = [reference_loss(adapted, base, part, options, items if by_tokens else None) for part in parts]
        share = 1 if by_tokens else len(parts)
        for name in ("loss", "ce", "kl"):
            expected = sum(float(getattr(r, name).detach()) for r in results) / share
            assert entry[name] == pytest.approx(expected, rel=exact, abs=exact / 50), name
        expected_gradients = gradients(sum(r.loss for r in results) / share, adapted)
        found = dict(zip(expected_gradients, step.gradients, strict=True))
        assert distance(found, expected_gradients) < exact
    assert logs[0]["kl"] == 0  # LoRA begins at the base, whose forward is the same to the last bit
    assert logs[-1]["kl"] > 1e-3
