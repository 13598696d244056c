"""The paper's adapters on SmolLM2-135M-Instruct, each with plain CE and with TMKL: what is learned, what is kept.

    python -m benchmarks.adapters                # about an hour on two cores; goes on where it was stopped
    python -m benchmarks.adapters --model package:gemma3-270m --adapters lora --steps 20

Each run is an `mtt train --adapter NAME` with the paper's settings (rank 64, alpha 2r, dropout 0.05, lr 5e-4, cosine)
on `arpabet`, saved, loaded onto the base again and measured. `pissa, off` is PiSSA anchored to what is left of the base
when the adapter is turned off, as an implementation would that doesn't audit its base: forced here, refused by attach.
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.measure import append_rows, context, run_alone
from mask_the_target.front.adapters import ADAPTERS

RUNS = [(name, method) for name in ADAPTERS for method in ("ce", "tmkl")] + [("pissa", "tmkl, base off")]
COLUMNS = ("learned", "exact", "text", "text_error", "masked_kl", "seconds", "peak_mib")


def measure_alone(args: argparse.Namespace) -> dict[str, Any]:
    """Train and measure one run, in this process."""
    import torch

    from mask_the_target import TMKLCallback
    from mask_the_target.base import Base, adapters_off
    from mask_the_target.front import train
    from mask_the_target.front.backbones import load_model, resolve_model
    from mask_the_target.front.demo import keep_freed_memory
    from mask_the_target.front.evaluate import ProbeSizes, add_paired_errors, evaluate_one
    from mask_the_target.front.options import parse

    class AnchoredToTheResidual(TMKLCallback):
        def on_init_end(self, *arguments: Any, **kwargs: Any) -> None:
            super().on_init_end(*arguments, **kwargs)
            inner = self._base.model  # type: ignore[union-attr]
            self._base = Base("off", inner, lambda: adapters_off(inner))

    keep_freed_memory()
    adapter, method = args.alone.split("/")
    forced = method == "tmkl, base off"
    folder = Path(tempfile.mkdtemp())
    options = {
        "model_name_or_path": args.model,
        "dataset_name": "recipe:arpabet",
        "dataset_train_split": f"train[:{args.steps * 8}]",
        "output_dir": folder / "run",
        "method": "ce" if forced else method,
        "tmkl_weight": 1.0,
        "adapter": adapter,
        "max_steps": args.steps,
        "per_device_train_batch_size": 8,
        "learning_rate": 5e-4,
        "lr_scheduler_type": "cosine",
        "warmup_steps": round(0.03 * args.steps),
        "weight_decay": 0.0,
        "bf16": False,
        "completion_only_loss": True,
        "gradient_checkpointing": False,
        "seed": args.seed,
        "logging_steps": 10,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }
    try:
        argv = [part for key, value in options.items() for part in (f"--{key}", str(value))]
        record = train.run(parse(argv), [AnchoredToTheResidual()] if forced else [])
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        model, tokenizer = load_model(resolve_model(args.model), folder / "run", dtype=torch.float32)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    sizes = ProbeSizes(target_rows=60, answer_rows=10, text_windows=15, facts_per_kind=1, drift_rows=20)
    asked: dict[str, Any] = {"target_rows": "arpabet", "sizes": sizes, "autocast": None}
    found = evaluate_one(model, tokenizer, ["target", "text", "drift"], **asked)
    with adapters_off(model):
        base = evaluate_one(model, tokenizer, ["text"], **asked)
    add_paired_errors(found, base)
    texts = [probe for probe in found if probe.startswith("text:")]
    return {
        "learned": found["target"]["loss"],
        "exact": found["target"]["exact_match"],
        "text": sum(found[probe]["loss"] - base[probe]["loss"] for probe in texts) / len(texts),
        "text_error": sum(found[probe]["stderr"] ** 2 for probe in texts) ** 0.5 / len(texts),
        "masked_kl": found["drift"]["masked_kl"],
        "seconds": record["seconds"],
        "peak_mib": peak,
    }


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.adapters", description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="package:smollm2", help="as in mtt; default %(default)s")
    parser.add_argument("--adapters", nargs="+", default=list(ADAPTERS), choices=ADAPTERS)
    parser.add_argument("--steps", type=int, default=60, help="optimiser steps of 8 pairs; default %(default)s")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--limit", type=float, default=3600.0, help="seconds a run may take; default %(default)s")
    parser.add_argument("--output", type=Path, default=Path(__file__).with_name("adapters.csv"))
    parser.add_argument("--alone", help=argparse.SUPPRESS)  # one run, in this process
    args = parser.parse_args(argv)
    if args.alone:
        answer = measure_alone(args)
        print(json.dumps(answer))
        return
    settings = {"model": args.model, "steps": str(args.steps), "seed": str(args.seed)}
    done = _read(args.output, settings)
    for adapter, method in RUNS:
        if adapter not in args.adapters or (adapter, method) in done:
            continue
        started = time.monotonic()
        print(f"{adapter}, {method} ...", flush=True)
        arguments = ["--model", args.model, "--steps", str(args.steps), "--seed", str(args.seed)]
        answer, reason = run_alone("benchmarks.adapters", [*arguments, "--alone", f"{adapter}/{method}"], args.limit)
        if answer is None:
            print(f"  failed: {reason}")
            continue
        found = json.loads(answer)
        row = context("cpu") | settings | {"adapter": adapter, "method": method}
        row |= {name: f"{value:.4f}" for name, value in found.items()}
        append_rows(args.output, [row])
        print(f"  {time.monotonic() - started:.0f} s", flush=True)
    print_table(_read(args.output, settings))


def _read(path: Path, settings: dict[str, str]) -> dict[tuple[str, str], dict[str, str]]:
    """Rows of these settings, by adapter and method."""
    import csv

    if not path.exists():
        return {}
    with path.open(newline="", encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if all(row[key] == value for key, value in settings.items())]
    return {(row["adapter"], row["method"]): row for row in rows}


def print_table(rows: dict[tuple[str, str], dict[str, str]]) -> None:
    """Markdown: loss on held-out answers (nats a token), exact answers, rise of the loss on English (nats)."""
    print("| adapter | method | answer loss | exact | rise on English text | masked KL | s | peak MiB |")
    print("|---|---|---|---|---|---|---|---|")
    for adapter, method in RUNS:
        row = rows.get((adapter, method))
        if row is not None:
            value = {name: float(row[name]) for name in COLUMNS}
            print(
                f"| {adapter} | {method} | {value['learned']:.3f} | {value['exact']:.0%} | "
                f"{value['text']:+.3f} ± {value['text_error']:.3f} | {value['masked_kl']:.2f} | "
                f"{value['seconds']:.0f} | {value['peak_mib']:.0f} |"
            )


if __name__ == "__main__":
    main()
