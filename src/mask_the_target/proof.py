"""Whether an adapter turned off gives the base back: proved on a toy with the adapter's own config.

Initialisations that take the adapter's start out of the base weights, and adapters that rewrite the layers they stand
on, can't be told from the adapted model alone, and each release of PEFT brings new ones. So nothing is tabulated: the
config that the user's adapter was made with makes one on a small model whose base is known.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn

from mask_the_target.head import base_layer, evaluating

# Every usual block size and rank fits.
_WIDTH = 256
# What would name modules, layers or tokens that the toy doesn't have.
_ABSENT = (
    "exclude_modules",
    "layers_to_transform",
    "layers_pattern",
    "modules_to_save",
    "modules_to_tie",  # this and the next: what PEFT found tied in the user's model
    "target_modules_to_tie",
    "target_parameters",
    "trainable_token_indices",
    "layer_replication",
    "feedforward_modules",
)
_PATTERNS = ("rank_pattern", "alpha_pattern")


def off_is_base(
    config: Any, layers: list[Any], adapters_off: Callable[[nn.Module], AbstractContextManager[None]]
) -> str | None:
    """None where the proof holds, else how it failed.

    Args:
        config: PEFT's config of the adapter.
        layers: the adapter's layers in the user's model, whose kinds choose the toy's targets.
        adapters_off: the toggle that will be used.

    Raises:
        Exception: whatever PEFT raises where the config makes no adapter on the toy: nothing is proved then.
    """
    from peft import get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.random.fork_rng(devices=[]), warnings.catch_warnings(), torch.device("cpu"):
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        toy = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=64,
                hidden_size=_WIDTH,
                intermediate_size=_WIDTH,
                num_hidden_layers=1,
                num_attention_heads=2,
                num_key_value_heads=2,
            )
        ).float()
        inputs = {"input_ids": torch.arange(8).reshape(2, 4), "use_cache": False}
        with torch.no_grad(), evaluating(toy):
            before = toy(**inputs).logits
        get_peft_model(toy, _for_toy(config, layers))
        for moved in (False, True):
            if moved:
                for parameter in toy.parameters():
                    if parameter.requires_grad:
                        parameter.data += 0.05 * torch.randn_like(parameter)
            with torch.no_grad(), evaluating(toy), adapters_off(toy):
                off = toy(**inputs).logits
            if not torch.equal(off, before):
                return (
                    f"{'once trained, ' if moved else ''}the logits differ by {float((off - before).abs().max()):.2g}"
                )
    return None


def _for_toy(config: Any, layers: list[Any]) -> Any:
    config = copy.deepcopy(config)
    kinds = {type(base_layer(layer)).__name__ for layer in layers}
    targets = {"embed_tokens" if "Embedding" in kind else "norm" if "Norm" in kind else "linear" for kind in kinds}
    modules = ["embed_tokens"] if "embed_tokens" in targets else []
    modules += ["input_layernorm"] if "norm" in targets else []
    modules += ["q_proj", "down_proj"] if "linear" in targets else []
    config.target_modules = modules
    config.inference_mode = False
    for name in _ABSENT:
        if getattr(config, name, None) is not None:
            setattr(config, name, None)
    for name in _PATTERNS:
        if getattr(config, name, None):
            setattr(config, name, {})
    return config
