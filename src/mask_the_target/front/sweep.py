"""`mtt sweep`: every trial of a study, trained and measured once, by any number of workers.

The folder of a study:

    study.db                  Optuna's storage, where no --storage is given
    runs/KEY/                 config.yaml (mtt train's), log.txt, adapter, checkpoints, measured.json (what is done)
    base/                     the base on each recipe
    anchors/                  what the base wrote, for all trials with `anchors: auto`
    data/                     documents of data sets of text, as they were read
    results/KEY.json          one trial: its settings and a point for each checkpoint and scale
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import hashlib
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm.auto import tqdm

from mask_the_target.files import write_whole
from mask_the_target.front.paper import table
from mask_the_target.front.queue import Queue, Result, failed
from mask_the_target.front.record import versions, write_json
from mask_the_target.front.study import Study, Trial, read_study, write_config

if TYPE_CHECKING:
    from transformers import TrainerCallback

POLL = 5.0  # seconds between two looks for work, while other workers have the last trials


def steps_at(fractions: Sequence[float], max_steps: int) -> dict[int, float]:
    """The optimizer steps after which a run is measured, and the fraction that each stands for; its end always."""
    return {max(1, math.ceil(fraction * max_steps)): fraction for fraction in sorted({*fractions, 1.0})}


def run_trial(
    trial: Trial, output: Path, callbacks: Sequence[TrainerCallback] = (), report: Callable[[str], None] = print
) -> Result:
    """Train and measure one trial in a study's folder, from where it was left; its result, also in results/KEY.json.

    The result holds the trial's fields (of them notes: what is not measured of it, and why) and status (complete,
    failed), points (one for each checkpoint and scale: checkpoint, step, scale, learned, rise, probes), base (its
    probes), learned and rise of the last point at scale 1 (target loss; rise of the text loss over the base, the mean
    over its sources; nats per token), seconds, versions. The probes of that point and of the base hold a few answers
    (see `evaluate`), to the same questions in all trials. A run whose loss became NaN is a failed one, with an error.
    `report` is told what is being done.
    Raises Interrupted or KeyboardInterrupt; what is done then is kept.
    """
    from filelock import FileLock

    file, folder = output / "results" / f"{trial.key}.json", output / "runs" / trial.key
    folder.mkdir(parents=True, exist_ok=True)
    # A worker that was asleep for longer than GRACE may still be in this folder.
    with FileLock(folder / "lock"):
        if file.exists():
            return json.loads(file.read_text(encoding="utf-8"))
        from mask_the_target.front.train import BadLossError

        with (folder / "log.txt").open("a", encoding="utf-8") as log, contextlib.redirect_stdout(log):
            try:
                seconds = _train(trial, folder, callbacks, report)
                result = _measure(trial, output, folder, report)
                result["seconds"]["training"] = seconds
            except BadLossError as error:
                result = failed(asdict(trial), str(error))
        write_json(file, result)
        for state in folder.glob("checkpoint-*/optimizer.*"):  # the bulk of a checkpoint, for going on only
            state.unlink()
        return result


def _train(trial: Trial, folder: Path, callbacks: Sequence[TrainerCallback], report: Callable[[str], None]) -> float:
    """Train up to the last checkpoint that is to be measured; seconds of training."""
    from transformers import TrainerCallback, set_seed

    from mask_the_target.front import train
    from mask_the_target.front.options import parse
    from mask_the_target.front.texts import training_data

    class Follow(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
            report(f"step {state.global_step}/{state.max_steps}")
            if state.global_step in steps_at(trial.checkpoints, state.max_steps):
                control.should_save = True
            return control

    newest = train.last_checkpoint(folder)
    over = newest is not None and _trainer_state(newest)["global_step"] >= _trainer_state(newest)["max_steps"]
    if over and _at_its_end(trial):  # what is measured then is what the run saves after its last checkpoint
        over = json.loads((folder / "run.json").read_text(encoding="utf-8"))["status"] == "complete"
    if not over:
        output = folder.parent.parent
        config, data = folder / "config.yaml", training_data(trial.recipe, trial.data, output / "data")
        write_config(config, trial.model, data, trial.seed, trial.options, folder)
        set_seed(trial.seed)  # the adapter is made before the trainer sets it
        resume = ["--resume_from_checkpoint", "last"] if newest else []
        written = trial.options.get("anchors") == "auto"
        if written:
            _copy_anchors(output / "anchors", folder)
        train.run(parse([str(config), *resume]), [Follow(), *callbacks])
        if written:
            _copy_anchors(folder, output / "anchors")
        gc.collect()  # the trainer and its model are a cycle
    return json.loads((folder / "run.json").read_text(encoding="utf-8"))["seconds"]


def _copy_anchors(source: Path, target: Path) -> None:
    """What the base wrote, from or to where trials share it: it writes the same for each, and SmolLM2-135M's 512 take
    5.6 minutes of one CPU core, as much as 48 steps of 4 pairs."""
    from filelock import FileLock

    target.mkdir(parents=True, exist_ok=True)
    with FileLock(target / "anchors.lock"):  # two workers may have written at once
        for file in source.glob("anchors-*.jsonl"):
            if not (target / file.name).exists():
                write_whole(target / file.name, file.read_bytes())


def _at_its_end(trial: Trial) -> bool:
    """Whether only the adapter that the run saves at its end is one of the base: its checkpoints aren't."""
    return trial.options.get("adapter") == "pissa"


