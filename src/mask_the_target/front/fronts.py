"""What a study shows: for each method the front of what was learned against what was lost, in few numbers.

A point is one state of one run: its held-out target loss (lower: learned more) and the rise of its text loss over the
base (lower: kept more), both in nats per token. The base itself is (its target loss, 0). All settings, checkpoints and
scales of a method and seed make one front.

Hypervolume: the area that a front dominates, as a share of the box between base and plain CE:

    target loss   from the base's (nothing learned) down to plain CE's best
    text loss     from the base's (nothing lost) up to that of plain CE where it learned best

so 0 is the base, or plain CE at its best alone, and 1 is all of CE's learning with nothing lost. A front that learns
more than CE can be above 1. One that lowers the text loss has lost nothing, and no more than that: on near sets, where
plain CE loses next to nothing, the rest would be all of the number. CE's best is the mean over seeds. Seeds are
compared by the settings and options that all of a method's seeds have, where there are any, so that a seed for which
more was run has no larger front for that.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

TOLERANCES = (0.01, 0.05)  # of the text's perplexity
RESAMPLES = 10_000


@dataclass(frozen=True)
class Point:
    """Target loss and text loss rise, and where they come from."""

    loss: float
    rise: float
    key: str = ""
    checkpoint: float = 1.0
    scale: float = 1.0


@dataclass(frozen=True)
class Box:
    """Between base and plain CE: the base's target loss, plain CE's best, and the text loss rise where it has that."""

    base_loss: float
    best_loss: float
    worst_rise: float

    def is_empty(self) -> bool:
        """Plain CE learned nothing, or lost nothing: there is no area to have a share of."""
        return not (self.best_loss < self.base_loss and self.worst_rise > 0)


def finite_points(result: Mapping[str, Any]) -> list[Any]:
    """A result's measured points (see `sweep.run_trial`) without those that are not finite."""
    return [point for point in result["points"] if math.isfinite(point["learned"]) and math.isfinite(point["rise"])]


def points_of(results: Iterable[Mapping[str, Any]]) -> list[Point]:
    """All finite points of these results."""
    return [
        Point(point["learned"], point["rise"], result["key"], point["checkpoint"], point["scale"])
        for result in results
        for point in finite_points(result)
    ]


def by_score(results: Iterable[Mapping[str, Any]], probe: str, metric: str, plain: str = "ce") -> list[dict[str, Any]]:
    """The results with another measure of what was lost: for `rise`, the share of the base's score that is gone.

    That is 1 - score / base's score, for a metric of a probe of which higher is better. The base's score is one for all
    runs of a recipe: the mean over those of the method `plain`, or of all where it has none. Another machine may give
    the base a question more or less of a few tens, which would move a whole front. Points at which the probe was not
    measured are left out, and results without it.
    """
    every = [result for result in results if result.get("base", {}).get(probe, {}).get(metric) is not None]
    bases: dict[str, float] = {}
    for recipe in dict.fromkeys(result["recipe"] for result in every):
        own = [result for result in every if result["recipe"] == recipe]
        told = [result for result in own if result["method"] == plain] or own
        bases[recipe] = float(np.mean([result["base"][probe][metric] for result in told]))
    found = []
    for result in every:
        if base := bases[result["recipe"]]:
            scores = [(point, point.get("probes", {}).get(probe, {}).get(metric)) for point in result["points"]]
            points = [{**point, "rise": 1 - score / base} for point, score in scores if score is not None]
            found.append({**result, "points": points})
    return found


def front(points: Iterable[Point]) -> list[Point]:
    """The points that no other dominates (as low in both, lower in one), from most learned to most kept.

    Of equal points the first one stays.
    """
    found: list[Point] = []
    for point in sorted(points, key=lambda point: (point.loss, point.rise)):
        if not found or point.rise < found[-1].rise:
            found.append(point)
    return found


def hypervolume(points: Sequence[Point], box: Box) -> float:
    """The share of the box that the points dominate: 0 for none, or none inside. NaN if the box is empty."""
    import moocore  # pymoo's own; Optuna's function for it is not public

    if box.is_empty():
        return math.nan
    inside = [[p.loss, max(p.rise, 0.0)] for p in points if p.loss <= box.base_loss and p.rise <= box.worst_rise]
    if not inside:
        return 0.0
    area = moocore.hypervolume(np.array(inside), ref=[box.base_loss, box.worst_rise])
    return float(area) / ((box.base_loss - box.best_loss) * box.worst_rise)


