"""A study's results as they are read: per recipe and method, with the figures of `fronts.compare`, and as CSV."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any

from mask_the_target.front.fronts import Box, by_score, compare, front, points_of

Result = dict[str, Any]
PLAIN = "ce"  # the name of the method that the others are compared with
# Scores whose loss makes a front of its own, and how they are called.
SCORES = {("facts", "greedy"): "facts", ("facts", "logprob"): "facts, log-prob", ("instructions", "followed"): "instr."}
NEEDED = ("key", "recipe", "method", "setting", "seed", "model", "options", "probes", "sizes", "status", "points")
# Of TMKL's options, those that make it full-vocabulary KL: the target stays in, and nothing else is changed or added.
FULL_KL = {
    "method": "tmkl",
    "tmkl_mask_target": False,
    "tmkl_divergence": "forward",
    "tmkl_position_weight": "uniform",
    "tmkl_exclude_base_above": None,
    "tmkl_context_weight": 0.0,
}
TMKL = FULL_KL | {"tmkl_mask_target": True, "tmkl_renormalize": True}
DEFAULTS = TMKL  # of an option that isn't given


# ------------------------------------------------------------------------------------------------------- results


def read_results(folder: Path) -> list[Result]:
    """Every result of a study, by recipe, method (plain CE first), setting and seed.

    Raises FileNotFoundError or ValueError with a sentence: no results, a file that isn't one, or results of one recipe
    that were measured in different ways.
    """
    if folder.is_file():
        raise ValueError(f"{folder} is a file. Give the folder of the study, where mtt sweep wrote: runs/NAME.")
    files = sorted((folder / "results").glob("*.json"))
    if not files:
        raise FileNotFoundError(
            f"{folder} holds no results/*.json. Give the folder of a study (runs/NAME, or what mtt sweep had as "
            "--output); it has a result for each trial that has ended."
        )
    results = [_read(file) for file in files]
    for recipe in dict.fromkeys(result["recipe"] for result in results):
        here = [result for result in results if result["recipe"] == recipe]
        for what, value in (
            ("model", lambda result: result["model"]),
            ("sizes", lambda result: result["sizes"]),
            ("data", lambda result: {key: v for key, v in (result.get("data") or {}).items() if key != "train"}),
            ("texts", lambda result: result.get("texts")),
            ("dtype", lambda result: result["options"].get("dtype")),
            ("text probes", lambda result: [probe for probe in result["probes"] if probe.startswith("text:")]),
        ):
            found: dict[str, str] = {}
            for result in here:
                found.setdefault(str(value(result)), result["key"])
            if len(found) > 1:
                each = "; ".join(f"{value} ({key})" for value, key in found.items())
                raise ValueError(
                    f"{folder}: results of {recipe} can't be compared: they differ in their {what}: {each}. Move "
                    "those of the earlier study out of results/."
                )
    return sorted(results, key=_order)


def _read(file: Path) -> Result:
    try:
        result = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is not JSON: {error}") from error
    missing = [name for name in NEEDED if not isinstance(result, dict) or name not in result]
    if missing:
        raise ValueError(f"{file} is not a trial's result as mtt sweep writes it: it lacks {', '.join(missing)}.")
    for point in result["points"]:
        if missing := [name for name in ("learned", "rise", "checkpoint", "scale", "step") if name not in point]:
            raise ValueError(f"{file}: a point lacks {', '.join(missing)}.")
    if result["points"] and "target" not in result.get("base", {}):
        raise ValueError(f"{file} has points and no base's target loss to compare them with.")
    return result


def _order(result: Result) -> tuple[Any, ...]:
    setting = [(key, isinstance(v, str), 0 if isinstance(v, str) else v, str(v)) for key, v in known_setting(result)]
    return result["recipe"], result["method"] != PLAIN, result["method"], setting, result["seed"], result["key"]


def known_setting(result: Result) -> list[tuple[str, Any]]:
    return [(key, v if isinstance(v, (int, float, str)) else str(v)) for key, v in result["setting"].items()]


def _is(result: Result, objective: Mapping[str, Any]) -> bool:
    return all(result["options"].get(key, DEFAULTS.get(key)) == value for key, value in objective.items())


def end_of(result: Result) -> Any:
    """The point at the end of the run with the adapter whole; None for a failed trial."""
    if result["status"] != "complete":
        return None
    return next((point for point in result["points"] if point["checkpoint"] == 1 and point["scale"] == 1), None)


def text_drifts(result: Result) -> dict[str, float]:
    """At the end of a run, for each text probe: the relative rise of its perplexity over the base's."""
    end = end_of(result)
    if end is None:
        return {}
    texts = [name for name in result["base"] if name.startswith("text:") and name in end["probes"]]
    return {name: math.expm1(end["probes"][name]["loss"] - result["base"][name]["loss"]) for name in texts}


