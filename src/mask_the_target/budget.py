"""A budget of drift instead of a weight: the weight of the full KL at context positions follows by dual ascent.

The problem that is solved is min CE subject to KL <= max_drift; its multiplier is the weight. Not in the paper.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

PATIENCE = 10  # steps in which a KL below its budget says nothing: an adapter begins at the base
SMOOTHING = 0.8  # of the KL over steps: a batch's own is too noisy to steer by
# The logarithm of the weight is a sum over steps of RATE times the excess, and DAMPING times the excess of now, without
# which it would swing: weights answer to it late. The excess is log(KL / budget), at most e^2 either way.
RATE, DAMPING, MOST = 0.08, 1.0, 2.0
FARTHEST = 1e4  # from 1, or from the weight that it began with: more would be the KL alone, or none, and no way back
SETTLED = 1.5  # times the budget: a KL above it at the end is said


@dataclass
class DriftBudget:
    """The weight that keeps a KL at its budget, step by step.

    In a loop of your own::

        attachment.context_weight = budget.update(float(attachment.last.context_kl))

    Attributes:
        max_drift: the budget, nats per context token.
        weight: the weight to use now; give the one to begin with.
        kl: the KL so far, smoothed over steps; nats per context token.
        steps: how many there were.
        total: the weight without its damping.
        start: the weight that it began with.
    """

    max_drift: float
    weight: float = 1.0
    kl: float = 0.0
    steps: int = 0
    total: float = 0.0
    start: float = 0.0

    def __post_init__(self) -> None:
        for name in ("max_drift", "weight"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
                raise ValueError(f"{name}={value!r} must be a positive number (nats per token; a factor).")
        self.total = self.total or float(self.weight)
        self.start = self.start or float(self.weight)

    def update(self, kl: float) -> float:
        """Take a step's mean KL (nats per context token) and give the weight of the next step.

        The weight moves in its logarithm, so that it may begin wrong by orders of magnitude. A KL that isn't finite is
        left to those who stop the run.
        """
        if not math.isfinite(kl):
            return self.weight
        self.steps += 1
        kept = SMOOTHING if self.steps > 1 else 0.0
        self.kl = kept * self.kl + (1 - kept) * kl
        excess = max(-MOST, min(MOST, math.log(max(self.kl, 1e-12) / self.max_drift)))
        if excess < 0 and self.steps <= PATIENCE:
            return self.weight
        self.total = self._bounded(self.total * math.exp(RATE * excess))
        self.weight = self._bounded(self.total * math.exp(DAMPING * excess))
        return self.weight

    def _bounded(self, weight: float) -> float:
        return min(max(weight, min(1.0, self.start) / FARTHEST), max(1.0, self.start) * FARTHEST)

    @property
    def missed(self) -> str | None:
        """A sentence if the KL is far above its budget, else None."""
        if self.kl <= SETTLED * self.max_drift:
            return None
        return (
            f"the KL at context positions is {self.kl:.3g} nats per token after {self.steps} steps, above the budget "
            f"max_drift={self.max_drift:g}, with a weight of {self.weight:.3g}. It needs more steps, a lower learning "
            "rate, or a larger budget."
        )
