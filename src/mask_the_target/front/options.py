"""The options of `mtt train`: TRL's own and ours, read from a YAML file and the command line, all checked at once."""

from __future__ import annotations

import argparse
import difflib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

import torch

from mask_the_target import TMKL, CachedBase, TMKLCallback
from mask_the_target.anchors import Anchors
from mask_the_target.base import BaseChoice
from mask_the_target.front.adapters import ADAPTERS, DROPOUT, RANK, check_name, check_parts
from mask_the_target.front.rivals import METHOD_HELP, METHODS, STRENGTH_HELP, check_settings


@dataclass
class TMKLArguments:
    """Our options beside TRL's. `tmkl_*` are the fields of `mask_the_target.TMKL`; where none of them is given, the
    weights are those of `TMKL.recommended()`, or on data without prompts the base writes anchors (`train.run`)."""

    method: str = field(default="tmkl", metadata={"help": METHOD_HELP})
    rival_weight: float | None = field(default=None, metadata={"help": STRENGTH_HELP})
    tmkl_weight: float = field(
        default=1.0,
        metadata={
            "help": "Factor of the KL. Without any tmkl_* option, both weights are TMKL.recommended()'s; on data "
            "without prompts, 0 and a context weight of 1 with anchors: auto."
        },
    )
    tmkl_divergence: Literal["forward", "reverse", "jsd"] = field(
        default="forward", metadata={"help": "forward is KL(base || adapted)."}
    )
    tmkl_mask_target: bool = field(default=True, metadata={"help": "Remove the target from both distributions."})
    tmkl_renormalize: bool = field(default=True, metadata={"help": "Renormalise over the non-targets."})
    tmkl_position_weight: Literal["uniform", "non_target_mass"] = field(
        default="uniform", metadata={"help": "non_target_mass weighs each position by 1 - base probability of target."}
    )
    tmkl_temperature: float = field(default=1.0, metadata={"help": "Temperature of both; the KL is times its square."})
    tmkl_exclude_base_above: float | None = field(
        default=None, metadata={"help": "Leave out positions where the base gives the target more than this."}
    )
    tmkl_context_weight: float = field(
        default=0.0,
        metadata={"help": "Factor of the full KL at the prompt's positions, without a target; not in the paper."},
    )
    tmkl_context_tokens: int | None = field(
        default=None, metadata={"help": "At most so many of them a step, sampled; default: all."}
    )
    anchors: str = field(
        default="none",
        metadata={
            "help": "Sequences without a target, added to each batch for tmkl_context_weight to act on; not in the "
            "paper. auto: the base writes them before training. Or a file: what mtt anchors wrote, or rows of your own."
        },
    )
    anchor_share: float = field(default=0.25, metadata={"help": "The share of a batch's tokens that are anchors."})
    max_drift: float | None = field(
        default=None,
        metadata={
            "help": "The KL at context positions to keep to, nats per token: the weight follows, beginning with "
            "tmkl_context_weight. Default: a fixed weight."
        },
    )
    base: Literal["auto", "off", "initial", "cached"] = field(
        default="auto",
        metadata={
            "help": "Where the base comes from: adapter off, or a frozen initial adapter; auto chooses. cached: auto, "
            "with its hidden states kept on disk, so that its pass is paid in the first epoch only."
        },
    )
    cache_folder: str | None = field(
        default=None, metadata={"help": "Where base: cached keeps them. Default: $MTT_CACHE, or ~/.cache."}
    )
    cache_limit_gib: float = field(default=50.0, metadata={"help": "The most that they may take, in GiB."})
    cache_dtype: Literal["model", "bfloat16"] = field(
        default="model", metadata={"help": "model: hidden states as they are. bfloat16: rounded, half of float32."}
    )
    drift_rows: int = field(
        default=0,
        metadata={
            "help": "With any method, log the KL from the base on this many held-out rows (dataset_test_split) as "
            "held_out_kl, without the target, and held_out_full_kl: what forgetting can be foreseen by."
        },
    )

    adapter: str | None = field(
        default=None,
        metadata={
            "help": f"One of {', '.join(ADAPTERS)}, with the settings of the paper: lora_r 64, lora_alpha 2r, "
            "lora_dropout 0.05, all linear layers; options that are given win. vera: projections of rank 4r, no alpha. "
            "randlora: 8 bases of rank r/8. pissa: saved as plain LoRA of rank 2r. adalora: 1.5r pruned to r; the "
            "paper's 200 steps before and 1000 after pruning are at most a tenth and a half of the run; its "
            "orthogonality penalty acts on the gradients and is not in the logged loss. Default: TRL's LoRA options."
        },
    )

    def base_choice(self) -> BaseChoice | CachedBase:
        """`base=` of the callback. Raises ValueError with a sentence on a bad value."""
        cached = CachedBase(folder=self.cache_folder, limit_gib=self.cache_limit_gib, dtype=self.cache_dtype)
        return cached if self.base == "cached" else self.base

    def callback(self) -> TMKLCallback:
        """For `method: tmkl`. Raises ValueError with a sentence on a bad value."""
        anchors = None if self.anchors == "none" else Anchors(self.anchors, share=self.anchor_share)
        return TMKLCallback(self.options(), base=self.base_choice(), anchors=anchors, max_drift=self.max_drift)

    def options(self) -> TMKL:
        """The same as a `TMKL`. Raises ValueError with a sentence on a bad value."""
        return TMKL(
            weight=self.tmkl_weight,
            divergence=self.tmkl_divergence,
            mask_target=self.tmkl_mask_target,
            renormalize=self.tmkl_renormalize,
            position_weight=self.tmkl_position_weight,
            temperature=self.tmkl_temperature,
            exclude_base_above=self.tmkl_exclude_base_above,
            context_weight=self.tmkl_context_weight,
            context_tokens=self.tmkl_context_tokens,
        )