def _trainer_state(checkpoint: Path) -> dict[str, Any]:
    return json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))


def _measure(trial: Trial, output: Path, folder: Path, report: Callable[[str], None]) -> Result:
    """Base, checkpoints and scales with one load of the base; what measured.json holds already is not done again."""
    import torch
    from peft.helpers import rescale_adapter_scale

    from mask_the_target.base import adapters_off
    from mask_the_target.front import train
    from mask_the_target.front.backbones import load_model, resolve_model
    from mask_the_target.front.evaluate import fast_autocast

    newest = train.last_checkpoint(folder)
    assert newest is not None
    last = _trainer_state(newest)["max_steps"]
    states = [(step, fraction, 1.0) for step, fraction in steps_at(trial.checkpoints, last).items()]
    states += [(last, 1.0, scale) for scale in trial.scales if scale != 1]

    started = time.monotonic()
    path = resolve_model(trial.model)
    dtype = trial.options.get("dtype") or "float32"
    first = folder if _at_its_end(trial) else folder / f"checkpoint-{states[0][0]}"
    model, tokenizer = load_model(path, first, dtype=dtype)
    loaded = ("default", states[0][0])
    evaluate = _evaluation(trial, output / "data", model, tokenizer)
    base = _base(trial, output, evaluate, adapters_off, model)

    file = folder / "measured.json"
    points = json.loads(file.read_text(encoding="utf-8")) if file.exists() else []
    for step, fraction, scale in states[len(points) :]:
        report(f"measuring step {step}" + (f", adapter x {scale}" if scale != 1 else ""))
        if step != loaded[1]:
            model.load_adapter(str(folder / f"checkpoint-{step}"), adapter_name=f"step{step}")
            model.set_adapter(f"step{step}")
            model.delete_adapter(loaded[0])
            model.eval()
            loaded = (f"step{step}", step)
        with rescale_adapter_scale(model, scale) if scale != 1 else nullcontext():
            probes = evaluate(trial.probes + (trial.probes_at_end if step == last else []), base)
        points.append(
            {
                "checkpoint": fraction,
                "step": step,
                "scale": scale,
                "learned": probes["target"]["loss"],
                "rise": _rise(probes, base),
                "probes": _small(probes, answers=step == last and scale == 1),
            }
        )
        write_json(file, points)
    end = next(point for point in points if point["step"] == last and point["scale"] == 1)
    finite = math.isfinite(end["learned"]) and math.isfinite(end["rise"])
    return {
        **asdict(trial),
        "status": "complete" if finite else "failed",
        **({} if finite else {"error": f"At its end, target loss {end['learned']} and text loss rise {end['rise']}."}),
        "learned": end["learned"],
        "rise": end["rise"],
        "points": points,
        "base": _small(base, answers=True),
        "seconds": {"measuring": time.monotonic() - started},
        "versions": versions(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "measured_in": str(fast_autocast(model) or next(model.parameters()).dtype).removeprefix("torch."),
    }


def _evaluation(trial: Trial, folder: Path, model: Any, tokenizer: Any) -> Callable[..., Any]:
    """`evaluate(probes, base=None)`: those of `evaluate_one`, and packed text for data sets; all data are read here."""
    from mask_the_target.front.evaluate import add_paired_errors, evaluate_one, fast_autocast, probe_sizes
    from mask_the_target.front.recipes import find_recipe
    from mask_the_target.front.texts import SEPARATOR, documents, held_out, packed_loss

    rows = held_out(trial.recipe, trial.data, folder)
    packed = {probe: (documents(probe[5:], found, "test", folder), SEPARATOR) for probe, found in trial.texts.items()}
    if trial.data and trial.data.get("text"):
        packed["target"] = (rows, tokenizer.eos_token or SEPARATOR)  # each document ends as in training
    sizes = probe_sizes(trial.sizes)
    common: dict[str, Any] = {"target_rows": rows, "sizes": sizes}
    if trial.data is None:
        common["max_new_tokens"] = find_recipe(trial.recipe).max_new_tokens
    text: dict[str, Any] = {
        "length": trial.options.get("max_length") or 1024,  # TRL's default
        "limit": None if trial.sizes == "full" else sizes.text_windows,
        "autocast": fast_autocast(model),
    }

    def evaluate(probes: Sequence[str], base: Any = None) -> Any:
        own = [probe for probe in probes if probe not in packed]
        found = evaluate_one(model, tokenizer, own, **common) if own else {}
        for probe in probes:
            if probe in packed:
                loss = packed_loss(model, tokenizer, packed[probe][0], separator=packed[probe][1], **text)
                found[probe] = {"loss": loss.loss, "tokens": loss.tokens, "samples": {"loss": loss.windows}}
        if base is not None:
            add_paired_errors(found, base)
        return {probe: found[probe] for probe in probes}

    return evaluate


def _base(trial: Trial, output: Path, evaluate: Callable[[list[str]], Any], adapters_off: Any, model: Any) -> Any:
    """The base's result with samples, measured once for all trials that share model, recipe, probes, sizes and the
    precision that this machine measures in: another would move each rise by what rounding does."""
    from filelock import FileLock

    from mask_the_target.front.evaluate import fast_autocast

    measured = [*trial.probes, *trial.probes_at_end]
    shared = [trial.model, measured, trial.sizes, trial.options.get("dtype"), str(fast_autocast(model))]
    if trial.data or trial.texts:
        shared += [trial.data, trial.texts, trial.options.get("max_length")]
    digest = hashlib.sha256(json.dumps(shared).encode()).hexdigest()[:10]
    file = output / "base" / f"{trial.recipe}-{digest}.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{file}.lock"):
        if not file.exists():
            with adapters_off(model):
                write_json(file, evaluate([probe for probe in measured if probe != "drift"]))
    return json.loads(file.read_text(encoding="utf-8"))


