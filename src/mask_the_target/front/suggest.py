"""`mtt suggest`: a weight and a learning rate for a model and data, from a short pilot. A heuristic, and it says so.

1. The pilot is a small study (see `study`): plain CE, TMKL of a few weights, and the full KL where there is no target,
   each at a few learning rates, for a few tens of steps with one seed: at the prompts, alone and with a little TMKL
   (`TMKL.recommended`), or where the data has none, at anchors that the base writes. Measured are the held-out target
   loss and the rise of the text loss over the base.
2. A full run loses more than its pilot: the rise is expected to be GROWTH times the pilot's.
3. Of the settings that are expected to raise the text's perplexity by no more than is tolerated, those count that learn
   at least ENOUGH of what the best of them learns, and of these the one that lost least is suggested. If none is
   expected to stay within the tolerance, the same is asked of the one that lost least and of those that have lost no
   more than its standard error above it, which can't be told from it.

`leave_one_out` says from whole studies how far such a choice is from the best.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mask_the_target import TMKL
from mask_the_target.files import write_whole
from mask_the_target.front import fronts
from mask_the_target.front.backbones import DEFAULT_MODEL, find_model
from mask_the_target.front.record import versions, write_json
from mask_the_target.front.study import Study, change, check_study

if TYPE_CHECKING:
    from transformers import TrainerCallback

# A guess, until `growth` has taken it from studies. Plain CE of a high learning rate grows by far more in a long run.
GROWTH = 2.0
ENOUGH = 0.98
SMALLEST = 1e-3  # nats per token: rises below it are too small to take a ratio of
CANDIDATES = ("ce", "tmkl", "context", "both", "anchors")  # methods of a study
SETTING = ("learning_rate", "tmkl_weight", "tmkl_context_weight", "anchors")
YOURS = "yours"  # the name of the user's data in the pilot's study
HELD_OUT = 200  # rows at most that are taken from data without a split of their own


@dataclass(frozen=True)
class Outcome:
    """What a setting of a method came to: target loss and rise of the text loss, nats per token, means over seeds."""

    method: str
    setting: dict[str, Any]  # of SETTING: learning_rate, and for TMKL its weights and anchors
    learned: float
    rise: float
    error: float | None = field(default=None, compare=False)  # standard error of the rise, of one seed

    def expected(self, growth: float) -> float:
        """The rise to expect of a run that is longer than the one measured."""
        return self.rise * growth if self.rise > 0 else self.rise

    @property
    def name(self) -> str:
        weight, context = self.setting.get("tmkl_weight"), self.setting.get("tmkl_context_weight")
        where = "anchors that the base writes" if "anchors" in self.setting else "the prompt"
        parts = [] if not weight else [f"TMKL, weight {weight:g}"]
        parts += [] if not context else [f"full KL on {where}, weight {context:g}"]
        return f"{' and '.join(parts) or 'plain CE'}, learning rate {self.setting['learning_rate']:g}"


def outcomes(
    results: Iterable[Mapping[str, Any]], checkpoint: float = 1.0, methods: Sequence[str] = CANDIDATES
) -> list[Outcome]:
    """Every setting of these methods at a checkpoint (a fraction of the run) and the adapter's own scale.

    `results` are those of `sweep.run_trial`, of one set. Runs that weren't measured there, or aren't finite, are left
    out.
    """
    found: dict[str, list[tuple[Mapping[str, Any], Mapping[str, Any]]]] = {}
    for result in results:
        for point in result["points"]:
            there = point["checkpoint"] == checkpoint and point["scale"] == 1 and result["method"] in methods
            if there and math.isfinite(point["learned"]) and math.isfinite(point["rise"]):
                key = json.dumps([result["method"], _setting(result)], sort_keys=True)
                found.setdefault(key, []).append((result, point))
    return [
        Outcome(
            method=group[0][0]["method"],
            setting=_setting(group[0][0]),
            learned=statistics.fmean(point["learned"] for _, point in group),
            rise=statistics.fmean(point["rise"] for _, point in group),
            error=_error(group[0][1]) if len(group) == 1 else None,
        )
        for group in found.values()
    ]


def _setting(result: Mapping[str, Any]) -> dict[str, Any]:
    options = result["options"]
    setting = {"learning_rate": float(options["learning_rate"])}
    if options.get("method") != "ce":
        setting["tmkl_weight"] = float(options.get("tmkl_weight", 1.0))
        if options.get("tmkl_context_weight"):
            setting["tmkl_context_weight"] = float(options["tmkl_context_weight"])
        if options.get("anchors", "none") != "none":
            setting["anchors"] = options["anchors"]
    return setting


def _error(point: Mapping[str, Any]) -> float | None:
    """Of the mean over the texts, which are measured apart."""
    errors = [probe.get("stderr") for name, probe in point.get("probes", {}).items() if name.startswith("text:")]
    if not errors or any(error is None or math.isnan(error) for error in errors):
        return None
    return math.sqrt(sum(error**2 for error in errors)) / len(errors)


def choose(found: Sequence[Outcome], base_loss: float, tolerance: float, growth: float = GROWTH) -> Outcome:
    """The suggestion; how, is said above. `tolerance`: of the text's perplexity (0.01: one percent more).

    Raises ValueError if nothing was measured.
    """
    if not found:
        raise ValueError("no run of the pilot was measured: all of them failed. Try lower learning rates.")
    within = [outcome for outcome in found if outcome.expected(growth) <= math.log1p(tolerance)]
    if not within:
        least_lost = min(found, key=lambda outcome: outcome.rise)
        within = [outcome for outcome in found if outcome.rise <= least_lost.rise + (least_lost.error or 0.0)]
    most = max(base_loss - outcome.learned for outcome in within)
    least = most - (1 - ENOUGH) * abs(most)
    return min((o for o in within if base_loss - o.learned >= least), key=lambda outcome: outcome.rise)


# ------------------------------------------------------------------------------------------------------ validation


def growth(results: Iterable[Mapping[str, Any]], early: float, methods: Sequence[str] = CANDIDATES) -> float:
    """How many times the rise at the checkpoint `early` is the rise at the end: the median over runs.

    GROWTH if no run had a rise of SMALLEST by then.
    """
    ratios = []
    for result in results:
        rises = {point["checkpoint"]: point["rise"] for point in result["points"] if point["scale"] == 1}
        if result["method"] in methods and rises.get(early, 0) >= SMALLEST and math.isfinite(rises.get(1.0, math.nan)):
            ratios.append(rises[1.0] / rises[early])
    return statistics.median(ratios) if ratios else GROWTH


def leave_one_out(
    results: Sequence[Mapping[str, Any]],
    early: float = 0.25,
    tolerance: float = 0.01,
    methods: Sequence[str] = CANDIDATES,
) -> dict[str, dict[str, Any]]:
    """How far the suggestion for each set is from the best setting in that set's study.

    For each set, the runs at the checkpoint `early` stand for its pilot (their learning rate has not come down yet, as
    it has at the end of a pilot), and the growth is that of the other sets. Judged is what the chosen setting came to
    at its end. {set: {"growth", "suggested", "best", "elsewhere", "behind", "over"}}:

        suggested, best   method, setting, share (of plain CE's best learning) and rise at the end. best: what the same
                          rule takes when it knows the ends
        elsewhere         the same for the setting that did best on average in the other sets: no pilot at all. A rise
                          above the tolerance counts there as nothing learned. None if no setting is in all sets
        behind            share of best less that of suggested
        over              how far the rise of suggested is above the tolerance, nats per token

    Raises ValueError for fewer than two sets, or where plain CE was not measured.
    """
    sets = list(dict.fromkeys(result["recipe"] for result in results))
    if len(sets) < 2:
        raise ValueError(f"one set is left out and the others are learned from: give results of two sets, not {sets}.")
    boxes = {name: found["box"] for name, found in fronts.compare(results).items()}
    of_set = {name: [result for result in results if result["recipe"] == name] for name in sets}
    ends = {name: outcomes(of_set[name], 1.0, methods) for name in sets}

    def share(name: str, outcome: Outcome) -> float:
        box = boxes[name]
        return (box.base_loss - outcome.learned) / (box.base_loss - box.best_loss)

    def shown(name: str, outcome: Outcome | None) -> dict[str, Any] | None:
        if outcome is None:
            return None
        values = {"share": share(name, outcome), "rise": outcome.rise}
        return {"method": outcome.method, "setting": outcome.setting, **values}

    found = {}
    for name in sets:
        others = [other for other in sets if other != name]
        factor = growth([result for other in others for result in of_set[other]], early, methods)
        chosen = choose(outcomes(of_set[name], early, methods), boxes[name].base_loss, tolerance, factor)
        suggested = _same(chosen, ends[name])
        best = choose(ends[name], boxes[name].base_loss, tolerance, growth=1.0)
        found[name] = {
            "growth": factor,
            "suggested": shown(name, suggested),
            "best": shown(name, best),
            "elsewhere": shown(name, _best_elsewhere(ends[name], [(o, ends[o]) for o in others], share, tolerance)),
            "behind": math.nan if suggested is None else share(name, best) - share(name, suggested),
            "over": math.nan if suggested is None else max(0.0, suggested.rise - math.log1p(tolerance)),
        }
    return found


def _same(outcome: Outcome, among: Iterable[Outcome]) -> Outcome | None:
    """None: that run failed before its end."""
    return next((o for o in among if (o.method, o.setting) == (outcome.method, outcome.setting)), None)


def _best_elsewhere(
    here: Sequence[Outcome],
    others: Sequence[tuple[str, Sequence[Outcome]]],
    share: Callable[[str, Outcome], float],
    tolerance: float,
) -> Outcome | None:
    def worth(outcome: Outcome) -> float:
        same = [(name, _same(outcome, ends)) for name, ends in others]
        shares = [share(name, o) if o.rise <= math.log1p(tolerance) else 0.0 for name, o in same if o is not None]
        return statistics.fmean(shares) if len(shares) == len(others) else -math.inf

    best = max(here, key=worth, default=None)
    return best if best is not None and math.isfinite(worth(best)) else None


# ----------------------------------------------------------------------------------------------------------- pilot


@dataclass(frozen=True)
class Pilot:
    """What is asked, and the small study that answers it. `tolerance`: of the text's perplexity (0.01: one percent)."""

    study: Study
    tolerance: float

    @property
    def recipe(self) -> str:
        return self.study.recipes[0]


def make_pilot(
    model: str,
    data: str,
    *,
    weights: Sequence[float],
    learning_rates: Sequence[float],
    steps: int,
    tolerance: float,
    changes: Sequence[str] = (),
) -> Pilot:
    """The pilot's study. `data` is what `mtt train` takes as dataset_name; `changes` as for `mtt sweep --set`.

    Data without a test or validation split of its own is cut: its last tenth, HELD_OUT rows at most, is held out.
    `changes` may say more of the data: "data.yours.dataset_config=NAME", and train, test or text of `study`'s data.
    Raises ValueError or FileNotFoundError with a sentence. The model's weights are not read.
    """
    if not 0 <= tolerance < math.inf:
        raise ValueError(f"--tolerance is {tolerance}; it must be a share of the text's perplexity, like 0.01.")
    if steps < 2:
        raise ValueError(f"--steps is {steps}; a pilot needs at least 2, and some tens to say anything.")
    for flag, values in (("weights", weights), ("learning-rates", learning_rates)):
        for value in values:
            if not 0 < value < math.inf:
                raise ValueError(f"--{flag} holds {value}; they must be positive numbers.")
    import torch

    from mask_the_target.front.evaluate import fast_bfloat16

    recipe = data.removeprefix("recipe:")
    content: dict[str, Any] = {
        "name": "suggest",
        "model": model,
        "recipes": [recipe if data.startswith("recipe:") else YOURS],
        "probes": ["target", "text"],
        "sizes": "quick",
        "methods": {},
        "seeds": [0],
        "checkpoints": [1.0],
        "scales": [],
        "train": {
            "max_steps": steps,
            "per_device_train_batch_size": 8,
            "logging_steps": 10,
            # TRL's default is true, and a CPU without the instructions for it takes minutes for a step.
            "bf16": fast_bfloat16("cuda" if torch.cuda.is_available() else "cpu"),
        },
    }
    change(content, changes)
    prompts = True
    if data.startswith("recipe:"):
        _shorten(content["train"])
    else:
        given = content.setdefault("data", {}).get(YOURS, {})
        found, prompts = _split_data(data, given.get("dataset_config"), content["train"])
        content["data"][YOURS] = {**found, **given}
        prompts = prompts and "text" not in content["data"][YOURS]  # columns that are trained on as one text
    content["methods"] = _candidates(weights, learning_rates, prompts)
    change(content, changes)  # again, of the methods that the data told
    study = check_study(content, Path("the pilot"))
    for name, (_, grid) in study.methods.items():
        if other := [key for key in grid if key not in SETTING]:
            raise ValueError(
                f"methods.{name} of the pilot varies {other[0]!r}, and what is suggested are {', '.join(SETTING)}. "
                "Give it one value, or compare several with mtt sweep."
            )
    find_model(study.model)
    return Pilot(study, tolerance)


def _candidates(weights: Sequence[float], learning_rates: Sequence[float], prompts: bool) -> dict[str, Any]:
    """The methods of the pilot's study, for data with prompts or without."""
    rates, both = {"learning_rate": list(learning_rates)}, TMKL.recommended()

    def context(weight: float, context_weight: float, **more: str) -> dict[str, Any]:
        return {
            "method": "tmkl",
            "tmkl_weight": weight,
            **more,
            "grid": {"tmkl_context_weight": [context_weight], **rates},
        }

    return {
        "ce": {"method": "ce", "grid": rates},
        "tmkl": {"method": "tmkl", "grid": {"tmkl_weight": list(weights), **rates}},
        **(
            {"context": context(0.0, 1.0), "both": context(both.weight, both.context_weight)}
            if prompts
            else {"anchors": context(0.0, 1.0, anchors="auto")}
        ),
    }


def _shorten(train: Any) -> None:
    """A recipe's rows are shuffled, so that a pilot needs no more of them than it has steps for."""
    if isinstance(train, dict) and "dataset_train_split" not in train:
        train["dataset_train_split"] = _rows_of(train)


def _rows_of(train: Mapping[str, Any]) -> str:
    parts = (
        train.get("max_steps"),
        train.get("per_device_train_batch_size"),
        train.get("gradient_accumulation_steps", 1),
    )
    return f"train[:{math.prod(parts)}]" if all(isinstance(part, int) for part in parts) else "train"


def _split_data(name: str, config: str | None, train: Any) -> tuple[dict[str, Any], bool]:
    """A data set as a study has it, with what is held out; and whether its rows have prompts that aren't trained on."""
    from mask_the_target.front.data import check_columns, has_context, load_named, take_split

    found: Any = load_named(name, config, False)
    found = found if isinstance(found, Mapping) else {"train": found}
    split = "train" if "train" in found else next(iter(found))
    rows = take_split(found, split, name)
    check_columns(rows, "text", name)
    spec: dict[str, Any] = {"dataset_name": name, "train": split}
    if not {"prompt", "messages", "conversations"} & set(rows.column_names):
        spec["text"] = ["text"]
    prompts = has_context(rows, train if isinstance(train, dict) else {})
    own = next((other for other in ("test", "validation") if other in found and other != split), None)
    if own is not None:
        return spec | {"test": own}, prompts
    if len(rows) < 2:
        raise ValueError(f"{name} has {len(rows)} row: one to learn from and one to measure on are the least.")
    cut = len(rows) - min(HELD_OUT, max(1, len(rows) // 10))
    return spec | {"train": f"{split}[:{cut}]", "test": f"{split}[{cut}:]"}, prompts


def suggest(pilot: Pilot, output: Path, callbacks: Sequence[TrainerCallback] = ()) -> dict[str, Any]:
    """Run what is missing of the pilot in the folder `output`, and write suggestion.json and suggestion.yaml there.

    suggestion.json is what is returned: suggested (method and options), expected (rise of the text's perplexity, of the
    pilot and of a whole run, and plain CE's at the same learning rate), base (its losses), sure ("fair" or "low") and
    doubts, pilot (every setting), tolerance, growth, model, data, versions. suggestion.yaml is a config for mtt train.
    Raises what `sweep.run` and `choose` raise; called again, it goes on.
    """
    from mask_the_target.front import sweep

    results = sweep.run(pilot.study, output, None, callbacks)
    base = next((result["base"] for result in results if "base" in result), None)
    found = outcomes(results)
    base_loss = base["target"]["loss"] if base else math.nan
    chosen = choose(found, base_loss, pilot.tolerance)
    assert base is not None
    text_loss = statistics.fmean(probe["loss"] for name, probe in base.items() if name.startswith("text:"))
    plain = _same(Outcome("ce", {"learning_rate": chosen.setting["learning_rate"]}, 0, 0), found)
    doubts = _doubts(chosen, found, pilot)
    config = _config(pilot, chosen, output)
    certain = len(doubts) <= 1 and chosen.expected(GROWTH) <= math.log1p(pilot.tolerance)
    suggestion = {
        "suggested": {"method": _method(chosen), **chosen.setting},
        "expected": {
            "pilot": math.expm1(chosen.rise),
            "run": math.expm1(chosen.expected(GROWTH)),
            "run_of_ce": None if plain is None else math.expm1(plain.expected(GROWTH)),
        },
        "base": {"target": base_loss, "text": text_loss},
        "sure": "fair" if certain else "low",
        "doubts": doubts,
        "pilot": [
            {"method": _method(o), **o.setting, "target_loss": o.learned, "text_loss_rise": o.rise, "stderr": o.error}
            for o in found
        ],
        "failed": [result["key"] for result in results if result["status"] == "failed"],
        "tolerance": pilot.tolerance,
        "growth": GROWTH,
        "model": pilot.study.model,
        "data": config["dataset_name"],
        "versions": versions(),
    }
    import yaml

    write_json(output / "suggestion.json", suggestion)
    write_whole(output / "suggestion.yaml", yaml.safe_dump(config, sort_keys=False).encode())
    return suggestion


def _config(pilot: Pilot, chosen: Outcome, output: Path) -> dict[str, Any]:
    """For mtt train: the options of the pilot's run and its method, without its length."""
    from mask_the_target.front.texts import training_data

    train = dict(pilot.study.train)
    if train.get("dataset_train_split") == _rows_of(train):
        del train["dataset_train_split"]
    data = pilot.study.data.get(pilot.recipe, {"dataset_name": f"recipe:{pilot.recipe}"})
    named: dict[str, Any] = {key: data[key] for key in ("dataset_name", "dataset_config") if key in data}
    if "train" in data and data["train"] != "train":
        named["dataset_train_split"] = data["train"]
    if data.get("text", ["text"]) != ["text"]:  # columns joined to a text: the file that the pilot was trained on
        named = training_data(pilot.recipe, data, output / "data")
    fixed, _ = pilot.study.methods[chosen.method]
    return {
        "model_name_or_path": pilot.study.model,
        **named,
        "output_dir": "runs/suggested",
        **{key: value for key, value in train.items() if key not in ("max_steps", "logging_steps")},
        **fixed,
        "method": _method(chosen),
        **chosen.setting,
    }


def _method(outcome: Outcome) -> str:
    """Its name in mtt train."""
    return "tmkl" if "tmkl_weight" in outcome.setting else "ce"


def _doubts(chosen: Outcome, found: Sequence[Outcome], pilot: Pilot) -> list[str]:
    """Reasons why another setting may be better, or the run lose more than is expected."""
    doubts = []
    if chosen.expected(GROWTH) > math.log1p(pilot.tolerance):
        doubts.append(
            "No setting is expected to keep within the tolerance; this one is of those that lost least, as far as the "
            "texts can tell."
        )
    rates = [outcome.setting["learning_rate"] for outcome in found]
    weights = [outcome.setting.get("tmkl_weight", 0.0) for outcome in found]
    rate, weight = chosen.setting["learning_rate"], chosen.setting.get("tmkl_weight", 0.0)
    if rate in (min(rates), max(rates)) and min(rates) < max(rates):
        side = "lowest" if rate == min(rates) else "highest"
        doubts.append(f"Its learning rate is the {side} of those tried; the best may lie beyond.")
    if weight == max(weights) and min(weights) < max(weights):
        doubts.append("Its weight is the highest of those tried; the best may lie beyond.")
    if chosen.error is not None and abs(chosen.rise) < 2 * chosen.error:
        doubts.append(
            f"Its rise of the text loss, {chosen.rise:.4f} nats per token with a standard error of {chosen.error:.4f}, "
            "can't be told from none."
        )
    return doubts


# --------------------------------------------------------------------------------------------------------- command


def main(argv: Sequence[str]) -> int:
    """The command `mtt suggest`."""
    parser = argparse.ArgumentParser(
        prog="mtt suggest",
        description="Suggest a weight and a learning rate for a model and data, with the drift to expect, from a short "
        "pilot. It is a heuristic. Ctrl-C at any time; the same command goes on.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--model", default=DEFAULT_MODEL, help="hub name, folder, or package:NAME")
    parser.add_argument("--data", required=True, help="what mtt train takes as dataset_name: a file, recipe:NAME, ...")
    parser.add_argument("--weights", type=numbers, default="0.3,1,3", help="TMKL's weights to try, by commas")
    parser.add_argument("--learning-rates", type=numbers, default="2e-4,1e-3", help="learning rates to try, by commas")
    parser.add_argument("--steps", type=int, default=30, help="optimizer steps of each run of the pilot")
    parser.add_argument("--tolerance", type=float, default=0.01, help="rise of the text's perplexity that is tolerated")
    parser.add_argument("--output", type=Path, default=Path("runs/suggest"), help="folder of the pilot and the answer")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="change the pilot's study, as in mtt sweep (--set train.lora_r=16 --set train.max_length=512)",
    )
    options = parser.parse_args(list(argv))
    pilot = make_pilot(
        options.model,
        options.data,
        weights=options.weights,
        learning_rates=options.learning_rates,
        steps=options.steps,
        tolerance=options.tolerance,
        changes=options.set,
    )
    import datasets

    datasets.disable_progress_bars()
    try:
        suggestion = suggest(pilot, options.output)
    except KeyboardInterrupt as interrupt:
        raise KeyboardInterrupt(
            f"stopped; what is done is kept in {options.output}. Go on with: mtt suggest {' '.join(argv)}"
        ) from interrupt
    print(describe(suggestion, pilot))
    print(f"\nTrain with it: mtt train {options.output / 'suggestion.yaml'}")
    return 0


def numbers(text: str) -> list[float]:
    """0.3,1,3. The name is what argparse calls a wrong value by."""
    return [float(part) for part in text.split(",")]


def describe(suggestion: Mapping[str, Any], pilot: Pilot) -> str:
    """The suggestion in words, with the pilot's numbers."""
    base, expected = suggestion["base"], suggestion["expected"]
    near = base["target"] <= base["text"]
    seeds = "one seed" if len(pilot.study.seeds) == 1 else f"{len(pilot.study.seeds)} seeds"
    lines = [
        f"The base's loss on the data is {base['target']:.2f} nats per token, on English text {base['text']:.2f}: "
        + (
            "the data is near what it knows, so there is less to forget."
            if near
            else "the data is far from what it knows."
        ),
        "",
        f"Pilot of {pilot.study.train['max_steps']} steps, {seeds}:",
    ]
    for row in suggestion["pilot"]:
        setting = {key: row[key] for key in SETTING if key in row}
        outcome = Outcome(row["method"], setting, row["target_loss"], row["text_loss_rise"])
        error = "" if row["stderr"] is None else f" ± {row['stderr']:.4f}"
        lines.append(f"  {outcome.name}: target loss {outcome.learned:.3f}, text loss {outcome.rise:+.4f}{error}")
    chosen = {key: value for key, value in suggestion["suggested"].items() if key != "method"}
    name = Outcome(suggestion["suggested"]["method"], chosen, 0, 0).name
    of_ce = expected["run_of_ce"]
    lines += [
        "",
        f"Suggested: {name}.",
        f"Expected rise of the text's perplexity: {expected['run']:+.1%} over a whole run ({expected['pilot']:+.1%} in "
        f"the pilot, and a run is taken to lose {suggestion['growth']:g} times as much: a guess, a long one loses more)"
        + (f"; plain CE at this learning rate {of_ce:+.1%}." if of_ce is not None and "tmkl_weight" in chosen else "."),
        f"How sure: {suggestion['sure']}. It is a heuristic: {seeds} and a short run.",
        *(f"  - {doubt}" for doubt in suggestion["doubts"]),
    ]
    lines += [f"  - failed and left out: {key}" for key in suggestion["failed"]]
    return "\n".join(lines)
