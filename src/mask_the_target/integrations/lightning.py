"""One line for Lightning's Trainer: ``callbacks=[TMKLCallback(TMKL(weight=1.0))]``.

The LightningModule stays as it is: its ``training_step`` calls the PEFT model with labels and returns ``.loss``. With
Fabric, or a model that is made in ``configure_model``, use :func:`mask_the_target.attach`.
"""

from __future__ import annotations

import sys
from typing import Any, Literal

from torch import nn

if "pytorch_lightning" in sys.modules and "lightning" not in sys.modules:  # a callback must be of the trainer's package
    from pytorch_lightning import Callback
else:
    try:
        from lightning.pytorch import Callback  # type: ignore[assignment]
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"Lightning's callback needs Lightning ({error}). Install it with: pip install "
            "'mask-the-target[lightning]'. Where the package is pytorch_lightning, import that one first."
        ) from error

from mask_the_target.attach import Attachment, attach, cache_of, unwrap
from mask_the_target.base import Base, BaseChoice, adapter_layers, require_frozen_rest, resolve_base
from mask_the_target.base_cache import BaseCache
from mask_the_target.cache import CachedBase
from mask_the_target.integrations.first_step import FirstStep
from mask_the_target.objective import TMKL


class TMKLCallback(Callback):
    """Trains with CE + weight * target-masked KL and logs both terms of a batch as ``ce`` and ``kl``, nats per token.

    Lightning averages over the batches that are accumulated, each divided by its own number of supervised tokens, for
    CE and KL alike. A run that is to average over tokens passes ``num_items_in_batch`` to the model.

    Args:
        options: the objective, see :class:`~mask_the_target.TMKL`.
        base: ``"auto"``, ``"off"``, ``"initial"``, ``"cached"`` (or a :class:`~mask_the_target.CachedBase`) or a
            separate frozen model, see :func:`~mask_the_target.attach`.
        full_kl: also measure and log the full-vocabulary KL as ``full_kl``. The KL at context positions is logged as
            ``context_kl``, where ``options`` have a ``context_weight``.

    Raises:
        ValueError: when fitting begins, if the module holds no model with an adapter, or several, and for what
            ``attach`` refuses.
        RuntimeError: in the first step, when the loss that is backpropagated is not ours; later, when a training
            forward comes without labels or bypasses ours.
    """

    def __init__(
        self,
        options: TMKL = TMKL(),
        base: BaseChoice | Literal["cached"] | CachedBase | nn.Module = "auto",
        *,
        full_kl: bool = False,
    ) -> None:
        super().__init__()
        if not isinstance(options, TMKL):
            raise ValueError(f"TMKLCallback takes the options as TMKL(...), got {type(options).__name__}.")
        self.options = options
        self.full_kl = full_kl
        self._choice, self._cached = cache_of(base)
        self._base: Base | None = None
        self._attachment: Attachment | None = None
        self._first_step: FirstStep | None = None

    @property
    def attachment(self) -> Attachment | None:
        """The attachment while fitting, else None."""
        return self._attachment

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        # A checkpoint is restored after this, and an initial adapter would be gone.
        models = _models(pl_module)
        if stage == "fit" and len(models) == 1:
            inner, configs = unwrap(models[0])
            self._base = resolve_base(inner, self._choice, configs=configs)

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        models = _models(pl_module)
        if len(models) != 1:
            raise ValueError(
                f"{type(pl_module).__name__} holds {len(models)} models with an adapter, and TMKLCallback needs one. "
                + (
                    "Make the PEFT model in __init__ or configure_model."
                    if not models
                    else "Call mask_the_target.attach on the one that is trained, instead of the callback."
                )
            )
        inner, configs = unwrap(models[0])
        base = self._base
        if base is None or (base.kind != "model" and base.model is not inner):
            base = resolve_base(inner, self._choice, configs=configs)
            if base.kind == "initial" and trainer.ckpt_path is not None:
                raise ValueError(
                    "the model was made in setup or configure_model and a checkpoint was loaded over its initial "
                    "adapter, which is what the base is told by. Make the model in __init__, or give base= a separate "
                    "frozen model."
                )
        elif base.kind != "model":
            require_frozen_rest(inner, configs)  # the module's own setup comes after ours, and may have unfrozen some
        cache = None if self._cached is None else BaseCache(self._cached, base)
        self._attachment = attach(models[0], self.options, base=base, cache=cache, full_kl=self.full_kl)
        self._attachment.strict = True
        self._first_step = FirstStep(self._attachment)

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        if self._first_step is not None and self._attachment is not None:
            self._first_step.check()
            self._first_step = self._attachment.on_backward = None

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        step = None if self._attachment is None else self._attachment.last
        if step is None:
            return
        figures = {"ce": step.ce, "kl": step.kl}
        if step.full_kl is not None:
            figures["full_kl"] = step.full_kl
        if self.options.context_weight:
            figures["context_kl"] = step.context_kl
        pl_module.log_dict(figures, on_step=True, on_epoch=False)

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        if self._attachment is not None:
            self._attachment.check_base()

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        self._release()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        self._release()

    def _release(self) -> None:
        if self._attachment is not None:
            self._attachment.detach()
        self._attachment = self._first_step = self._base = None


def _models(pl_module: nn.Module) -> list[nn.Module]:
    """The outermost causal LMs with an adapter among a module's own."""
    found: list[nn.Module] = []
    inside: set[int] = set()
    for module in pl_module.modules():
        is_model = hasattr(module, "get_output_embeddings") or hasattr(module, "peft_config")
        if module is not pl_module and is_model and id(module) not in inside and adapter_layers(module):
            found.append(module)
            inside.update(map(id, module.modules()))
    return found
