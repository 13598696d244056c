"""SineLoRA, an adapter of "Mask the Target" (arXiv 2605.29498) that PEFT doesn't have: LoRA with a sine inside.

The layer computes ``W x + (alpha / r) B sin(A x)``. It is a LoRA variant through PEFT's own hooks and a method of its
own by name, so that it saves, loads and toggles as any other, and that an installation which doesn't know it fails to
load it, where PEFT would take it for plain LoRA otherwise. Importing this module makes it known to PEFT.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import peft
from peft import LoraConfig, LoraModel
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.lora.layer import LoraVariant
from torch import Tensor

PEFT_TYPE: Any = "SINELORA"


@dataclass
class SineLoraConfig(LoraConfig):
    """PEFT's :class:`~peft.LoraConfig`, read as SineLoRA; ``A`` and ``B`` start as LoRA's do.

    Raises:
        ImportError: for a PEFT before 0.21, which trains it and then doesn't save it.
        ValueError: for an initialisation that writes into the base weights, or for another variant of LoRA on top.
    """

    peft_type: Any = PEFT_TYPE

    def __post_init__(self) -> None:
        if tuple(map(int, peft.__version__.split(".")[:2])) < (0, 21):
            raise ImportError(
                f"SineLoRA needs PEFT 0.21 or newer, and {peft.__version__} is installed, which can't save an adapter "
                "that isn't its own. Install it with: pip install -U peft"
            )
        super().__post_init__()
        self.peft_type = PEFT_TYPE
        if self.init_lora_weights not in (True, False, "gaussian"):
            raise ValueError(
                f"init_lora_weights={self.init_lora_weights!r} is made for the product B A, which SineLoRA doesn't "
                "have; use True or 'gaussian'."
            )


class SineLinearVariant(LoraVariant):
    """``result + scaling * B sin(A dropout(x))``, ``[.., out]``. It depends on x, so there is nothing to merge."""

    @staticmethod
    def init(module: Any, adapter_name: str, **kwargs: Any) -> None:
        """Nothing beyond LoRA's own weights."""

    @staticmethod
    def forward(module: Any, active_adapter: str, x: Tensor, result: Tensor, **kwargs: Any) -> Tensor:
        """See the class."""
        a, b = module.lora_A[active_adapter], module.lora_B[active_adapter]
        return result + b(a(module.lora_dropout[active_adapter](x)).sin()) * module.scaling[active_adapter]

    @staticmethod
    def merge_safe(module: Any, active_adapter: str, orig_weight: Tensor) -> Tensor:
        """Raises ValueError."""
        raise ValueError(
            "SineLoRA's update depends on the layer's input, so it can't be merged into the weights. Keep the adapter."
        )

    @staticmethod
    def merge_unsafe(module: Any, active_adapter: str, orig_weight: Tensor) -> None:
        """Raises ValueError."""
        SineLinearVariant.merge_safe(module, active_adapter, orig_weight)

    def supports_lora_conversion(self) -> bool:
        """False: it is no linear map."""
        return False


class SineLoraModel(LoraModel):
    """LoRA's tuner with :class:`SineLinearVariant` in each layer."""

    def _create_and_replace(  # type: ignore[override]
        self, lora_config: Any, adapter_name: str, target: Any, target_name: str, parent: Any, *args: Any, **kwargs: Any
    ) -> None:
        super()._create_and_replace(lora_config, adapter_name, target, target_name, parent, *args, **kwargs)
        layer = getattr(parent, target_name)
        if adapter_name not in layer.lora_A:
            raise ValueError(
                f"SineLoRA adapts linear layers, and {target_name!r} is a {type(layer.get_base_layer()).__name__}. "
                "Take it out of target_modules."
            )
        if adapter_name in layer.lora_variant:
            other = type(layer.lora_variant[adapter_name]).__name__
            raise ValueError(f"SineLoRA can't be combined with another variant of LoRA, and {other} is on.")
        layer.lora_variant[adapter_name] = SineLinearVariant()


# Not by register_peft_method, which takes names of PEFT's own enumeration only.
PEFT_TYPE_TO_CONFIG_MAPPING[PEFT_TYPE] = SineLoraConfig
PEFT_TYPE_TO_TUNER_MAPPING[PEFT_TYPE] = SineLoraModel
PEFT_TYPE_TO_PREFIX_MAPPING[PEFT_TYPE] = SineLoraModel.prefix
