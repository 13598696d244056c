"""Fronts and hypervolume against brute force, and the cases where there is little to compare."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest

pytest.importorskip("optuna")

from hypothesis import given
from hypothesis import strategies as st

from mask_the_target.front.fronts import (
    Box,
    Point,
    by_score,
    compare,
    front,
    hypervolume,
    interval,
    points_of,
    share_learned,
)

# Whole numbers have ties, and cells of size 1 that can be counted.
GRID = 12
points_on_grid = st.lists(st.builds(Point, st.integers(0, GRID + 3), st.integers(-4, GRID + 3)), max_size=12)


@given(points_on_grid)
def test_front_is_what_no_other_point_dominates(points: list[Point]) -> None:
    def dominated(a: Point) -> bool:
        return any(b.loss <= a.loss and b.rise <= a.rise and (b.loss < a.loss or b.rise < a.rise) for b in points)

    found = front(points)
    assert {(p.loss, p.rise) for p in found} == {(p.loss, p.rise) for p in points if not dominated(p)}
    assert len({(p.loss, p.rise) for p in found}) == len(found)
    assert [p.loss for p in found] == sorted(p.loss for p in found)


@given(points_on_grid, st.integers(0, GRID - 1), st.integers(1, GRID))
def test_hypervolume_is_the_count_of_dominated_cells(points: list[Point], best: int, worst: int) -> None:
    box = Box(base_loss=GRID, best_loss=best, worst_rise=worst)
    cells = sum(  # a cell is dominated if its lower left corner is
        any(p.loss <= x and p.rise <= y for p in points) for x, y in itertools.product(range(GRID), range(worst))
    )
    assert hypervolume(points, box) == pytest.approx(cells / ((GRID - best) * worst), abs=1e-12)


@given(st.integers(0, 2**32 - 1))
def test_hypervolume_of_random_points_by_monte_carlo(seed: int) -> None:
    random = np.random.default_rng(seed)
    losses, rises = random.uniform(1, 4, 6), random.uniform(0, 0.5, 6)
    box = Box(base_loss=4.0, best_loss=1.0, worst_rise=0.5)
    x, y = random.uniform(1, 4, 20_000), random.uniform(0, 0.5, 20_000)
    share = ((losses <= x[:, None]) & (rises <= y[:, None])).any(axis=1).mean()
    # Five standard errors of a share are at most 0.018.
    found = hypervolume([Point(*pair) for pair in zip(losses, rises, strict=True)], box)
    assert found == pytest.approx(share, abs=0.02)


def test_degenerate_hypervolumes() -> None:
    box = Box(base_loss=4.0, best_loss=2.0, worst_rise=0.5)
    assert hypervolume([Point(3.0, 0.25)], box) == 0.25  # one point: half of the learning, half of the loss
    assert hypervolume([Point(2.0, 0.0)], box) == 1.0
    assert hypervolume([Point(2.0, -0.3)], box) == 1.0  # a text loss below the base's: nothing lost
    assert hypervolume([Point(1.5, 0.0)], box) == 1.25  # more than plain CE's learning
    assert hypervolume([Point(2.0, 0.5)], box) == 0.0  # plain CE's best alone
    assert hypervolume([Point(4.0, 0.0)], box) == 0.0  # the base
    assert hypervolume([Point(5.0, 0.1), Point(3.0, 0.6)], box) == 0.0  # all outside
    assert hypervolume([], box) == 0.0
    assert math.isnan(hypervolume([Point(3.0, 0.1)], Box(4.0, 2.0, 0.0)))  # plain CE lost nothing
    assert math.isnan(hypervolume([Point(3.0, 0.1)], Box(4.0, 4.5, 0.5)))  # plain CE learned nothing


def test_share_learned_counts_perplexity() -> None:
    box = Box(base_loss=4.0, best_loss=2.0, worst_rise=0.5)
    points = [Point(3.5, math.log(1.0099)), Point(3.0, math.log(1.0499)), Point(2.0, math.log(1.0501))]
    assert share_learned(points, box, 0.01) == 0.25
    assert share_learned(points, box, 0.05) == 0.5
    assert share_learned(points[2:], box, 0.05) == 0.0  # the base is always there
    assert math.isnan(share_learned(points, Box(4.0, 4.0, 0.5), 0.05))


def test_interval_is_the_exact_bootstrap_of_three() -> None:
    values = [0.1, 0.4, 1.0]
    means = sorted(sum(drawn) / 3 for drawn in itertools.product(values, repeat=3))  # all 27 resamples
    found = interval(values)
    assert found["mean"] == pytest.approx(0.5)
    assert found["n"] == 3
    # 2.5% and 97.5% of 27 lie in the first and the last: the lowest and the highest value.
    assert (found["low"], found["high"]) == (pytest.approx(means[0]), pytest.approx(means[-1]))
    assert interval([0.3]) == {"mean": 0.3, "low": None, "high": None, "n": 1}
    assert interval([math.nan]) == {"mean": None, "low": None, "high": None, "n": 0}


def result(
    method: str, seed: int, *points: tuple[float, float], status: str = "complete", setting: int = 0
) -> dict[str, Any]:
    measured = [{"learned": x, "rise": y, "checkpoint": 1.0, "scale": 1.0} for x, y in points]
    base = {"base": {"target": {"loss": 4.0}}} if points else {}
    return (
        {"recipe": "r", "method": method, "seed": seed, "key": f"{method}{seed}", "status": status}
        | base
        | {"points": measured, "setting": {"weight": setting}}
    )


def test_compare_pairs_seeds_and_leaves_out_what_failed() -> None:
    results = [
        result("ce", 0, (2.0, 0.4), (3.0, 0.2)),
        result("ce", 1, (2.2, 0.6)),
        result("ce", 2, status="failed"),
        result("tmkl", 0, (3.0, 0.0)),
        result("tmkl", 1, (3.0, 0.1), (math.nan, 0.0), (2.5, math.nan)),
        result("tmkl", 2, (2.1, 0.0)),
    ]
    found = compare(results)["r"]
    box, methods = found["box"], found["methods"]
    assert (box.base_loss, box.best_loss, box.worst_rise) == (4.0, pytest.approx(2.1), pytest.approx(0.5))
    area = 1.9 * 0.5
    ce = [(1.0 * 0.3 + 1.0 * 0.1) / area, 0.0]
    tmkl = [0.5 / area, 0.4 / area, 1.0]
    assert methods["ce"]["hypervolume"]["mean"] == pytest.approx(np.mean(ce))
    assert (methods["ce"]["trials"], methods["ce"]["failed"], methods["ce"]["hypervolume"]["n"]) == (3, 1, 2)
    assert methods["tmkl"]["hypervolume"]["mean"] == pytest.approx(np.mean(tmkl))
    difference = methods["tmkl"]["against"]["ce"]
    assert difference["mean"] == pytest.approx(np.mean(tmkl[:2]) - np.mean(ce))
    assert difference["n"] == 2  # seeds that both have
    assert methods["tmkl"]["learned_within"][0.01]["mean"] == pytest.approx((1.0 / 1.9 + 0.0 + 1.0) / 3)
    assert [(p.loss, p.rise) for p in methods["tmkl"]["front"]] == [(2.1, 0.0)]
    assert methods["ce"]["against"] == {}
    assert len(points_of(results)) == 6


def test_a_failed_trial_takes_its_setting_from_no_other_seed() -> None:
    """A rate at which one seed diverges is still one that plain CE has, and the box is the best that it reaches."""
    whole = [result("ce", seed, (2.0, 0.4), setting=1) for seed in range(2)]
    whole += [result("ce", seed, (3.0, 0.1)) for seed in range(3)]
    found = compare([*whole, result("ce", 2, status="failed", setting=1)])["r"]
    best, worst = (2.0 + 2.0 + 3.0) / 3, (0.4 + 0.4 + 0.1) / 3
    assert (found["box"].best_loss, found["box"].worst_rise) == (pytest.approx(best), pytest.approx(worst))
    figures = found["methods"]["ce"]
    assert (figures["trials"], figures["failed"], figures["hypervolume"]["n"]) == (6, 1, 3)
    area = (4.0 - best) * worst
    each = [1.0 * (worst - 0.1) / area] * 3  # the point at 2.0 is beyond the box's worst rise
    assert figures["hypervolume"]["mean"] == pytest.approx(np.mean(each))


def test_seeds_are_compared_by_the_settings_that_all_have() -> None:
    """The first seed's second setting, better than all, is left out of the figures and stays in the front."""
    same = [
        result("ce", 0, (2.0, 0.4)),
        result("ce", 1, (2.0, 0.4)),
        result("tmkl", 0, (3.0, 0.0)),
        result("tmkl", 1, (2.5, 0.1)),
    ]
    more = [*same, result("tmkl", 0, (2.0, 0.0), setting=1), result("ce", 1, (1.0, 0.0), setting=1)]
    expected, found = compare(same)["r"], compare(more)["r"]
    assert found["box"] == expected["box"]
    for name in ("hypervolume", "learned_within", "against"):
        assert found["methods"]["tmkl"][name] == expected["methods"]["tmkl"][name]
    assert [(p.loss, p.rise) for p in found["methods"]["tmkl"]["front"]] == [(2.0, 0.0)]
    apart = [*same[:2], result("tmkl", 0, (3.0, 0.0), setting=1), result("tmkl", 1, (2.5, 0.1), setting=2)]
    assert compare(apart)["r"]["methods"]["tmkl"]["against"] == expected["methods"]["tmkl"]["against"]


