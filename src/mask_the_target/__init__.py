"""Target-masked KL: fine-tune with LoRA and keep what the base model knew."""

from typing import TYPE_CHECKING, Any

from mask_the_target.anchors import Anchors
from mask_the_target.attach import Attachment, attach, count_context, detach
from mask_the_target.cache import CachedBase
from mask_the_target.linear import linear_target_masked_kl
from mask_the_target.objective import TMKL, target_masked_kl

if TYPE_CHECKING:
    from mask_the_target.integrations.transformers import TMKLCallback

__all__ = [
    "TMKL",
    "Anchors",
    "Attachment",
    "CachedBase",
    "TMKLCallback",
    "attach",
    "count_context",
    "detach",
    "linear_target_masked_kl",
    "target_masked_kl",
]


def __getattr__(name: str) -> Any:
    """``TMKLCallback`` when it is first asked for: its base class brings transformers' Trainer, seconds of imports."""
    if name != "TMKLCallback":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from mask_the_target.integrations.transformers import TMKLCallback

    return TMKLCallback