def share_learned(points: Iterable[Point], box: Box, tolerance: float) -> float:
    """The share of plain CE's best learning among points whose text perplexity is at most 1 + tolerance of the base's
    (of a score, see `by_score`: that lost about this share of it).

    At least 0: the base itself loses nothing. NaN if plain CE learned nothing.
    """
    if not box.best_loss < box.base_loss:
        return math.nan
    within = [point.loss for point in points if point.rise <= math.log1p(tolerance)]
    return (box.base_loss - min([box.base_loss, *within])) / (box.base_loss - box.best_loss)


def interval(values: Sequence[float], seed: int = 0) -> dict[str, Any]:
    """Mean of the values of n seeds and its bootstrap 95% interval (percentiles; None for fewer than two).

    With few seeds the interval is too narrow: of three, it is about from the lowest to the highest.
    """
    known = np.array([value for value in values if not math.isnan(value)])
    if not len(known):
        return {"mean": None, "low": None, "high": None, "n": 0}
    if len(known) < 2:
        return {"mean": float(known[0]), "low": None, "high": None, "n": 1}
    drawn = np.random.default_rng(seed).choice(known, (RESAMPLES, len(known))).mean(axis=1)
    low, high = np.percentile(drawn, [2.5, 97.5])
    return {"mean": float(known.mean()), "low": float(low), "high": float(high), "n": len(known)}


def compare(
    results: Sequence[Mapping[str, Any]], plain: str = "ce", against: Sequence[str] = ("ce",)
) -> dict[str, dict[str, Any]]:
    """{recipe: {"box": ..., "methods": {method: figures}}} of a study's results.

    Figures: "trials" and "failed" (counts), "hypervolume", "learned_within" {tolerance: share} and "against" {method:
    paired difference of hypervolume}, each as `interval`, and "front", that of all its seeds. A failed trial's points
    count as far as they were measured; a seed without any point is left out of the means.

    Raises ValueError if a recipe has no measured result of the method `plain`, or none of one in `against`.
    """
    found = {}
    for recipe in dict.fromkeys(result["recipe"] for result in results):
        here = [result for result in results if result["recipe"] == recipe]
        for name in dict.fromkeys([plain, *against]):
            if not points_of(result for result in here if result["method"] == name):
                known = ", ".join(dict.fromkeys(result["method"] for result in here))
                raise ValueError(f"{recipe}: no measured result of the method {name!r}; methods: {known}.")
        box = _box([result for result in here if result["method"] == plain])
        found[recipe] = {"box": box, "methods": _methods(here, box, against)}
    return found


def _box(plain: Sequence[Mapping[str, Any]]) -> Box:
    base = next(result["base"]["target"]["loss"] for result in plain if "base" in result)
    seeds = _by_seed(plain)
    best = [min(points, key=lambda point: point.loss) for points in seeds.values()]
    return Box(base, float(np.mean([p.loss for p in best])), float(np.mean([p.rise for p in best])))


def _methods(results: Sequence[Mapping[str, Any]], box: Box, against: Sequence[str]) -> dict[str, Any]:
    names = list(dict.fromkeys(result["method"] for result in results))
    own = {name: [result for result in results if result["method"] == name] for name in names}
    seeds = {name: _by_seed(own[name]) for name in names}
    areas = {name: {seed: hypervolume(points, box) for seed, points in seeds[name].items()} for name in names}

    def within(name: str, tolerance: float) -> dict[str, Any]:
        return interval([share_learned(points, box, tolerance) for points in seeds[name].values()])

    def difference(name: str, other: str) -> dict[str, Any]:
        both = [seed for seed in areas[name] if seed in areas[other]]
        return interval([areas[name][seed] - areas[other][seed] for seed in both])

    return {
        name: {
            "trials": len(own[name]),
            "failed": sum(result["status"] == "failed" for result in own[name]),
            "hypervolume": interval(list(areas[name].values())),
            "learned_within": {tolerance: within(name, tolerance) for tolerance in TOLERANCES},
            "against": {other: difference(name, other) for other in against if other != name},
            "front": front(points_of(own[name])),
        }
        for name in names
    }


def _by_seed(results: Sequence[Mapping[str, Any]]) -> dict[int, list[Point]]:
    """The points of each seed that has any, of the settings and options that all of these seeds share, if there are
    such. A trial that failed was run, so the other seeds keep its setting. Where the base's hidden states come from is
    not asked: it changes nothing."""
    run: dict[int, dict[str, list[Point]]] = {}
    for result in results:
        options = {key: value for key, value in result.get("options", {}).items() if key != "base"}
        name = json.dumps([result["setting"], options], sort_keys=True, default=str)
        run.setdefault(result["seed"], {}).setdefault(name, []).extend(points_of([result]))
    settings = {seed: own for seed, own in run.items() if any(own.values())}
    shared = set.intersection(*map(set, settings.values())) if settings else set()
    return {
        seed: [point for name, points in own.items() if not shared or name in shared for point in points]
        for seed, own in settings.items()
    }
