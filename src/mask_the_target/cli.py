"""The command `mtt`. Imports are light, so that `mtt --help` answers at once."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import shlex
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

USAGE = """usage: mtt COMMAND ...

Fine-tune with target-masked KL, and see what was learned and what was kept.

  mtt demo                           the main job on a small model: plain CE beside TMKL, with a table and a page
  mtt train CONFIG.yaml              train an adapter; a TRL user's SFT config works as it is
  mtt cache CONFIG.yaml              run the base once over a config's data, for mtt train --base cached
  mtt anchors --model M              let a model write the sequences that hold it in place (mtt train --anchors FILE)
  mtt eval --model M --adapter DIR   measure base and adapted model in one load
  mtt sweep STUDY.yaml               every run of a study once, by any number of workers: methods, settings, seeds
  mtt suggest --model M --data D     a weight and a learning rate for your model and data, from a short pilot
  mtt report STUDY                   a study's page: fronts, figures with intervals, curves and answers; PNG and CSV
  mtt llamafactory CONFIG.yaml       LLaMA-Factory's `llamafactory-cli train`, with TMKL and tmkl_* keys in its YAML
  mtt diagnostic                     CE, CE + full KL and CE + TMKL on a toy: what each does to the distributions

'mtt COMMAND --help' lists a command's options. MTT_TRACEBACK=1 shows where an error came from.
"""
# Initialisations that rewrite the base's weights when they are loaded: with the adapter off, it is not the base.
REWRITES_BASE = ("pissa", "olora", "corda", "lora_ga", "loftq")


def _anchors(argv: Sequence[str]) -> int:
    """Write anchors with a model as it stands, to be read and kept beside the data. Refuses to write over a file."""
    from mask_the_target.anchors import Anchors, save_anchors, write_anchors

    parser = argparse.ArgumentParser(
        prog="mtt anchors",
        description="Let a model write the short sequences that hold it in place while it is trained.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--model", default="package:smollm2", help="hub name, folder, or package:NAME")
    parser.add_argument("--count", type=int, default=Anchors.count, help="how many, all different")
    parser.add_argument("--length", type=int, default=Anchors.length, help="tokens of each, at most")
    parser.add_argument("--temperatures", default="0.7,1.0", help="of the sampling, by commas; they take turns")
    parser.add_argument("--seed", type=int, default=Anchors.seed)
    parser.add_argument("--output", type=Path, default=Path("anchors.jsonl"), help="JSON Lines")
    options = parser.parse_args(list(argv))

    from mask_the_target.front.backbones import find_model, load_model

    Anchors(count=options.count, length=options.length)  # checks both
    try:
        temperatures = [float(value) for value in options.temperatures.split(",")]
    except ValueError:
        temperatures = []
    if not temperatures or not all(0 < value < float("inf") for value in temperatures):
        raise ValueError(f"--temperatures is {options.temperatures!r}; give positive numbers, like 0.7,1.0.")
    if options.output.exists():
        raise ValueError(f"{options.output} exists already. Choose another --output, or remove it.")
    path, _ = find_model(options.model)
    model, tokenizer = load_model(path, None)
    rows = write_anchors(
        model, tokenizer, options.count, length=options.length, temperatures=temperatures, seed=options.seed
    )
    save_anchors(rows, options.output)
    print(f"{len(rows)} anchors in {options.output}. Train with them: mtt train ... --anchors {options.output}")
    return 0


def _eval(argv: Sequence[str]) -> int:
    """Measure a model, and with --adapter base and adapted in one load. Input is checked before weights are read."""
    parser = argparse.ArgumentParser(
        prog="mtt eval",
        description="Measure what a model has learned and what it has kept.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--model", default="package:smollm2", help="hub name, folder, or package:NAME")
    parser.add_argument("--adapter", type=Path, help="folder of a PEFT adapter (safetensors)")
    parser.add_argument(
        "--probes",
        help="of target, text, facts, facts:system, facts:alpaca, facts:plain, instructions, drift, lm_eval:TASK (or "
        "FILE.yaml), by commas; default: target and drift where they apply, text, facts",
    )
    rows_from = parser.add_mutually_exclusive_group()
    rows_from.add_argument("--recipe", help="held-out pairs for target and drift: a built-in recipe's test split")
    rows_from.add_argument("--dataset", help="held-out pairs for target and drift: a data file, folder or name")
    parser.add_argument("--split", help="split of --dataset; default: test if there is one, else the first")
    parser.add_argument("--quick", action="store_true", help="about a third of the samples")
    parser.add_argument("--output", type=Path, help="write the results as JSON to this file")
    options = parser.parse_args(list(argv))

    from mask_the_target.front import report
    from mask_the_target.front.backbones import find_model, load_model
    from mask_the_target.front.evaluate import ProbeSizes, check_probes, evaluate_one, evaluate_pair, load_tasks
    from mask_the_target.front.recipes import find_recipe
    from mask_the_target.front.record import versions, write_json

    rows: Any = options.recipe
    if options.recipe is not None:
        find_recipe(options.recipe)
    elif options.dataset is not None:
        rows = held_out_rows(options.dataset, options.split)
    if options.probes is None:
        probes = ["text", "facts"] if rows is None else ["target", "text", "facts"]
        probes += ["drift"] if rows is not None and options.adapter is not None else []
    else:
        probes = [probe.strip() for probe in options.probes.split(",") if probe.strip()]
    probes = check_probes(probes)
    for probe in probes:
        if probe in ("target", "drift") and rows is None:
            raise ValueError(f"The probe {probe!r} needs held-out pairs: add --recipe NAME or --dataset FILE.")
        if probe == "drift" and options.adapter is None:
            raise ValueError("The probe 'drift' compares base and adapted: add --adapter DIR, or leave it out.")

    path, config = find_model(options.model)
    if options.adapter is not None:
        check_adapter(options.adapter, config)
    load_tasks(probes)

    started = time.monotonic()
    model, tokenizer = load_model(path, options.adapter)
    common: dict[str, Any] = {
        "probes": probes,
        "target_rows": rows,
        "sizes": ProbeSizes.quick() if options.quick else ProbeSizes.full(),
        "progress": True,
    }
    found = (
        evaluate_pair(model, tokenizer, **common)
        if options.adapter is not None
        else {"base": evaluate_one(model, tokenizer, **common)}
    )
    comparison = {
        "title": f"{options.model}" + (f" with {options.adapter}" if options.adapter is not None else ""),
        "command": shlex.join(["mtt", "eval", *argv]),
        "settings": {name: str(value) for name, value in vars(options).items() if value is not None},
        "versions": versions(),
        "machine": report.machine(),
        "seconds": {"measuring": time.monotonic() - started},
        "arms": [{"name": name, "probes": result} for name, result in found.items()],
    }
    report.print_table(comparison)
    if options.output is not None:
        write_json(options.output, comparison)
        print(f"Written to {options.output}.")
    return 0


def held_out_rows(name: str, split: str | None = None, config: str | None = None) -> list[dict[str, Any]]:
    """Prompt-completion rows of a data file, folder or name; of `messages`, the last turn is the completion.

    Raises ValueError or FileNotFoundError with a sentence.
    """
    from mask_the_target.front.data import check_columns, load_named, take_split

    found: Any = load_named(name, config, False)
    if split is None:
        split = "test" if "test" in found else next(iter(found))
    table = take_split(found, split, name)
    check_columns(table, "text", name)
    if "prompt" in table.column_names:
        return [{"prompt": row["prompt"], "completion": row["completion"]} for row in table]
    if "messages" not in table.column_names:
        raise ValueError(
            f"{name}: the probes 'target' and 'drift' need a prompt and its answer: columns 'prompt' and 'completion', "
            f"or 'messages'. Columns found: {', '.join(table.column_names)}."
        )
    for number, row in enumerate(table):
        if len(row["messages"]) < 2 or row["messages"][-1].get("role") != "assistant":
            raise ValueError(
                f"{name}: the messages of row {number} (counted from 0) don't end with the assistant's answer to "
                "something, so there is no held-out answer to measure."
            )
    return [{"prompt": row["messages"][:-1], "completion": row["messages"][-1:]} for row in table]


def check_adapter(folder: Path, config: Any) -> None:
    """Refuse an adapter that doesn't fit the model of `config`, or whose "off" is not that model; no weight is read.

    The model is built without memory, with the adapter that adapter_config.json describes, and its shapes are compared
    with those in the header of adapter_model.safetensors. Raises ValueError or FileNotFoundError with a sentence.
    """
    import torch
    from peft import PeftConfig, get_peft_model, get_peft_model_state_dict
    from safetensors import SafetensorError, safe_open
    from transformers import AutoModelForCausalLM

    import mask_the_target.sine_lora  # noqa: F401  PEFT then knows it

    if not (folder / "adapter_config.json").is_file():
        raise FileNotFoundError(f"{folder} is not an adapter: it has no adapter_config.json.")
    weights = folder / "adapter_model.safetensors"
    if not weights.is_file():
        pickled = (folder / "adapter_model.bin").is_file()
        reason = "only adapter_model.bin, a pickle, which can run code" if pickled else "no weights"
        raise FileNotFoundError(f"{folder} has no adapter_model.safetensors, but {reason}. Save it as safetensors.")
    try:
        initial = str(json.loads((folder / "adapter_config.json").read_text()).get("init_lora_weights", "")).lower()
        if initial.startswith(REWRITES_BASE):
            raise ValueError(
                f"{folder} was initialised with {initial!r}, which rewrote the base's weights: with the adapter off, "
                "the model is not the base. Convert it to plain LoRA when saving (PEFT: save_pretrained with "
                "path_initial_model_for_weight_conversion)."
            )
        adapter = PeftConfig.from_pretrained(str(folder))
    except (json.JSONDecodeError, AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"{folder / 'adapter_config.json'} cannot be read: {error}") from error
    kind = str(getattr(adapter.peft_type, "value", adapter.peft_type))
    if adapter.is_prompt_learning or kind == "ADAPTION_PROMPT":
        raise ValueError(
            f"{folder} is a prompt-learning adapter ({kind}): it adds tokens instead of changing layers, so base and "
            "adapted can't be compared position by position. Use LoRA or another adapter of layers."
        )
    try:
        with safe_open(weights, "pt") as file:
            found = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{weights} is not a whole safetensors file: {error}") from error
    adapter.inference_mode = True
    ranks, kept = getattr(adapter, "rank_pattern", None), {}
    if kind == "ADALORA" and ranks:  # a list of what was kept of each rank; there is nothing to index without memory
        kept = {f"base_model.model.{name.removesuffix('.lora_E')}.": sum(which) for name, which in ranks.items()}
        adapter.rank_pattern = None
    try:
        with torch.device("meta"):
            model = get_peft_model(AutoModelForCausalLM.from_config(config), adapter)
    except (ValueError, RuntimeError) as error:
        raise ValueError(
            f"{folder} doesn't fit this {type(config).__name__.removesuffix('Config')}: {error}"
        ) from error
    expected = {n: tuple(t.shape) for n, t in get_peft_model_state_dict(model, save_embedding_layers=False).items()}
    for name, shape in expected.items():
        module, _, factor = name.rpartition("lora_")
        if module in kept:
            expected[name] = (shape[0], kept[module]) if factor == "B" else (kept[module], shape[1])
    base = {n: tuple(t.shape) for n, t in model.get_base_model().state_dict().items()}  # for saved embeddings
    for name in [*expected, *(name for name in found if name not in expected)]:
        module = name.removeprefix("base_model.model.")
        wanted = expected.get(name, base.get(module, base.get(module.replace(".weight", ".base_layer.weight"))))
        if name not in found:
            reason = f"the model needs {module}, which the adapter doesn't have"
        elif wanted is None:
            reason = f"it adapts {module}, which the model doesn't have"
        elif wanted != found[name]:
            reason = f"{module} has shape {found[name]}, the model needs {wanted}"
        else:
            continue
        raise ValueError(f"{folder} doesn't fit the model: {reason}.")


def _of(module: str, name: str = "main") -> Callable[[Sequence[str]], int]:
    """A command that lies in a module, which is imported when the command is run."""

    def run(argv: Sequence[str]) -> int:
        return getattr(importlib.import_module(f"mask_the_target.{module}"), name)(argv)

    return run


COMMANDS: dict[str, Callable[[Sequence[str]], int]] = {
    "train": _of("front.train"),
    "cache": _of("front.train", "cache_main"),
    "anchors": _anchors,
    "eval": _eval,
    "demo": _of("front.demo"),
    "sweep": _of("front.sweep"),
    "suggest": _of("front.suggest"),
    "report": _of("front.study_report"),
    "llamafactory": _of("integrations.llamafactory"),
    "diagnostic": _of("front.diagnostic"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command. Returns the exit status: 0, 2 for input that cannot work (the reason is on standard error),
    3 for a run that a NaN stopped, 130 after Ctrl-C."""
    args = list(sys.argv[1:] if argv is None else argv)
    if not args or args[0] in ("-h", "--help"):
        print(USAGE, end="")
        return 0 if args else 2
    if args[0] == "--version":
        from importlib.metadata import PackageNotFoundError, version

        try:
            print(version("mask-the-target"))
        except PackageNotFoundError:
            print("not installed (run from source)")
        return 0
    if args[0] not in COMMANDS:
        print(f"mtt: unknown command {args[0]!r}; commands are: {', '.join(COMMANDS)}.", file=sys.stderr)
        return 2
    # Libraries that tell each other about renamed arguments: nothing that the user of a command can change.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(transformers|trl|peft)\.")
    try:
        return COMMANDS[args[0]](args[1:])
    except KeyboardInterrupt as interrupt:
        print(f"\nmtt: {str(interrupt) or 'interrupted.'}", file=sys.stderr)
        return 130
    except (ValueError, OSError, ImportError, RuntimeError) as error:
        stopped = type(error).__name__ == "BadLossError"
        if os.environ.get("MTT_TRACEBACK") or (isinstance(error, RuntimeError) and not stopped):
            traceback.print_exc()
        reason = str(error)
        if isinstance(error, ModuleNotFoundError) and error.name is not None:  # ours, which say what to do, have none
            reason = f"it needs {error.name}. Install it with: pip install 'mask-the-target[front]'"
        print(f"mtt {args[0]}: {reason}", file=sys.stderr)
        return 3 if stopped else 2


if __name__ == "__main__":
    raise SystemExit(main())