def unique(values: Iterable[Any]) -> list[Any]:
    """Each once, in the order of their first; also of what can't be hashed."""
    return list({json.dumps(value, sort_keys=True, default=str): value for value in values}.values())


@dataclass(frozen=True)
class Recipe:
    """One recipe's results with the figures of `fronts.compare`; without a measured plain CE, fronts alone."""

    name: str
    results: list[Result]

    @property
    def methods(self) -> list[str]:
        return unique(result["method"] for result in self.results)

    def of(self, method: str) -> list[Result]:
        return [result for result in self.results if result["method"] == method]

    def measured(self, method: str) -> bool:
        return bool(points_of(self.of(method)))

    def _named(self, objective: Mapping[str, Any], name: str) -> str | None:
        """The measured method of this objective: the one with this name, or the first that its options make it."""
        fitting = [
            method
            for method in self.methods
            if self.measured(method) and (method == name or all(_is(result, objective) for result in self.of(method)))
        ]
        return name if name in fitting else next(iter(fitting), None)

    @property
    def full_kl(self) -> str | None:
        """The method that is full-vocabulary KL, if one was measured."""
        return self._named(FULL_KL, "full_kl")

    @property
    def tmkl(self) -> str | None:
        """The method that is target-masked KL, if one was measured."""
        return self._named(TMKL, "tmkl")

    @cached_property
    def _compared(self) -> dict[str, Any]:
        if self.measured(PLAIN):
            against = [PLAIN] + ([self.full_kl] if self.full_kl is not None else [])
            return compare(self.results, PLAIN, against)[self.name]
        alone = {
            method: {
                "trials": len(self.of(method)),
                "failed": sum(result["status"] == "failed" for result in self.of(method)),
                "front": front(points_of(self.of(method))),
            }
            for method in self.methods
        }
        return {"box": None, "methods": alone}

    def by_score(self, probe: str, metric: str) -> Recipe | None:
        """The same where what is lost is a score's (see `fronts.by_score`); None if plain CE's wasn't measured."""
        found = Recipe(self.name, by_score(self.results, probe, metric))
        return found if found.measured(PLAIN) else None

    @property
    def box(self) -> Box | None:
        """Between base and plain CE; None where plain CE was not measured."""
        return self._compared["box"]

    @property
    def figures(self) -> dict[str, Any]:
        """Each method's figures; without a box only trials, failed and front."""
        return self._compared["methods"]

    @property
    def figures_by_setting(self) -> dict[tuple[str, str], Any]:
        """{(method, setting): figures}, but of plain CE: the yardstick, with all of its settings."""
        whole = [PLAIN] + ([self.full_kl] if self.full_kl is not None else [])
        groups = {group: own for group, own in self.groups().items() if group[0] != PLAIN}
        names = {json.dumps(group): group for group in groups}
        apart = [{**result, "method": name} for name, group in names.items() for result in groups[group]]
        measured = [result for method in whole for result in self.of(method)]
        found = compare([*measured, *apart], PLAIN, whole)[self.name]["methods"]
        return {group: found[name] for name, group in names.items()}

    def base_loss(self) -> float | None:
        """Nats per token; None if no trial got as far as to measure it."""
        found = next((result["base"]["target"]["loss"] for result in self.results if "base" in result), math.nan)
        return found if math.isfinite(found) else None

    def varied(self, method: str) -> list[str]:
        """The options in which this method's trials differ."""
        own = self.of(method)
        names = unique(key for result in own for key in [*result["setting"], *result["options"]])
        in_grid = {key for result in own for key in result["setting"]}
        return [key for key in names if key in in_grid or len(unique(option(result, key) for result in own)) > 1]

    def setting(self, result: Result) -> str:
        pairs = [(key, option(result, key)) for key in self.varied(result["method"])]
        return ", ".join(f"{key} {as_text(value)}" for key, value in pairs if value is not None)

    def groups(self) -> dict[tuple[str, str], list[Result]]:
        """Results by method and setting: the seeds of one run."""
        found: dict[tuple[str, str], list[Result]] = {}
        for result in self.results:
            found.setdefault((result["method"], self.setting(result)), []).append(result)
        return found

    def plain_of(self, result: Result) -> Result | None:
        """Plain CE's run of the same seed, adapter and options, whatever its method is called; None for plain CE."""
        if is_plain(result):
            return None
        for other in self.results:
            if is_plain(other) and other["seed"] == result["seed"] and plain_key(other) == plain_key(result):
                return other
        return None


