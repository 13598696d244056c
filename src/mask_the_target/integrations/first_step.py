"""The proof, at the first optimizer step, that the loss which a trainer backpropagates is TMKL's."""

from __future__ import annotations

import torch
from torch import Tensor

from mask_the_target.attach import Attachment


class FirstStep:
    """Watches the backwards of an attachment until :meth:`check`. ``backpropagated`` is the sum of losses times the
    factors that they were backpropagated with; it goes on after the check, until the attachment is given another
    ``on_backward``."""

    def __init__(self, attachment: Attachment) -> None:
        self._attachment = attachment
        self._factors: list[Tensor] | None = []
        self.backpropagated: Tensor | float = 0.0
        attachment.on_backward = self._note

    def _note(self, losses: Tensor, factors: Tensor) -> None:
        self.backpropagated = self.backpropagated + (losses * factors).sum()
        if self._factors is not None:
            self._factors.append(factors)

    def check(self) -> None:
        """Before the first optimizer step; later calls do nothing.

        Raises RuntimeError if the loss did not come from the model's forward, wasn't backpropagated, or was weighted
        position by position.
        """
        if self._factors is None:
            return
        forwards, backwards = self._attachment.totals.forwards, len(self._factors)
        if forwards == 0:
            raise RuntimeError(
                "the first step's loss did not come from the model's forward, so TMKL is not in it: the trainer (or "
                "something patched into it) computes its loss on its own. Nothing was trained. This version of the "
                "trainer is not supported with these settings."
            )
        if backwards < forwards:
            raise RuntimeError(
                f"the model's forward computed TMKL's loss {forwards} times in the first step, but the trainer "
                f"backpropagated it {backwards} times: it trains on another loss. Nothing was trained."
            )
        for factors in self._factors:
            if factors.numel() and not (factors.min() > 0 and torch.allclose(factors, factors[:1])):
                raise RuntimeError(
                    "the trainer weights the positions' losses one by one (factors from "
                    f"{float(factors.min()):.3g} to {float(factors.max()):.3g}), so it trains on another loss than "
                    "TMKL's. Nothing was trained. Turn token weighting off (loss_type='nll')."
                )
        self._factors = None
