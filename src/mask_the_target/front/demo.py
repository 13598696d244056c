"""`mtt demo`: the main job on a small real model. Plain CE beside TMKL, same seed, data and steps; then what each
learned and what each kept.

Every phase leaves a file that is written whole or not at all, so the same command goes on after Ctrl-C:

    settings.json                 what was asked; other settings need another folder
    ce/, tmkl/                    ordinary `mtt train` runs, with the trainer's checkpoints
    measured/ARM.PROBE.json       one probe on one arm, with per-sample values
    results.json, report.html, front.png
"""

from __future__ import annotations

import ctypes
import json
import shlex
import statistics
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from mask_the_target.base import adapters_off
from mask_the_target.files import write_whole
from mask_the_target.front import report, train
from mask_the_target.front.backbones import DEFAULT_MODEL, load_model, resolve_model
from mask_the_target.front.evaluate import SIZES, add_paired_errors, evaluate_one, fast_bfloat16
from mask_the_target.front.options import check_numbers, parse, settings_parser
from mask_the_target.front.recipes import find_recipe
from mask_the_target.front.record import model_card, versions, write_json

ARMS = {"ce": "CE", "tmkl": "CE + TMKL"}  # trained
# Measured: plain CE's adapter at half its scale costs nothing, so a regulariser has to beat it.
MEASURED = {"base": "base", "ce": "CE", "ce_half": "CE, adapter x 0.5", "tmkl": "CE + TMKL"}
PROBES = ("target", "text:python_docs", "text:bible", "facts", "drift")
Measured = dict[str, dict[str, Any]]  # probe -> metrics and "samples"


@dataclass(frozen=True)
class Demo:
    """What is run. Sizes are chosen to end within 12 minutes on two idle cores."""

    model: str = DEFAULT_MODEL
    recipe: str = "arpabet"
    steps: int = 160
    batch: int = 8
    learning_rate: float = 1e-3
    weight: float = 1.0
    rank: int = 16
    seed: int = 0
    probes: str = "quick"  # of evaluate.SIZES; tiny: to try the command
    precision: str = "auto"  # auto: bf16 autocast where that is the faster one here

    def __post_init__(self) -> None:
        check_numbers(self, whole=("steps", "batch", "rank"), positive=("learning_rate", "weight"))
        if self.precision not in ("auto", "bf16", "fp32"):
            raise ValueError(f"--precision is {self.precision!r}; it must be auto, bf16 or fp32.")
        if self.probes not in SIZES:
            raise ValueError(f"--probes is {self.probes!r}; it must be one of: {', '.join(SIZES)}.")
        find_recipe(self.recipe)


def run(
    demo: Demo, output: Path, command: str = "mtt demo", callbacks: Sequence[TrainerCallback] = ()
) -> dict[str, Any]:
    """Do what is not done yet in `output`, and return the comparison (see `report`), which is also results.json."""
    demo = _settle(demo, output)
    print("[1/4] Model and data", flush=True)
    path = resolve_model(demo.model)
    records = {}
    for number, (arm, name) in enumerate(ARMS.items(), 2):
        print(f"[{number}/4] Training with {name}: {demo.steps} steps of {demo.batch} pairs", flush=True)
        records[arm] = _train(demo, arm, output / arm, callbacks)
    print("[4/4] Measuring what was learned and what was kept", flush=True)
    measured = _measure(demo, path, output)
    comparison = _compare(demo, measured, records, command)
    write_json(output / "results.json", comparison)
    report.write_html(comparison, output / "report.html")
    report.write_png(comparison, output / "front.png")
    for arm, record in records.items():
        write_whole(output / arm / "README.md", model_card(record, report.table(comparison)).encode())
    return comparison


def _settle(demo: Demo, output: Path) -> Demo:
    """Write the settings down, or check that a run in this folder has the same ones."""
    file = output / "settings.json"
    if not file.exists():
        if demo.precision == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
            demo = replace(demo, precision="bf16" if fast_bfloat16(device) else "fp32")
        write_json(file, asdict(demo))
        return demo
    before = json.loads(file.read_text(encoding="utf-8"))
    for field in fields(demo):
        then, now = before.get(field.name), getattr(demo, field.name)
        if then != now and not (field.name == "precision" and now == "auto"):
            raise ValueError(
                f"{output} holds a run with {field.name} {then}, and now it is {now}. Go on with the same settings, or "
                "choose another --output."
            )
    return Demo(**before)


# -------------------------------------------------------------------------------------------------------- training