@dataclass
class Settings:
    """One run: TRL's four option objects, ours, and the file they came from (None: command line only).

    `recommended`: nothing was said of the objective, so it is ours to choose by the data.
    """

    script: Any
    training: Any
    model: Any
    mixture: Any
    tmkl: TMKLArguments
    config: str | None = None
    recommended: bool = False


def parse(argv: Sequence[str]) -> Settings:
    """Read `CONFIG.yaml` (first argument, optional) and `--key value` with TRL's parser, and check all of it.

    Raises ValueError or FileNotFoundError with a sentence for an unknown option, a bad value, or a combination that
    cannot work. Nothing is loaded.
    """
    try:
        from trl import DatasetMixtureConfig, ModelConfig, ScriptArguments, SFTConfig, TrlParser
    except ImportError as error:
        raise ModuleNotFoundError(
            f"mtt train needs TRL and datasets ({error}). Install them with: pip install 'mask-the-target[train]'"
        ) from error

    args = list(argv)
    if args and not args[0].startswith("-"):
        args.insert(0, "--config")
    kinds: Any = (ScriptArguments, SFTConfig, ModelConfig, DatasetMixtureConfig, TMKLArguments)
    parser = TrlParser(
        kinds,
        prog="mtt train",
        usage="mtt train [CONFIG.yaml] [--key value ...]",
        description="TRL's SFT options, and ours (method, tmkl_*), in a YAML file or on the command line.",
        allow_abbrev=False,
    )
    parser.set_defaults(use_peft=True, lora_target_modules=["all-linear"], use_cpu=not torch.accelerator.is_available())
    config, given = None, _check_flags(parser, args)
    if "--config" in args:
        position = args.index("--config") + 1
        if position >= len(args):
            raise ValueError("--config needs the path of a YAML file.")
        config = args[position]
        given |= _check_config(parser, config)
    script, training, model, mixture, tmkl = parser.parse_args_and_config(args)
    settings = Settings(script, training, model, mixture, tmkl, config)
    if tmkl.method == "tmkl" and not any(name.startswith("tmkl_") for name in given):
        recommended = TMKL.recommended()
        tmkl.tmkl_weight, tmkl.tmkl_context_weight = recommended.weight, recommended.context_weight
        settings.recommended = not given & {"anchors", "max_drift"}
    _check_settings(settings)
    if tmkl.adapter is not None:
        _settle_adapter(settings, tmkl.adapter, given)
    return settings


def settings_parser(settings: type, prog: str, description: str) -> argparse.ArgumentParser:
    """A command's parser with one flag for each field of a dataclass of settings, of its default's type."""
    parser = argparse.ArgumentParser(
        prog=prog,
        description=description,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    for option in fields(settings):
        kind: Callable[[str], Any] = type(option.default)
        names = (f"--{option.name}", f"--{option.name.replace('_', '-')}")
        parser.add_argument(*names, type=kind, default=option.default)
    return parser


def check_numbers(settings: Any, *, whole: Sequence[str], positive: Sequence[str]) -> None:
    """Raises ValueError, naming the flag, for a field of `whole` below 1, and of `positive` not between 0 and inf."""
    for name in whole:
        if getattr(settings, name) < 1:
            raise ValueError(f"--{name} is {getattr(settings, name)}; it must be at least 1.")
    for name in positive:
        if not 0 < getattr(settings, name) < math.inf:
            raise ValueError(f"--{name} is {getattr(settings, name)}; it must be a positive number.")


def _unknown(name: str, known: Sequence[str], where: str) -> ValueError:
    close = difflib.get_close_matches(name, known, n=1)
    hint = f"Did you mean {close[0]!r}?" if close else "Run 'mtt train --help' for all options."
    return ValueError(f"Unknown option {name!r} {where}. {hint}")


def _check_flags(parser: argparse.ArgumentParser, args: Sequence[str]) -> set[str]:
    """The names of the options that are given on the command line."""
    known = parser._option_string_actions
    given = set()
    for argument in args:
        flag = argument.split("=", 1)[0]
        if flag in known:
            given.add(known[flag].dest)
        elif flag.startswith("--") and flag != "--config":
            raise _unknown(flag, list(known), "on the command line")
    return given


def _check_config(parser: argparse.ArgumentParser, path: str) -> set[str]:
    """The names of the options that a YAML file gives.

    The parser takes its values as they are; here each is checked like one from the command line.
    """
    import yaml

    if not Path(path).is_file():
        raise FileNotFoundError(f"There is no config file {path!r}.")
    try:
        config = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"{path} must hold 'key: value' lines, but its content is {config!r:.80}.")
    actions = {action.dest: action for action in parser._actions}
    for key, value in config.items():
        if key == "env":  # environment variables, which TRL's parser sets
            continue
        if key not in actions:
            raise _unknown(str(key), list(actions), f"in {path}")
        if value is not None and not isinstance(value, (list, dict)):
            _check_value(actions[key], value, f"{path}: {key}")
    return {key for key, value in config.items() if value is not None}


