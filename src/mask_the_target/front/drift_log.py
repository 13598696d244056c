"""Drift in the training log: how far the model has moved from its base where it answers, for any method."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers import TrainerCallback

from mask_the_target.attach import unwrap
from mask_the_target.base import Base, resolve_base
from mask_the_target.front.probes import drift
from mask_the_target.front.recipes import Row
from mask_the_target.integrations.transformers import add_to_logs, log_before_reporters


class LogDrift(TrainerCallback):
    """At each log of the loss, ``held_out_kl`` and ``held_out_full_kl`` are added: KL(base || adapted) on these rows.

    Nats per answer token, with the target removed and in full, see `probes.drift`. Both grow before the text loss does
    and cost two forwards of a few rows, where a text probe costs a minute. `rows`: prompt-completion rows.
    Raises, when the trainer is built, what `resolve_base` raises: ValueError where the base can't be had.
    """

    def __init__(self, rows: Sequence[Row]) -> None:
        self.rows = rows
        self._base: Base | None = None

    def on_init_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        log_before_reporters(self)
        inner, configs = unwrap(kwargs["model"])  # before a checkpoint is loaded over an initial adapter
        self._base = resolve_base(inner, configs=configs)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if logs is None or "loss" not in logs or self._base is None:
            return
        moved = drift(kwargs["model"], kwargs["processing_class"], self.rows, base_context=self._base.context)
        add_to_logs(logs, state, {"held_out_kl": moved.masked_kl, "held_out_full_kl": moved.full_kl})