def _rise(probes: Mapping[str, Any], base: Mapping[str, Any]) -> float:
    return statistics.fmean(probes[name]["loss"] - base[name]["loss"] for name in base if name.startswith("text:"))


def _small(probes: Mapping[str, Any], *, answers: bool) -> dict[str, Any]:
    """Without the samples, and without answers where they aren't wanted."""
    left_out = ("samples",) if answers else ("samples", "answers")
    return {name: {key: v for key, v in found.items() if key not in left_out} for name, found in probes.items()}


def run(
    study: Study, output: Path, storage: str | None = None, callbacks: Sequence[TrainerCallback] = ()
) -> list[Result]:
    """Take trials until none is left, wait for those of other workers, and return all results (see `run_trial`).

    `storage` is a database's URL; default: study.db in the folder `output`. results/ then holds every trial's result,
    also of those that ran on other machines. Stopped by Ctrl-C, it goes on when called again. Raises what `Queue`
    raises, KeyboardInterrupt, and any error of a trial that isn't a NaN; that trial is given back first.
    """
    output.mkdir(parents=True, exist_ok=True)
    queue = Queue(storage or f"sqlite:///{output / 'study.db'}", study.parts(), search=study.search)
    total = sum(queue.counts().values())
    with tqdm(total=total, desc=study.name, unit="trial", smoothing=0) as bar:

        def show(what: str) -> None:
            found = queue.counts()
            bar.total, bar.n = sum(found.values()), found["done"] + found["failed"]
            bar.set_postfix_str(what)

        def follow(what: str) -> None:
            bar.set_postfix_str(f"{key} {what}")

        while True:
            taken = queue.take()
            if taken is None:
                left = queue.counts()["live"]
                if not left:
                    break
                show(f"waiting for {left} trials of other workers")
                time.sleep(POLL)
                continue
            key = taken.trial.key
            show(key)
            try:
                with taken.alive():
                    result = run_trial(taken.trial, output, callbacks, follow)
            except BaseException as error:
                taken.stop()
                if not isinstance(error, KeyboardInterrupt):
                    print(f"\nStopped in {key}; its log is {output / 'runs' / key / 'log.txt'}.", file=sys.stderr)
                raise
            taken.finish(result)
        show("")
    results = queue.results()
    for result in results:
        file = output / "results" / f"{result['key']}.json"
        if not file.exists():
            write_json(file, result)
    return results