def _check_value(action: argparse.Action, value: Any, where: str) -> None:
    hint = " (YAML reads a bare no/yes/on/off as true or false: write it in quotes)" if isinstance(value, bool) else ""
    converted = value
    if callable(action.type):
        try:
            converted = action.type(str(value))
        except (ValueError, TypeError, KeyError, argparse.ArgumentTypeError):
            name = getattr(action.type, "__name__", "")
            kind = name if name in ("int", "float") else "bool" if "bool" in name else "value"
            raise ValueError(f"{where}: {value!r} is not a valid {kind}{hint}.") from None
    if action.choices is not None and converted not in action.choices:
        options = ", ".join(map(str, action.choices))
        raise ValueError(f"{where}: {value!r} is not one of: {options}{hint}.")


def _check_settings(settings: Settings) -> None:
    training, model, script, tmkl = settings.training, settings.model, settings.script, settings.tmkl
    check_name(tmkl.method, METHODS, "method")
    check_settings(settings)
    tmkl.callback()
    if tmkl.method != "tmkl" and (tmkl.anchors != "none" or tmkl.max_drift is not None):
        raise ValueError(f"anchors and max_drift are parts of TMKL, and method is {tmkl.method!r}. Set method: tmkl.")
    if tmkl.drift_rows < 0:
        raise ValueError(f"drift_rows is {tmkl.drift_rows}; it is a number of rows, 0 for none.")
    if not model.use_peft:
        raise ValueError(
            "use_peft is false, which asks for a full fine-tune. TMKL takes its base distribution from the same model "
            "with the adapter off, so it needs an adapter: remove use_peft, or use TRL's own `trl sft`."
        )
    if tmkl.method == "tmkl" and training.label_smoothing_factor > 0:
        raise ValueError(
            f"label_smoothing_factor is {training.label_smoothing_factor}: smoothing replaces the loss that TMKL is "
            "part of, and its uniform pull works against keeping the base. Remove it, or set method: ce."
        )
    if tmkl.method == "tmkl" and getattr(training, "loss_type", None) == "dft":
        raise ValueError(
            "loss_type is 'dft', which reweighs every token's loss and so the KL in it. Use loss_type: nll, or "
            "set method: ce."
        )
    if getattr(training, "trust_remote_code", False) or getattr(model, "trust_remote_code", False):
        raise ValueError("trust_remote_code is true: mtt never runs code that came with a model. Remove it.")
    if not script.dataset_name and not settings.mixture.datasets:
        raise ValueError(
            "No data given. Set dataset_name to a local .jsonl, .json, .csv or .parquet file, a folder, a data set's "
            "name, or 'recipe:NAME' (recipe:arpabet, for one)."
        )


def _settle_adapter(settings: Settings, name: str, given: set[str]) -> None:
    """Refuse what the named adapter can't do, and write the paper's settings where the user gave no others."""
    model, training = settings.model, settings.training
    check_name(name)
    for option, other in (("use_dora", "dora"), ("use_rslora", "rslora")):
        if getattr(model, option):
            raise ValueError(
                f"adapter is {name!r}, and {option} is true, which chooses an adapter too. Remove {option}"
                + (f", or set adapter: {other}." if name != other else ".")
            )
    check_parts(name, model.lora_alpha if "lora_alpha" in given else None, model.lora_target_parameters)
    if name == "pissa" and (model.load_in_4bit or model.load_in_8bit):
        raise ValueError("PiSSA decomposes the base's weights, which must not be quantised. Remove load_in_4bit/8bit.")
    if name == "pissa" and settings.tmkl.base == "off":
        raise ValueError(
            "PiSSA moves a part of the base's weights into the adapter: with it off, the model is not the base. "
            "Leave base at auto."
        )
    if name == "pissa" and training.push_to_hub:
        raise ValueError(
            "push_to_hub would publish PiSSA's adapter before it is converted to plain LoRA, and that one doesn't fit "
            "the base. Remove it, and upload the output folder when the run is complete."
        )
    if name == "adalora" and training.fp16:
        raise ValueError("AdaLoRA reads the gradients at each step, and fp16 scales them. Use bf16.")
    if "lora_r" not in given:
        model.lora_r = RANK
    if "lora_alpha" not in given:
        model.lora_alpha = 2 * model.lora_r
    if "lora_dropout" not in given:
        model.lora_dropout = DROPOUT
