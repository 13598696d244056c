"""LLaMA-Factory: `mtt llamafactory CONFIG.yaml` in place of `llamafactory-cli train CONFIG.yaml`.

The YAML is LLaMA-Factory's own, with `tmkl_*` keys beside its (and `key=value` behind it, as there): ours are taken
out, and `run_exp` gets the rest, with TMKLCallback. On more than one device:

    torchrun --nproc_per_node 2 --no-python mtt llamafactory CONFIG.yaml
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from mask_the_target.integrations.settings import PREFIX, callback_from
from mask_the_target.integrations.transformers import TMKLCallback

# Keys that make LLaMA-Factory train on another loss than the model's own, or in another trainer.
_OTHER_LOSSES = ("use_dft_loss", "use_asft_loss", "use_eaft_loss", "use_mca", "use_hyper_parallel")


def main(argv: Sequence[str]) -> int:
    """Train as ``llamafactory-cli train`` does, with TMKL. Returns 0.

    Raises:
        ValueError, FileNotFoundError, ModuleNotFoundError: with a sentence, before anything is loaded, for what can't
            work. LLaMA-Factory's own checks follow.
    """
    parser = argparse.ArgumentParser(
        prog="mtt llamafactory",
        description="LLaMA-Factory's training, with tmkl_* keys in its YAML: " + __doc__.split("\n\n")[1],
        allow_abbrev=False,
    )
    parser.add_argument("config", type=Path, help="what llamafactory-cli train reads; tmkl_weight and others added")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="instead of the file's")
    given = parser.parse_args(list(argv))
    try:
        from llamafactory.train.tuner import run_exp
        from omegaconf import OmegaConf
    except ImportError as error:
        raise ModuleNotFoundError(
            f"mtt llamafactory needs LLaMA-Factory ({error}). Install it with: pip install llamafactory"
        ) from error
    if not given.config.is_file():
        raise FileNotFoundError(f"There is no config file '{given.config}'.")
    merged = OmegaConf.merge(OmegaConf.load(given.config), OmegaConf.from_cli(given.overrides))
    config: Any = OmegaConf.to_container(merged)
    ours = {key: config.pop(key) for key in list(config) if key.startswith(PREFIX)}
    callback = callback_from(ours, str(given.config))
    _check(config, callback)
    run_exp(config, callbacks=[callback])
    return 0


def _check(config: dict[str, Any], callback: TMKLCallback) -> None:
    stage, kind = config.get("stage", "sft"), config.get("finetuning_type", "lora")
    if stage not in ("sft", "pt"):
        raise ValueError(
            f"stage is {stage!r}, whose loss is not the model's own, and TMKL would not be in it. TMKL is for "
            "stage: sft (or pt)."
        )
    if stage == "pt" and callback.anchors is not None:
        raise ValueError(
            "stage: pt makes targets of every token, anchors too, so that they would be learned. Remove tmkl_anchors, "
            "or use stage: sft."
        )
    if callback.anchors is not None and (config.get("packing") or config.get("neat_packing")):
        raise ValueError(
            "packing: rows that are packed can't be padded in LLaMA-Factory, and an anchor is another row of the "
            "batch. Remove packing, or tmkl_anchors."
        )
    if callback.options.context_weight and config.get("neat_packing"):
        raise ValueError(
            "neat_packing gives tmkl_context_weight no mask in which padding can be told from a prompt. Remove it."
        )
    if kind not in ("lora", "oft"):
        raise ValueError(
            f"finetuning_type is {kind!r}, which trains the base's own weights. TMKL takes its base from the same "
            "model with the adapter off: set finetuning_type: lora (or oft)."
        )
    for key in _OTHER_LOSSES:
        if config.get(key):
            raise ValueError(
                f"{key} makes LLaMA-Factory train on another loss than the model's own, and TMKL would not be in it. "
                "Remove it, or use llamafactory-cli."
            )
    if _on("USE_MCA"):
        raise ValueError("USE_MCA=1 trains in Megatron, which doesn't run the model's own loss. Unset it.")
    if config.get("use_ray") or _on("USE_RAY"):
        raise ValueError("Ray runs the training in processes of its own, where TMKL isn't. Unset USE_RAY.")
    if (torch.accelerator.device_count() > 1 or _on("FORCE_TORCHRUN")) and "LOCAL_RANK" not in os.environ:
        raise ValueError(
            "llamafactory-cli would start one process for each device by itself; mtt doesn't. Start them: torchrun "
            "--nproc_per_node N --no-python mtt llamafactory CONFIG.yaml, or make one device visible."
        )


def _on(name: str) -> bool:
    return os.environ.get(name, "0").lower() in ("true", "y", "1")  # as LLaMA-Factory reads it