def describe(study: Study) -> str:
    """Every trial of a study, settings with their seeds, and the paper's numbers; nothing is loaded."""
    trials = [trial for part in study.parts().values() for trial in part]
    lines = [f"{study.name}: {len(trials)} trials of {study.model}; probes: {', '.join(study.probes)}"]
    lines[0] += f"; at the end: {', '.join(study.probes_at_end)}." if study.probes_at_end else "."
    for name, part in study.parts().items():
        recipe, method = name.split("/")[-2:]
        points = len(steps_at(part[0].checkpoints, 1000)) + len([scale for scale in part[0].scales if scale != 1])
        lines.append(f"  {recipe}, {method}: {len(part)} trials, {points} points of each")
        if study.search:
            lines.append(f"    searched: {part[0].ranges}; {_length(part[0].options)}")
            continue
        seeds: dict[str, list[str]] = {}
        for trial in part:
            setting = ", ".join(f"{key} {value}" for key, value in trial.setting.items()) or "as in the file"
            seeds.setdefault(f"{setting}; {_length(trial.options)}", []).append(str(trial.seed))
        lines += [f"    {setting}; seeds {', '.join(found)}" for setting, found in seeds.items()]
    lines += [f"{note} ({', '.join(names)})" for note, names in _notes([asdict(trial) for trial in trials]).items()]
    if study.paper:
        lines += ["", table(study)]
    return "\n".join(lines)


def _length(options: Mapping[str, Any]) -> str:
    """Steps, as far as they are known without the data, and tokens of a step where windows are packed."""
    steps = options.get("max_steps", -1)
    epochs = options.get("num_train_epochs", 3)
    batch = options.get("per_device_train_batch_size", 8) * options.get("gradient_accumulation_steps", 1)
    length = f"{steps} steps" if steps > 0 else f"{epochs:g} epochs"
    packed = f" x {options.get('max_length', 1024)} tokens" if options.get("packing") else ""
    return f"{length} of {batch} sequences{packed}"


def _notes(trials: Sequence[Mapping[str, Any]]) -> dict[str, list[str]]:
    """Each note of these trials, with their methods."""
    found: dict[str, list[str]] = {}
    for trial in trials:
        for note in trial.get("notes", []):
            if trial["method"] not in found.setdefault(note, []):
                found[note].append(trial["method"])
    return found


def main(argv: Sequence[str]) -> int:
    """The command `mtt sweep`."""
    parser = argparse.ArgumentParser(
        prog="mtt sweep",
        description="Run every trial of a study once: train, measure at checkpoints and scales, keep the results. "
        "Start it as often and on as many machines as you like, with one --storage; each takes the next trial. "
        "Ctrl-C at any time; the same command goes on.",
        allow_abbrev=False,
    )
    parser.add_argument("study", type=Path, help="the study's YAML file")
    parser.add_argument("--storage", help="PostgreSQL URL shared by workers; default: SQLite in the study's folder")
    parser.add_argument("--output", type=Path, help="the study's folder; default: runs/NAME")
    parser.add_argument("--methods", help="run only these of the file, by commas; the others can follow later")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="instead of what the file says: dotted keys, YAML values, null removes; again for each "
        "(--set model=package:smollm2 --set train.max_steps=2)",
    )
    parser.add_argument("--dry-run", action="store_true", help="check the file, say what would be run, and stop")
    options = parser.parse_args(list(argv))

    from mask_the_target.front.evaluate import load_tasks

    methods = None if options.methods is None else [name.strip() for name in options.methods.split(",")]
    study = read_study(options.study, options.set, methods)
    output = options.output or Path("runs") / study.name
    if options.dry_run:
        print(describe(study))
        return 0
    load_tasks([*study.probes, *study.probes_at_end])

    import datasets

    datasets.disable_progress_bars()
    try:
        results = run(study, output, options.storage)
    except KeyboardInterrupt as interrupt:
        raise KeyboardInterrupt(
            f"stopped; what is done is kept in {output}. Go on with: mtt sweep {' '.join(argv)}"
        ) from interrupt
    lost = [result for result in results if result["status"] == "failed"]
    print(f"{len(results)} trials, {len(lost)} failed. Their results are in {output / 'results'}.")
    for result in lost:
        print(f"  {result['key']}: {result['error']}")
    for note, names in _notes(results).items():
        print(f"{note} ({', '.join(names)})")
    if study.paper:
        shown = table(study, results)
        write_whole(output / "paper.md", (shown + "\n").encode())
        print(f"\n{shown}")
    return 0