def _train(demo: Demo, arm: str, output: Path, callbacks: Sequence[TrainerCallback]) -> dict[str, Any]:
    try:
        record = json.loads((output / "run.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        record = {"status": "none"}
    if record["status"] == "complete":
        print(f"      done before, in {record['seconds']:.0f} s")
        return record
    options = {
        "model_name_or_path": demo.model,
        "dataset_name": f"recipe:{demo.recipe}",
        "dataset_train_split": f"train[:{demo.steps * demo.batch}]",
        "output_dir": output,
        "method": arm,
        "tmkl_weight": demo.weight,
        "max_steps": demo.steps,
        "per_device_train_batch_size": demo.batch,
        "learning_rate": demo.learning_rate,
        "lr_scheduler_type": "cosine",
        "warmup_steps": round(0.03 * demo.steps),
        "lora_r": demo.rank,
        "lora_alpha": 2 * demo.rank,
        "lora_dropout": 0.0,
        "bf16": demo.precision == "bf16",
        "gradient_checkpointing": False,
        "completion_only_loss": True,
        "seed": demo.seed,
        "logging_steps": 10,
        "save_steps": 20,
        "save_total_limit": 2,
        "report_to": "none",
    }
    if train.last_checkpoint(output) is not None:
        options["resume_from_checkpoint"] = "last"
    argv = [part for key, value in options.items() for part in (f"--{key}", str(value))]
    return train.run(parse(argv), callbacks)


# ------------------------------------------------------------------------------------------------------- measuring


def _measure(demo: Demo, path: str, output: Path) -> dict[str, Measured]:
    """Every arm, each probe from its file where that is there. One load of the base for each adapter."""
    from peft.helpers import rescale_adapter_scale

    measured: dict[str, Measured] = {arm: {} for arm in MEASURED}
    wanted = {
        (arm, probe): output / "measured" / f"{arm}.{probe.replace(':', '.')}.json"
        for arm in measured
        for probe in PROBES
        if (arm, probe) != ("base", "drift")
    }
    model = tokenizer = None
    loaded = ""
    for (arm, probe), file in wanted.items():
        if not file.exists():
            adapter = "tmkl" if arm == "tmkl" else "ce"
            if model is None or adapter != loaded:
                model, tokenizer = load_model(path, output / adapter, dtype=torch.float32)
                loaded = adapter
            started = time.monotonic()
            print(f"      {MEASURED[arm]}: {probe}", flush=True)
            state: AbstractContextManager[Any] = nullcontext()
            if arm == "base":
                state = adapters_off(model)
            elif arm == "ce_half":
                state = rescale_adapter_scale(model, 0.5)
            with state:
                found = evaluate_one(
                    model,
                    tokenizer,
                    [probe],
                    target_rows=demo.recipe,
                    sizes=SIZES[demo.probes],
                    autocast=torch.bfloat16 if demo.precision == "bf16" else None,
                    progress=True,
                )[probe]
            write_json(file, {**found, "seconds": time.monotonic() - started})
        measured[arm][probe] = json.loads(file.read_text(encoding="utf-8"))
    return measured


def keep_freed_memory() -> None:
    """Let glibc keep what is freed instead of giving each large block back to the system and faulting it in again.

    TRL's loss makes blocks of logits in every step: on a CPU this takes a quarter off plain CE's step (4.7 s to 3.5 s
    on one thread, SmolLM2, 16 pairs) for about 0.5 GB more memory. Elsewhere it does nothing.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return
    mallopt(-4, 0)  # M_MMAP_MAX: no block of its own for large requests
    mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD


# ------------------------------------------------------------------------------------------------------- comparing


def prevented(method: Sequence[float], plain: Sequence[float]) -> dict[str, float] | None:
    """1 - mean(method) / mean(plain) for rises over the same windows, and its standard error (the delta method).

    None where plain CE's own rise is not above twice its standard error: there is nothing to prevent.
    """
    whole, error = statistics.fmean(plain), statistics.stdev(plain) / len(plain) ** 0.5
    if whole <= 2 * error:
        return None
    left = statistics.fmean(method) / whole
    residuals = [(a - left * b) / whole for a, b in zip(method, plain, strict=True)]
    return {"value": 1 - left, "stderr": statistics.stdev(residuals) / len(residuals) ** 0.5}


def _compare(
    demo: Demo, measured: dict[str, Measured], records: dict[str, dict[str, Any]], command: str
) -> dict[str, Any]:
    def rises(arm: str, probe: str) -> list[float]:
        losses = (measured[which][probe]["samples"]["loss"] for which in (arm, "base"))
        return [adapted - base for adapted, base in zip(*losses, strict=True)]

    arms = []
    for arm, found in measured.items():
        if arm != "base":
            add_paired_errors(found, measured["base"])
        metrics = {
            probe: {key: value for key, value in values.items() if key not in ("samples", "answers", "seconds")}
            for probe, values in found.items()
        }
        arms.append({"name": MEASURED[arm], "probes": metrics})
        if arm not in ("base", "ce"):
            texts = [probe for probe in PROBES if probe.startswith("text:")]
            shares = {probe: prevented(rises(arm, probe), rises("ce", probe)) for probe in texts}
            arms[-1]["prevented"] = {probe: share for probe, share in shares.items() if share is not None}
    seconds = {f"train {ARMS[arm]}": record["seconds"] for arm, record in records.items()}
    for arm, found in measured.items():
        seconds[f"measure {MEASURED[arm]}"] = sum(values["seconds"] for values in found.values())
    return {
        "title": f"{demo.model} on {demo.recipe}: plain CE beside CE + TMKL",
        "command": command,
        "settings": asdict(demo),
        "versions": versions(),
        "machine": report.machine(),
        "seconds": seconds,
        "arms": arms,
    }


# --------------------------------------------------------------------------------------------------------- command


def main(argv: Sequence[str]) -> int:
    """The command `mtt demo`."""
    parser = settings_parser(
        Demo,
        prog="mtt demo",
        description="Fine-tune a small model on a far task with plain CE and with TMKL; show what was learned and "
        "what was kept. About 10 minutes on two idle cores. Ctrl-C at any time; the same command goes on.",
    )
    parser.add_argument("--output", type=Path, default=Path("runs/demo"), help="folder of the run")
    options = vars(parser.parse_args(list(argv)))
    output = options.pop("output")
    keep_freed_memory()
    command = shlex.join(["mtt", "demo", *argv])
    started = time.monotonic()
    try:
        comparison = run(Demo(**options), output, command)
    except KeyboardInterrupt as interrupt:
        raise KeyboardInterrupt(f"stopped; what is done is kept in {output}. Go on with: {command}") from interrupt
    report.print_table(comparison)
    for line in report.summary(comparison):
        print(line)
    print(f"{time.monotonic() - started:.0f} s. Open {output / 'report.html'}; the chart alone is front.png.")
    return 0