def is_plain(result: Result) -> bool:
    """Whether it is a run of plain cross-entropy: of any adapter, by its options and not by its method's name."""
    return bool(result["options"].get("method") == "ce")


def plain_key(result: Result) -> str:
    """What must be equal for plain CE to be the one that a run is compared with: all but the objective."""
    from mask_the_target.front.options import TMKLArguments

    objective = {each.name for each in fields(TMKLArguments)} - {"adapter"}
    shared = {key: value for key, value in result["options"].items() if key not in objective}
    return json.dumps([result["recipe"], shared], sort_keys=True)


def option(result: Result, key: str) -> Any:
    return result["setting"].get(key, result["options"].get(key))


def as_text(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


# ------------------------------------------------------------------------------------------------------------ CSV


def _flat(values: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, float]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        elif isinstance(value, (int, float)):
            yield f"{prefix}{key}", value


def to_csv(recipes: Sequence[Recipe]) -> str:
    """Every point, one row each: where it comes from, learned and rise, and each probe's metrics (PROBE.METRIC)."""
    rows = [
        {
            **{name: result[name] for name in ("recipe", "method", "key", "status", "model", "seed")},
            **{name: point[name] for name in STATE},
            "setting": recipe.setting(result),
            "on_front": int((result["key"], point["checkpoint"], point["scale"]) in on_front),
            "base_target_loss": result["base"]["target"]["loss"],
            **dict(_flat(point.get("probes", {}), "")),
        }
        for recipe in recipes
        for on_front in [{(p.key, p.checkpoint, p.scale) for row in recipe.figures.values() for p in row["front"]}]
        for result in recipe.results
        for point in result["points"]
    ]
    return _csv(rows, FIXED)


def figures_csv(recipes: Sequence[Recipe]) -> str:
    """`fronts.compare` by each measure of what was kept: mean, interval and number of seeds.

    One row for each method as a whole, without a setting; then one for each setting alone, but plain CE's.
    """
    rows = []
    for recipe in recipes:
        scores = {f"{probe}.{metric}": recipe.by_score(probe, metric) for probe, metric in SCORES}
        for kept, found in {"text": recipe, **scores}.items():
            if found is None or found.box is None:
                continue
            named = {(method, ""): figures for method, figures in found.figures.items()} | found.figures_by_setting
            for (method, setting), figures in named.items():
                row = {"recipe": recipe.name, "kept": kept, "method": method, "setting": setting}
                row["seeds"] = figures["hypervolume"]["n"]
                intervals = {
                    "hypervolume": figures["hypervolume"],
                    **{f"hypervolume less {other}'s": less for other, less in figures["against"].items()},
                    **{f"learned losing {t:.0%}": share for t, share in figures["learned_within"].items()},
                }
                for name, each in intervals.items():
                    row |= {name: each["mean"], f"{name}, low": each["low"], f"{name}, high": each["high"]}
                rows.append(row)
    return _csv(rows, FIGURES)


def _csv(rows: Sequence[Mapping[str, Any]], first: Sequence[str]) -> str:
    names = list(dict.fromkeys([*first, *(name for row in rows for name in row)]))
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, names, restval="", lineterminator="\n")
    writer.writerow({name: _cell(name) for name in names})
    writer.writerows({name: _cell(value) for name, value in row.items()} for row in rows)
    return buffer.getvalue()


FIGURES = ("recipe", "kept", "method", "setting", "seeds")


STATE = ("checkpoint", "step", "scale", "learned", "rise")
FIXED = ("recipe", "method", "setting", "seed", *STATE, "on_front", "base_target_loss", "status", "key", "model")


def _cell(value: Any) -> Any:
    """Text that a spreadsheet would take for a formula gets an apostrophe before it."""
    return f"'{value}" if isinstance(value, str) and value.startswith(("=", "+", "-", "@", "\t", "\r")) else value