def test_seeds_are_compared_by_options_too() -> None:
    """As above where the further run is of the same grid's setting and differs in what the method fixes."""
    options = {"tmkl_weight": 1.0, "base": "off"}
    same = [
        result("ce", 0, (2.0, 0.4)),
        result("ce", 1, (2.0, 0.4)),
        result("tmkl", 0, (3.0, 0.0)) | {"options": options},
        result("tmkl", 1, (2.5, 0.1)) | {"options": options | {"base": "cached"}},  # which is no other run
    ]
    more = [*same, result("tmkl", 0, (2.0, 0.0)) | {"options": options | {"tmkl_weight": 0.3}}]
    expected, found = (compare(results)["r"]["methods"]["tmkl"] for results in (same, more))
    assert expected["hypervolume"]["n"] == 2
    for name in ("hypervolume", "learned_within", "against"):
        assert found[name] == expected[name]


def test_compare_says_which_method_is_missing() -> None:
    with pytest.raises(ValueError, match="r: no measured result of the method 'full_kl'; methods: ce"):
        compare([result("ce", 0, (2.0, 0.4))], against=["full_kl"])
    with pytest.raises(ValueError, match="no measured result of the method 'ce'"):
        compare([result("ce", 0, status="failed")])


def test_by_score_takes_the_share_of_the_bases_score_that_is_gone() -> None:
    """Worked out by hand: 0.5 of the base's facts; 0.4 and 0.25 left are a fifth and a half gone."""

    def scored(method: str, *states: tuple[float, float | None]) -> dict[str, Any]:
        found = result(method, 0, *((loss, 9.0) for loss, _ in states))
        found["base"]["facts"] = {"greedy": 0.5, "logprob": 0.0}
        for point, (_, score) in zip(found["points"], states, strict=True):
            point["probes"] = {"facts": {"greedy": score, "logprob": 0.0}} if score is not None else {}
        return found

    results = [scored("ce", (2.0, 0.25), (1.5, None), (3.0, 0.4)), scored("tmkl", (2.5, 0.5), (2.0, 0.55))]
    found = by_score(results, "facts", "greedy")
    assert [(p["learned"], pytest.approx(p["rise"])) for r in found for p in r["points"]] == [
        *((2.0, 0.5), (3.0, 0.2), (2.5, 0.0), (2.0, -0.1)),
    ]
    assert results[0]["points"][0]["rise"] == 9.0  # the results themselves stay
    figures = compare(found)["r"]
    assert figures["box"] == Box(base_loss=4.0, best_loss=2.0, worst_rise=0.5)
    # ce: the corner (3.0, 0.2) covers (4-3) x (0.5-0.2) of 2 x 0.5; tmkl: all; more than the base's
    # score is nothing lost.
    assert figures["methods"]["ce"]["hypervolume"]["mean"] == pytest.approx(0.3)
    assert figures["methods"]["tmkl"]["hypervolume"]["mean"] == pytest.approx(1.0)
    assert by_score(results, "facts", "logprob") == []  # a base of nothing has no share to lose
    assert by_score(results, "instructions", "followed") == []


def test_by_score_has_one_base_for_all_runs_of_a_recipe() -> None:
    """Plain CE's base is measured as 0.4 and 0.6, another machine's as 0.8: all lose the same by 0.5."""

    def scored(method: str, seed: int, base: float, score: float, recipe: str = "r") -> dict[str, Any]:
        found = result(method, seed, (2.0, 9.0)) | {"recipe": recipe}
        found["base"]["facts"] = {"greedy": base}
        found["points"][0]["probes"] = {"facts": {"greedy": score}}
        return found

    runs = [scored("ce", 0, 0.4, 0.25), scored("ce", 1, 0.6, 0.25), scored("tmkl", 0, 0.8, 0.25)]
    alone = scored("tmkl", 0, 1.0, 0.25, recipe="without plain CE")
    rises = [found["points"][0]["rise"] for found in by_score([*runs, alone], "facts", "greedy")]
    assert rises == pytest.approx([0.5, 0.5, 0.5, 0.75])
