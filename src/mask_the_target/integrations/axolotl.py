"""Axolotl: two lines in its YAML.

    plugins:
      - mask_the_target.integrations.axolotl.TMKLPlugin
    tmkl_weight: 1.0

The callback goes to the trainer when it is built, so it needs no trainer class of its own and leaves other plugins
theirs. Without sample packing or with it, axolotl averages each micro-batch by itself and then over the accumulation
steps; both terms of the loss are averaged so.
"""

from __future__ import annotations

from typing import Any, Literal

from axolotl.integrations.base import BasePlugin
from pydantic import BaseModel, Field, model_validator

from mask_the_target.integrations.settings import PREFIX, callback_from

# Keys that make axolotl train on another loss than the model's own.
_OTHER_LOSSES = (
    "rl",
    "reward_model",
    "process_reward_model",
    "orpo_alpha",
    "use_eaft",
    "kd_trainer",
    "diffusion",
    "hatchery",
)


class TMKLArgs(BaseModel):
    """The keys that the plugin adds to axolotl's YAML. All but the last five are fields of TMKL."""

    tmkl_weight: float = Field(default=1.0, description="Factor of the KL; 0 is plain cross-entropy.")
    tmkl_divergence: Literal["forward", "reverse", "jsd"] = Field(
        default="forward", description="forward is KL(base || adapted)."
    )
    tmkl_mask_target: bool = Field(default=True, description="Remove the target from both distributions.")
    tmkl_renormalize: bool = Field(default=True, description="Renormalise over the non-targets.")
    tmkl_position_weight: Literal["uniform", "non_target_mass"] = Field(
        default="uniform", description="non_target_mass weighs each position by 1 - base probability of the target."
    )
    tmkl_temperature: float = Field(default=1.0, description="Temperature of both; the KL is times its square.")
    tmkl_exclude_base_above: float | None = Field(
        default=None, description="Leave out positions where the base gives the target more than this probability."
    )
    tmkl_context_weight: float = Field(
        default=0.0, description="Factor of the full KL at the prompt's positions, without a target; not in the paper."
    )
    tmkl_context_tokens: int | None = Field(default=None, description="At most so many of them a step; default: all.")
    tmkl_base: Literal["auto", "off", "initial", "cached"] = Field(
        default="auto", description="Where the base comes from: see mask_the_target.attach."
    )
    tmkl_full_kl: bool = Field(default=False, description="Also log the full-vocabulary KL, as full_kl.")
    tmkl_max_drift: float | None = Field(
        default=None, description="The KL at context positions to keep to, nats per token, instead of a fixed weight."
    )
    tmkl_anchors: str = Field(
        default="none",
        description="Sequences without a target, added to each batch for tmkl_context_weight to act on: auto, which "
        "the base writes before training, or a file of JSON Lines.",
    )
    tmkl_anchor_share: float | None = Field(
        default=None, description="The share of a batch's tokens that are anchors; default: 0.25."
    )

    @model_validator(mode="before")
    @classmethod
    def check_tmkl(cls, data: Any) -> Any:
        """Refuse, before anything is loaded, what can't work and keys that axolotl would ignore."""
        callback = callback_from(_settings(data), "the axolotl config")
        for key in _OTHER_LOSSES:
            if data.get(key):
                raise ValueError(
                    f"{key}: {data[key]!r} makes axolotl train on another loss than the model's own, and TMKL would "
                    "not be in it. Remove it, or the TMKL plugin."
                )
        if data.get("relora"):
            raise ValueError(
                "relora merges the adapter into the base's weights again and again, and the base would move with what "
                "is learned. Remove it, or the TMKL plugin."
            )
        if not data.get("adapter"):
            raise ValueError(
                "no adapter is set, which asks for a full fine-tune. TMKL takes its base from the same model with the "
                "adapter off: set adapter: lora (or qlora)."
            )
        padded = data.get("pad_to_sequence_len") is not False or data.get("micro_batch_size", 1) != 1
        if callback.options.context_weight and data.get("sample_packing") and padded:
            raise ValueError(
                "sample_packing takes the attention mask out of the batch, and tmkl_context_weight would take padding "
                "for a prompt. Set pad_to_sequence_len: false and micro_batch_size: 1, where nothing is padded."
            )
        if callback.options.context_weight and data.get("pretraining_dataset"):
            raise ValueError(
                "pretraining_dataset is packed while it is streamed, and tmkl_context_weight (with tmkl_anchors) needs "
                "documents that can be told apart. Use datasets, or remove it."
            )
        return data


class TMKLPlugin(BasePlugin):
    """Adds :class:`~mask_the_target.TMKLCallback` to axolotl's trainer for supervised fine-tuning."""

    def get_input_args(self) -> str:
        return f"{__name__}.TMKLArgs"

    def add_callbacks_pre_trainer(self, cfg: Any, model: Any) -> list[Any]:
        # Before, not after, the trainer is built: then the base is settled before a checkpoint is loaded.
        return [callback_from(_settings(cfg), "the axolotl config")]


def _settings(config: Any) -> dict[str, Any]:
    return {key: value for key, value in config.items() if str(key).startswith(PREFIX)}
