"""`mtt report`: a study's results as one page that opens offline, with a picture and every point as CSV beside it.

Read are the files results/*.json in a study's folder, as `sweep.run_trial` writes them. Numbers are those of
`fronts.compare`. Everything that comes from the files is escaped; besides, the page forbids the browser to load
anything and to run any script but its own two (a Content-Security-Policy with their hashes).
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import math
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mask_the_target.files import write_whole
from mask_the_target.front import plots
from mask_the_target.front.fronts import TOLERANCES, finite_points, interval, points_of
from mask_the_target.front.plots import Curve, Dot, Fronts, Style
from mask_the_target.front.report import TEXTS, Column, render
from mask_the_target.front.results import (
    PLAIN,
    SCORES,
    Recipe,
    Result,
    as_text,
    end_of,
    figures_csv,
    known_setting,
    option,
    read_results,
    text_drifts,
    to_csv,
    unique,
)

FEW_SEEDS = 5
# -------------------------------------------------------------------------------------------------------- numbers

NONE, MINUS = "–", "−"  # a line may break after a hyphen


def _number(value: float | None, sign: bool = False) -> str:
    if value is None or not math.isfinite(value):
        return NONE
    return (f"{value:+.3f}" if sign else f"{value:.3f}").replace("-", MINUS)


def _share(value: float | None, sign: bool = False) -> str:
    if value is None or not math.isfinite(value):
        return NONE
    return (f"{100 * value:+.1f}%" if sign else f"{100 * value:.1f}%").replace("-", MINUS)


def _unbroken(setting: str) -> str:
    """A setting in which a line breaks after a value, and not before."""
    return setting.replace(" ", "\u00a0").replace(",\u00a0", ", ") or NONE


def _interval(found: Mapping[str, Any], write: Any = _number, sign: bool = False) -> str:
    """Mean and 95% interval; the mean alone where there is one seed."""
    if found["low"] is None:
        return write(found["mean"], sign)
    # The space within the brackets doesn't break.
    return f"{write(found['mean'], sign)} [{write(found['low'], sign)},\u00a0{write(found['high'], sign)}]"


@dataclass(frozen=True)
class Table:
    """Rows of text; the first `texts` columns are words, the others numbers."""

    columns: list[Column]
    rows: list[list[str]]
    texts: int = 1

    @classmethod
    def of(cls, columns: Sequence[tuple[Column, Sequence[str]]], texts: int = 1) -> Table:
        """From columns with their cells, without those that nothing was measured for."""
        kept = [pair for place, pair in enumerate(columns) if place < texts or set(pair[1]) - {NONE, ""}]
        cells = [cells for _, cells in kept]
        return cls([column for column, _ in kept], [list(row) for row in zip(*cells, strict=True)], texts)


METHOD = Column("method", "The name that the study file gives it.")
SETTING = Column("setting", "The options that differ between this method's runs.")
SEEDS = Column("seeds", "Runs that ended and were measured, one for each seed; the numbers are means over them.")


def figures_table(recipe: Recipe) -> Table:
    """`fronts.compare` as a table: one row for each method."""
    box, methods = recipe.box, recipe.figures
    rows = list(methods.values())
    columns = [(METHOD, list(methods))]
    if box is not None:
        columns += [
            (
                Column(
                    "hypervolume",
                    "The area above and to the right of a front, as a share of the dotted rectangle between the base "
                    "and plain CE at its best: 0 is the base, 1 is all of plain CE's learning with nothing lost. Each "
                    "seed has its own front, of the settings that all seeds have; the mean over seeds, and in brackets "
                    "its bootstrap 95% interval.",
                    "higher",
                ),
                [_interval(row["hypervolume"]) for row in rows],
            ),
        ]
        for name, words in ((PLAIN, "plain CE's"), (recipe.full_kl, "full KL's")):
            if name is not None:
                meaning = (
                    f"Hypervolume less that of {name} at the same seed ({words} front), mean over seeds and bootstrap "
                    "95% interval. Where the interval holds 0, the difference may be chance."
                )
                cells = [_interval(row["against"][name], sign=True) if name in row["against"] else NONE for row in rows]
                columns.append((Column(f"less {name}'s", meaning, "higher"), cells))
        for tolerance in TOLERANCES:
            meaning = (
                "How far down from the base's target loss to plain CE's best this method gets with points at which the "
                f"perplexity on English text is at most {tolerance:.0%} above the base's."
            )
            column = Column(f"learned, losing ≤ {tolerance:.0%}", meaning, "higher")
            columns.append((column, [_interval(row["learned_within"][tolerance], _share) for row in rows]))
        seeds = [str(len(unique(r["seed"] for r in recipe.of(name) if points_of([r])))) for name in methods]
        columns.append((Column("seeds", "Seeds with a measured point."), seeds))
    columns += [
        (Column("trials", "Runs, over all settings and seeds."), [str(row["trials"]) for row in rows]),
        (
            Column("failed", "Of these, runs that gave no usable end; the reasons are at the end of the page."),
            [str(row["failed"]) for row in rows],
        ),
    ]
    return Table.of(columns)


def scores_table(recipe: Recipe) -> Table:
    """Fronts where what was lost is a score of another kind than text: one row for each method that has any."""
    found = {words: other for key, words in SCORES.items() if (other := recipe.by_score(*key)) is not None}
    methods = unique(name for other in found.values() for name in other.methods if other.measured(name))
    columns: list[tuple[Column, list[str]]] = [(METHOD, methods)]
    for words, other in found.items():
        rows = [other.figures.get(name) for name in methods]
        meaning = "Hypervolume of the fronts on which what was lost is the share of the base's score on this probe."
        areas = [NONE if row is None else _interval(row["hypervolume"]) for row in rows]
        columns.append((Column(f"{words}: hypervolume", meaning, "higher"), areas))
        meaning = f"Hypervolume less that of {PLAIN} at the same seed, mean over seeds and bootstrap 95% interval."
        less = [
            NONE if row is None or name == PLAIN else _interval(row["against"][PLAIN], sign=True)
            for name, row in zip(methods, rows, strict=True)
        ]
        columns.append((Column(f"{words}: less {PLAIN}'s", meaning, "higher"), less))
        meaning = "The share of plain CE's best learning that is reached with at most 5% of the base's score gone."
        within = [NONE if row is None else _interval(row["learned_within"][0.05], _share) for row in rows]
        columns.append((Column(f"{words}: learned, losing ≤ 5%", meaning, "higher"), within))
    return Table.of(columns)


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None and math.isfinite(value)]
    return statistics.fmean(known) if known else None


def _drifts(result: Result) -> dict[str, float]:
    """At the end of a run: relative rise of perplexity on each text, and the masked KL."""
    end, found = end_of(result), text_drifts(result)
    if end is not None and "drift" in end["probes"]:
        found["drift"] = end["probes"]["drift"]["masked_kl"]
    return found


def _ended(recipe: Recipe) -> dict[tuple[str, str], list[Result]]:
    found = {group: [r for r in results if end_of(r) is not None] for group, results in recipe.groups().items()}
    return {group: results for group, results in found.items() if results}


def _first_columns(groups: Mapping[tuple[str, str], Sequence[Result]]) -> list[tuple[Column, list[str]]]:
    return [
        (METHOD, [method for method, _ in groups]),
        (SETTING, [_unbroken(setting) for _, setting in groups]),
        (SEEDS, [str(len(results)) for results in groups.values()]),
        (
            Column("target loss", "Loss on held-out answers of the task at the end, nats per token.", "lower"),
            [_number(_mean(end_of(result)["learned"] for result in results)) for results in groups.values()],
        ),
    ]


def paper_table(recipe: Recipe) -> Table:
    """The paper's summary: each run at its end, its drift, and the share of plain CE's that it prevented."""
    groups = _ended(recipe)
    columns = _first_columns(groups)
    drifts = {result["key"]: _drifts(result) for result in recipe.results}
    for probe in unique(probe for found in drifts.values() for probe in found):
        of_text = probe != "drift"
        name = TEXTS.get(probe, probe.removeprefix("text:")) if of_text else "masked KL"
        meaning = "KL from the base on held-out answers, the target token left out, nats per token."
        if of_text:
            meaning = f"Rise of the perplexity on {name}, relative to the base's."
        write = (lambda value: _share(value, sign=True)) if of_text else _number
        cells = [write(_mean(drifts[result["key"]].get(probe) for result in results)) for results in groups.values()]
        columns.append((Column(f"{name} drift" if of_text else name, meaning, "lower"), cells))
        shares = []
        for results in groups.values():
            found = []
            for result in results:
                plain = recipe.plain_of(result)
                most = drifts[plain["key"]].get(probe, math.nan) if plain is not None else math.nan
                if most > 0:  # plain CE lost something
                    found.append(1 - drifts[result["key"]].get(probe, math.nan) / most)
            shares.append(_interval(interval(found), _share))
        meaning = (
            f"1 - ({name} of this run / that of plain CE with the same seed, adapter and options), mean over seeds and "
            "bootstrap 95% interval."
        )
        columns.append((Column(f"{name}: prevented", meaning, "higher"), shares))
    return Table.of(columns, texts=2)


KEPT = {  # probe and metric: heading, meaning, how it is written, which way is better
    ("target", "exact_match"): ("exact match", "Share of held-out questions answered exactly right.", _share, "higher"),
    ("target", "token_error_rate"): (
        "error rate",
        "Wrong, missing and extra words (arpabet: phonemes) per word of the right answer.",
        _share,
        "lower",
    ),
    ("target", "chrf"): ("chrF", "Overlap of character n-grams with the right answers, 0 to 100.", _number, "higher"),
    ("facts", "greedy"): (
        "facts, greedy",
        "Share of questions of general knowledge whose greedy answer names the fact.",
        _share,
        "higher",
    ),
    ("facts", "logprob"): (
        "facts, log-prob",
        "Share of them where the right answer is likelier than its distractors.",
        _share,
        "higher",
    ),
    ("instructions", "followed"): (
        "instructions followed",
        "Share of answers in the form that was asked for (JSON, a list, one sentence ...).",
        _share,
        "higher",
    ),
    ("drift", "masked_kl"): (
        "KL, masked",
        "KL from the base on held-out answers without the target token, nats per token.",
        _number,
        "lower",
    ),
    ("drift", "full_kl"): (
        "KL, full",
        "The same with the target token: it also holds what was meant to be learned, so it need not be small.",
        _number,
        "",
    ),
}
ANSWERED = {
    "target": "the task's held-out questions",
    "facts": "questions of general knowledge",
    "instructions": "instructions whose form a program checks",
}
COUNTS = ("n", "tokens", "answered", "answer_tokens")


def _metrics(probes: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Probe and metric of the figures to show; of a probe with a score, that alone."""
    for probe, values in probes.items():
        for metric, value in values.items():
            figure = type(value) in (int, float) and metric not in COUNTS and not metric.endswith("stderr")
            if (metric == "score" or "score" not in values) and figure and (probe, metric) != ("target", "loss"):
                yield probe, metric


def probes_table(recipe: Recipe) -> Table:
    """Every metric of every probe at the end of the runs, the base first."""
    groups = _ended(recipe)
    base: dict[str, Any] = next((result["base"] for result in recipe.results if "base" in result), {})
    columns = [
        (column, [first, *cells])
        for (column, cells), first in zip(
            _first_columns(groups), ("base", NONE, NONE, _number(base.get("target", {}).get("loss"))), strict=True
        )
    ]
    ends = [[end_of(result)["probes"] for result in results] for results in groups.values()]
    states = [base, *(probes for group in ends for probes in group)]
    for probe, metric in unique(found for probes in states for found in _metrics(probes)):
        values = next(probes[probe] for probes in states if metric in probes.get(probe, {}))
        name, better = values.get("metric", metric), values.get("better", "")
        unknown = (f"{probe}: {name}", f"The figure {name} of the probe {probe}, in its own unit.", _number, better)
        form = probe.removeprefix("facts:") if probe.startswith("facts:") else ""
        heading, meaning, write, better = KEPT.get(("facts" if form else probe, metric), unknown)
        heading += f" ({form})" if form else ""
        if probe.startswith("text:") and metric == "loss":
            name = TEXTS.get(probe, probe.removeprefix("text:"))
            heading, better = f"{name} loss", "lower"
            meaning = f"Loss on English text ({name}), nats per token: what was kept."
        values = [base.get(probe, {}).get(metric)]
        values += [_mean(probes.get(probe, {}).get(metric) for probes in group) for group in ends]
        columns.append((Column(heading, meaning, better), [write(value) for value in values]))
    return Table.of(columns, texts=2)


def front_table(recipe: Recipe) -> Table:
    """The points of every front, from most learned to most kept."""
    by_key = {result["key"]: result for result in recipe.results}
    rows = []
    for method, figures in recipe.figures.items():
        for p in figures["front"]:
            result = by_key[p.key]
            state = [f"{p.checkpoint:.0%}", f"{p.scale:g}"]
            numbers = [_number(p.loss), _number(p.rise, sign=True), _share(math.expm1(p.rise), sign=True)]
            rows.append([method, _unbroken(recipe.setting(result)), str(result["seed"]), *state, *numbers])
    columns = [
        METHOD,
        SETTING,
        Column("seed", "The run's seed."),
        Column("checkpoint", "Share of the run's steps after which this was measured."),
        Column("scale", "Factor of the adapter's update: 1 is as trained."),
        Column("target loss", "Loss on held-out answers, nats per token.", "lower"),
        Column("text loss", "Its rise over the base's, nats per token, the mean over the texts.", "lower"),
        Column("perplexity", "The same as a relative rise of perplexity.", "lower"),
    ]
    return Table(columns, rows, texts=2)


def distance_table(recipes: Sequence[Recipe]) -> Table:
    """How far each set is from the base, and what plain CE forgets on it."""
    boxes = [(recipe, recipe.box) for recipe in recipes]
    return Table.of(
        [
            (Column("recipe", "The data set."), [recipe.name for recipe, _ in boxes]),
            (
                Column("base's target loss", "Before any training, nats per token: the higher, the farther the set."),
                [_number(recipe.base_loss()) for recipe, _ in boxes],
            ),
            (
                Column("plain CE's best", "Its lowest target loss, nats per token, mean over seeds.", "lower"),
                [_number(box.best_loss if box else None) for _, box in boxes],
            ),
            (
                Column("text loss there", "Rise over the base where plain CE learned most, nats per token.", "lower"),
                [_number(box.worst_rise if box else None, sign=True) for _, box in boxes],
            ),
            (
                Column("perplexity there", "The same as a relative rise of perplexity.", "lower"),
                [_share(math.expm1(box.worst_rise) if box else None, sign=True) for _, box in boxes],
            ),
        ]
    )


# ------------------------------------------------------------------------------------------------------ sentences


def sentences(recipe: Recipe) -> list[str]:
    """What the figures say, how far they carry, and what is missing."""
    box, methods = recipe.box, recipe.figures
    found = []
    if not any(figures["front"] for figures in methods.values()):
        return [f"None of the {len(recipe.results)} trials gave a measured point, so there is no front to show."]
    if box is None:
        found.append(
            f"There is no measured run of a method named {PLAIN!r} (plain cross-entropy), so nothing can be given as a "
            "share of its learning: no hypervolume, no differences, no share prevented. The fronts are shown as they "
            f"are. To compare, add plain cross-entropy to the study file as {PLAIN}."
        )
    elif box.is_empty():
        why = (
            "learned nothing: its target loss never fell below the base's"
            if not box.best_loss < box.base_loss
            else "lost nothing: where it learned most, the text loss is no higher than the base's"
        )
        found.append(f"Plain CE {why}, so there is no area to have a share of, and hypervolume is not defined here.")
    else:
        found.append(
            f"The base's target loss is {box.base_loss:.3f} nats per token. Plain CE gets it down to "
            f"{box.best_loss:.3f}, where the loss on English text is {box.worst_rise:.3f} above the base's (perplexity "
            f"{math.expm1(box.worst_rise):+.1%})."
        )
        found += _verdict(methods)
    if box is not None:
        seeds = unique(result["seed"] for result in recipe.results)
        counts = {figures["hypervolume"]["n"] for figures in methods.values() if figures["front"]}
        fewest = min(counts - {0, 1}, default=FEW_SEEDS)  # of those that have an interval
        if len(seeds) == 1:
            found.append(
                f"Only one seed ({seeds[0]}) was run, so there are no intervals: a difference between two methods may "
                "be chance."
            )
        elif 1 in counts:
            found.append("Where a method has a single seed, there is no interval: a difference may be chance.")
        if fewest < FEW_SEEDS:
            found.append(
                f"With {fewest} seeds a bootstrap interval is too narrow: it can be no wider than from the lowest seed "
                "to the highest."
            )
    every = [point for result in recipe.results for point in result["points"]]
    lost = len(every) - len(points_of(recipe.results))
    if lost:
        found.append(f"{lost} of {len(every)} points are not finite numbers and are left out; the CSV holds them.")
    failed = sum(figures["failed"] for figures in methods.values())
    if failed:
        found.append(f"{failed} of {len(recipe.results)} trials failed; their reasons are at the end of the page.")
    return found


def _verdict(methods: Mapping[str, Any]) -> list[str]:
    """Which fronts are above or below plain CE's, as far as the intervals of the paired differences say."""
    groups: dict[str, list[str]] = {
        "above": [],
        "below": [],
        "no clear difference": [],
        "two seeds, too few to say": [],
    }
    for name, figures in methods.items():
        found = figures["against"].get(PLAIN)
        if found is not None and found["low"] is not None:
            side = "above" if found["low"] > 0 else "below" if found["high"] < 0 else "no clear difference"
            side = side if found["n"] > 2 else "two seeds, too few to say"
            groups[side].append(name)
    if not any(groups.values()):
        return []
    words = [f"{side}: {', '.join(names)}" for side, names in groups.items() if names]
    return [
        f"Against plain CE's front, by the 95% interval of the paired difference in hypervolume: {'; '.join(words)}."
    ]


# ---------------------------------------------------------------------------------------------------------- plots


def _tooltip(recipe: Recipe, result: Result, point: Mapping[str, Any]) -> list[str]:
    lines = [result["method"], *(part for part in recipe.setting(result).split(", ") if part)]
    lines.append(f"seed {result['seed']}, step {point['step']} ({point['checkpoint']:.0%} of the run)")
    lines.append(f"adapter × {point['scale']:g}")
    lines.append(f"target loss {point['learned']:.3f} nats per token")
    lines.append(f"text loss {point['rise']:+.3f} nats per token (perplexity {math.expm1(point['rise']):+.1%})")
    exact = point.get("probes", {}).get("target", {}).get("exact_match")
    return lines + ([f"exact match {exact:.1%}"] if exact is not None else [])


def drawn_fronts(recipe: Recipe, styles: Mapping[str, Style]) -> Fronts | None:
    """What the plot of the fronts shows; None if there is no point, or no base's loss."""
    base, box, methods = recipe.base_loss(), recipe.box, recipe.figures
    fronts: dict[str, list[Dot]] = {}
    others: dict[str, list[Dot]] = {}
    for name, figures in methods.items():
        on_front = {(p.key, p.checkpoint, p.scale) for p in figures["front"]}
        for result in recipe.of(name):
            for point in finite_points(result):
                dot = Dot(point["learned"], point["rise"], _tooltip(recipe, result, point))
                place = (result["key"], point["checkpoint"], point["scale"])
                (fronts if place in on_front else others).setdefault(name, []).append(dot)
    if base is None or not fronts:
        return None
    fronts = {name: sorted(dots, key=lambda dot: dot.x) for name, dots in fronts.items()}
    text = ["base", f"target loss {base:.3f} nats per token", "text loss: its own, so no rise"]
    return Fronts(Dot(base, 0.0, text), fronts, others, styles, box)


def curves(recipe: Recipe) -> list[Curve]:
    """For each method and setting, target loss and rise of text loss at each checkpoint, mean over seeds."""
    base = recipe.base_loss()
    found = []
    for (method, setting), results in recipe.groups().items():
        whole = [point for result in results for point in finite_points(result) if point["scale"] == 1]
        sides: dict[str, list[Dot]] = {"learned": [], "rise": []}
        for side, words in (("learned", "target loss"), ("rise", "rise of text loss")):
            if base is not None:
                sides[side].append(Dot(0.0, base if side == "learned" else 0.0, ["base, before the first step"]))
            for checkpoint in sorted({point["checkpoint"] for point in whole}):
                values = [point[side] for point in whole if point["checkpoint"] == checkpoint]
                lines = [method, *(part for part in setting.split(", ") if part), f"{checkpoint:.0%} of the run"]
                lines.append(f"{words} {statistics.fmean(values):.3f} nats per token")
                lines.append(f"mean of {len(values)} seeds" if len(values) > 1 else "one seed")
                sides[side].append(Dot(checkpoint, statistics.fmean(values), lines))
        if whole:
            found.append(Curve(method, sides["learned"], sides["rise"]))
    return found


# -------------------------------------------------------------------------------------------------------- samples


def samples(recipe: Recipe) -> list[dict[str, Any]]:
    """For each probe of ANSWERED: the runs shown, and per question the right answer and that of base and runs.

    Shown are plain CE and TMKL, each by its run that learned most at its end; without them, the first two methods.
    """
    wanted = [PLAIN, recipe.tmkl]
    runs = []
    for method in [name for name in wanted if name in recipe.methods] or recipe.methods[:2]:
        ended = [result for result in recipe.of(method) if end_of(result) is not None]
        runs += [min(ended, key=lambda result: end_of(result)["learned"])] if ended else []
    found = []
    for probe, title in ANSWERED.items():
        sources = [("base", "", runs[0]["base"] if runs else {})]
        sources += [(run["method"], _run_words(recipe, run), end_of(run)["probes"]) for run in runs]
        given = [(n, s, probes.get(probe, {}).get("answers") or []) for n, s, probes in sources]
        by_question = [{(row["question"], row["right"]): row["answer"] for row in rows} for _, _, rows in given]
        asked = unique([*key] for answers in by_question for key in answers)
        if asked:
            rows = [
                {"question": q, "right": right, "answers": [answers.get((q, right)) for answers in by_question]}
                for q, right in asked
            ]
            found.append({"title": title, "names": [(name, words) for name, words, _ in given], "rows": rows})
    return found


def _run_words(recipe: Recipe, run: Result) -> str:
    setting = recipe.setting(run)
    return ", ".join([*([setting] if setting else []), f"seed {run['seed']}"])


# ----------------------------------------------------------------------------------------------------------- page

PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; script-src {{ hashes }}; \
style-src 'unsafe-inline'; img-src data: blob:; base-uri 'none'; form-action 'none'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ title }}</title>
<style>
{{ style }}
h1, h2, h3, p, li { overflow-wrap: anywhere; }
h2 { font-size: 1.3rem; margin-top: 3rem; border-top: 1px solid var(--line); padding-top: 1.5rem; }
h3 { font-size: 1.05rem; margin-top: 2rem; }
body { max-width: 70rem; }
.scroll th, .scroll td { white-space: normal; padding: .35rem .6rem; }
thead th { vertical-align: bottom; font-size: .9em; }
td.word, th.word { text-align: left; }
td.word + td.word { min-width: 11rem; }
.scroll th:first-child, .scroll td:first-child { max-width: 16rem; overflow-wrap: break-word; position: sticky;
       left: 0; background: var(--ground); }
.plot { background: #fff; border: 1px solid var(--line); border-radius: 6px; margin: 1rem 0; overflow: hidden; }
details { margin: .6rem 0 1.2rem; } summary { cursor: pointer; color: var(--mark); }
dl { margin: .5rem 0; } dt { font-weight: 600; } dd { margin: 0 0 .5rem; color: var(--dim); }
.sample { border-top: 1px solid var(--line); padding: .7rem 0; }
.plain td:first-child { min-width: 7rem; }
.sample p { margin: .1rem 0; white-space: pre-wrap; }
.answers { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(16rem, 100%), 1fr)); gap: .3rem 1.5rem; }
.answers .label { display: block; font-weight: 600; }
.label { color: var(--dim); font-size: .85em; }
button { font: inherit; padding: .2rem .7rem; }
@media (max-width: 640px) {
  body { padding: 1rem .75rem; font-size: 15px; } .plot { margin: 1rem -.4rem; }
  .scroll th, .scroll td { padding: .3rem .45rem; } td.word + td.word { min-width: 8rem; }
  .scroll th:first-child, .scroll td:first-child { max-width: 7rem; }
}
</style>
</head>
<body>
{% macro words(columns) %}
<details><summary>What the columns say</summary><dl>
{% for column in columns if column.meaning %}<dt>{{ column.heading }}</dt><dd>{{ column.meaning }}</dd>
{% endfor %}</dl></details>
{% endmacro %}
{% macro numbers(table) %}
<div class="scroll" tabindex="0" role="group" aria-label="table"><table>
<thead><tr>{% for column in table.columns %}<th scope="col"{% if loop.index0 < table.texts %} class="word"{% endif %}>\
{{ column.heading }}{% if column.better == "lower" %} <em title="lower is better">↓</em>{% elif \
column.better == "higher" %} <em title="higher is better">↑</em>{% endif %}</th>{% endfor %}</tr></thead>
<tbody>
{% for row in table.rows %}<tr>{% for cell in row %}<td{% if loop.index0 < table.texts %} class="word"{% endif %}>\
{{ cell }}</td>{% endfor %}</tr>
{% endfor %}</tbody></table></div>
{{ words(table.columns) }}
{% endmacro %}
{% macro plot(name, label) %}
<div class="plot" id="{{ name }}" role="img" aria-label="{{ label }}"></div>
{% if plots[name].outside %}<p class="dim">{{ plots[name].outside }} points lie outside of what is shown.
<button type="button" data-plot="{{ name }}">Show all</button></p>{% endif %}
{% endmacro %}
<h1>{{ title }}</h1>
<p>{{ lead }}</p>
<p class="dim">A point is one state of one run: <b>what was learned</b> is the loss on held-out answers of the task,
<b>what was lost</b> is how far the loss on English text has risen over the base model's, both in nats per token (a
rise of 0.01 is 1% more perplexity). Each run is measured at checkpoints along the way and at its end with the adapter
scaled down, for early stopping and scaling cost nothing and compete with every method. A method's <b>front</b> is its
points that no other of its points beats in both. ↓ lower is better, ↑ higher is better.</p>
<noscript><p><b>The plots need JavaScript.</b> The tables hold the numbers without it{% if png %}, and {{ png }} shows
the fronts{% endif %}.</p></noscript>
{% for recipe in recipes %}
<h2>{{ recipe.name }}</h2>
{% for line in recipe.sentences %}<p>{{ line }}</p>
{% endfor %}
{% if recipe.fronts %}
<h3>Learned against lost</h3>
{{ plot(recipe.fronts, "Target loss against rise of text loss; the tables below hold the numbers") }}
<p class="dim">Left is more learned, down is more kept. Lines join the points of a method's front over all settings,
seeds, checkpoints and scales; faint markers are its other points. Point at a marker, or tap it, for what it is.
{% if recipe.box %}The dotted rectangle spans base and plain CE at its best.{% endif %} The thin lines are 1% and 5%
more perplexity than the base's.</p>
{% endif %}
{% if recipe.points %}
<h3>The fronts in numbers</h3>
{{ numbers(recipe.figures) }}
{% set count = recipe.on_front.rows | length %}
<details><summary>The {{ "one point" if count == 1 else count ~ " points" }} of the fronts</summary>
{{ numbers(recipe.on_front) }}</details>
{% endif %}
{% if recipe.scores.rows %}
<h3>Fronts of facts and instructions</h3>
<p class="dim">The same fronts where what was lost is not text loss but the share of the base's score that is gone: text
alone can mislead. Only states count at which the probe was measured{% if recipe.at_end %}, here the ends of the runs at
each scale, so no early stop is among them{% endif %}.</p>
{{ numbers(recipe.scores) }}
{% endif %}
{% if recipe.paper.rows %}
<h3>As the paper sums it up: each run at its end</h3>
<p class="dim">Drift is the relative rise of perplexity on text that was to be kept; prevented is the share of plain
CE's drift that did not happen. No early stop and no scaling here, so a method can look better than on its front.
{% if not recipe.has_plain %}Without a method named ce there is no share prevented.{% endif %}</p>
{{ numbers(recipe.paper) }}
<h3>All that was measured at the end</h3>
{{ numbers(recipe.probes) }}
{% endif %}
{% if recipe.curves %}
<h3>Along the run</h3>
{{ plot(recipe.curves, "Target loss and rise of text loss along the run; the CSV holds the numbers") }}
<p class="dim">Target loss above, rise of text loss below, both in nats per token; one line for each setting, mean over
its seeds. A label stands at the method's setting that learned most. The CSV holds every number.</p>
{% endif %}
{% for part in recipe.samples %}
<h3>Answers to {{ part.title }}</h3>
<p class="dim">{% for name, words in part.names %}{% if words %}{{ name }}: {{ words }}. {% endif %}{% endfor %}
Of each method the run that learned most at its end. Greedy, the same questions for all.</p>
{% for row in part.rows %}<div class="sample">
<p><span class="label">question</span> {{ row.question }}</p>
<p><span class="label">right answer</span> {{ row.right }}</p>
<div class="answers">{% set which = part.names %}{% for answer in row.answers %}<p><span class="label">\
{{ which[loop.index0][0] }}</span>{{ "not asked" if answer is none else answer or "(nothing)" }}</p>{% endfor %}</div>
</div>
{% endfor %}
{% endfor %}
{% endfor %}
{% if recipes | selectattr("points") | list %}
<h2>Distance from the base, and forgetting</h2>
<p class="dim">How far a set is from the base is the base's own loss on its held-out answers; what it costs to learn it
is plain CE's rise of text loss where it learned most.</p>
{% if distance_plot %}{{ plot("distance", "Base's target loss against plain CE's rise of text loss") }}
{% endif %}
{{ numbers(distance) }}
{% endif %}
<h2>Settings and versions</h2>
{% for name, values in details.items() if values %}<h3>{{ name }}</h3>
<table class="plain"><tbody>
{% for key, value in values.items() %}<tr><td>{{ key }}</td><td>{{ value }}</td></tr>
{% endfor %}</tbody></table>
{% endfor %}
<h2>Failed trials</h2>
{% if failed %}
<table class="plain">
<thead><tr>{% for name in ("trial", "setting", "reason") %}<th scope="col" class="word">{{ name }}</th>{% endfor %}</tr>
</thead><tbody>
{% for row in failed %}<tr>{% for cell in row %}<td>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}</tbody></table>
{% else %}<p>None.</p>{% endif %}
<p class="dim">Made by mask-the-target. Method: Xu, Garg, Saratchandran, Lucey, Mask the Target, arXiv 2605.29498.
Plots: plotly.js, MIT licence.</p>
<script type="application/json" id="plots">{{ plots | tojson }}</script>
<script>{{ plotly }}</script>
<script>{{ script }}</script>
</body>
</html>
"""
SCRIPT = """
const plots = JSON.parse(document.getElementById("plots").textContent);
const size = () => window.innerWidth < 640 ? "narrow" : "wide";
let drawn = "";
function draw() {
  drawn = size();
  for (const [name, plot] of Object.entries(plots)) {
    const layout = {...structuredClone(plot.layout), ...structuredClone(plot[drawn])};
    Plotly.react(name, structuredClone(plot.data), layout, {responsive: true, displayModeBar: false});
  }
}
window.addEventListener("resize", () => { if (size() !== drawn) draw(); });
for (const button of document.querySelectorAll("button[data-plot]")) {
  button.addEventListener("click", () => {
    const name = button.dataset.plot, all = button.textContent === "Show all";
    const change = {};
    for (const [axis, settings] of Object.entries(plots[name].layout)) {
      if (!/^[xy]axis/.test(axis)) continue;
      if (all) change[axis + ".autorange"] = true;
      else change[axis + ".range"] = [...settings.range];
    }
    Plotly.relayout(name, change);
    button.textContent = all ? "Show fewer" : "Show all";
  });
}
draw();
"""


def details(recipes: Sequence[Recipe]) -> dict[str, dict[str, str]]:
    """Settings that all runs share, each method's own, how long it took and with which versions."""
    results = [result for recipe in recipes for result in recipe.results]

    def listed(values: Iterable[Any]) -> str:
        return "; ".join(
            ", ".join(map(as_text, value)) if isinstance(value, list) else as_text(value) for value in unique(values)
        )

    options = unique(key for result in results for key in result["options"])
    common = {
        key: results[0]["options"].get(key)
        for key in options
        if len(unique(option(result, key) for result in results)) == 1
    }
    settings = {
        "base model": listed(result["model"] for result in results),
        "seeds": ", ".join(map(str, sorted(unique(result["seed"] for result in results)))),
        "probes": listed(result["probes"] for result in results),
        "sizes of the probes": listed(result["sizes"] for result in results),
        "checkpoints": listed(result.get("checkpoints", []) for result in results) or NONE,
        "adapter scales": listed(result.get("scales", []) for result in results) or NONE,
        **{key: as_text(value) for key, value in common.items()},
    }
    methods = {}
    for name in unique(result["method"] for result in results):
        own = [result for result in results if result["method"] == name]
        parts = [
            f"{key}: {listed(values)}"
            for key in options
            if key not in common
            for values in [[v for v in (option(result, key) for result in own) if v is not None]]
            if values
        ]
        methods[name] = ", ".join(parts) or "only what all runs share"
    versions: dict[str, list[str]] = {}
    for result in results:
        for package, version in result.get("versions", {}).items():
            versions.setdefault(package, []).append(version)
    made: dict[str, str] = {}
    for phase in ("training", "measuring"):
        seconds = [result["seconds"][phase] for result in results if phase in result.get("seconds", {})]
        if seconds:
            made[f"{phase}, hours over all trials"] = f"{sum(seconds) / 3600:.2f}"
    precisions = unique(result["measured_in"] for result in results if "measured_in" in result)
    if precisions:
        made["measured in"] = "; ".join(precisions)
    devices = unique(result["device"] for result in results if "device" in result)
    if devices:
        made["device"] = "; ".join(map(str, devices))
    return {
        "All runs": settings,
        "Methods": methods,
        "How it was made": made,
        "Versions": {package: "; ".join(unique(found)) for package, found in versions.items()},
    }


def _hash(script: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"


def to_html(title: str, recipes: Sequence[Recipe], styles: Mapping[str, Style], png: str = "") -> str:
    """The page. `png` is the name of the picture beside it, if there is one."""
    from markupsafe import Markup
    from plotly.offline import get_plotlyjs

    results = [result for recipe in recipes for result in recipe.results]
    failed = [result for result in results if result["status"] == "failed"]
    shown, parts = {}, []
    for place, recipe in enumerate(recipes):
        drawn = drawn_fronts(recipe, styles)
        box, methods = recipe.box, recipe.figures
        part: dict[str, Any] = {
            "name": recipe.name,
            "sentences": sentences(recipe),
            "points": any(figures["front"] for figures in methods.values()),
            "box": box is not None and not box.is_empty(),
            "has_plain": box is not None,
            "figures": figures_table(recipe),
            "on_front": front_table(recipe),
            "scores": scores_table(recipe),
            "at_end": any(
                probe in ("facts", "instructions") for r in recipe.results for probe in r.get("probes_at_end", [])
            ),
            "paper": paper_table(recipe),
            "probes": probes_table(recipe),
            "samples": samples(recipe),
        }
        if drawn is not None:
            part["fronts"] = f"fronts{place}"
            shown[part["fronts"]] = plots.plot_fronts(drawn)
            part["curves"] = f"curves{place}"
            shown[part["curves"]] = plots.plot_curves(curves(recipe), drawn)
        parts.append(part)
    far = {
        recipe.name: Dot(box.base_loss, box.worst_rise, [recipe.name])
        for recipe in recipes
        for box in [recipe.box]
        if box is not None and math.isfinite(box.base_loss) and math.isfinite(box.worst_rise)
    }
    if len(far) > 1:
        shown["distance"] = plots.plot_distance(far)
    seeds = len(unique(result["seed"] for result in results))
    # A browser reads any end of line as \n, and takes the hash of that.
    plotly = get_plotlyjs().replace("\r\n", "\n").replace("\r", "\n")
    return render(
        PAGE,
        title=title,
        lead=(
            f"{_count(len(results), 'trial')} on {_count(len(recipes), 'recipe')}: "
            f"{_count(len(styles), 'method')}, {_count(seeds, 'seed')}, {len(failed)} failed."
        ),
        recipes=parts,
        distance=distance_table(recipes),
        distance_plot="distance" in shown,
        details=details(recipes),
        failed=[
            [
                result["key"],
                ", ".join(f"{k} {as_text(v)}" for k, v in known_setting(result)) or NONE,
                result.get("error", NONE),
            ]
            for result in failed
        ],
        png=png,
        plots=shown,
        plotly=Markup(plotly),
        script=Markup(SCRIPT),
        hashes=Markup(" ".join(map(_hash, (plotly, SCRIPT)))),
    )


def _count(number: int, word: str) -> str:
    return f"{number} {word}" + ("" if number == 1 else "s")


def write_report(study: Path, page: Path | None = None) -> list[Path]:
    """Write a study's page, and beside it the picture of the fronts (.png), every point (.csv) and the figures with
    their intervals (.figures.csv); what was written.

    `study` is the folder of a study; `page` is the page's place, default report.html in that folder. There is no
    picture where no trial has a point. Raises FileNotFoundError or ValueError with a sentence, before anything is
    written: see `read_results`.
    """
    page = study / "report.html" if page is None else page
    if page.suffix.lower() not in (".html", ".htm"):
        raise ValueError(f"--output {page}: give the page's name with .html; picture and CSV are written beside it.")
    results = read_results(study)
    names = unique(result["recipe"] for result in results)
    recipes = [Recipe(name, [result for result in results if result["recipe"] == name]) for name in names]
    # The methods that are looked for first get the styles that differ most.
    chosen = [name for recipe in recipes for name in (PLAIN, recipe.tmkl, recipe.full_kl)]
    names = unique(result["method"] for result in results)
    methods = unique([*(name for name in chosen if name in names), *names])
    styles = {name: Style.of(place) for place, name in enumerate(methods)}
    pictures = {recipe.name: drawn for recipe in recipes if (drawn := drawn_fronts(recipe, styles)) is not None}
    picture, table = page.with_suffix(".png"), page.with_suffix(".csv")
    title = f"{study.resolve().name}: what was learned, what was kept"
    contents = {page: to_html(title, recipes, styles, picture.name if pictures else "").encode()}
    contents[table] = to_csv(recipes).encode()
    contents[page.with_suffix(".figures.csv")] = figures_csv(recipes).encode()
    if pictures:
        contents[picture] = plots.png_of_fronts(pictures)
    else:
        picture.unlink(missing_ok=True)  # of an earlier report
    for path, content in contents.items():
        write_whole(path, content)
    return list(contents)


def main(argv: Sequence[str]) -> int:
    """The command `mtt report`."""
    parser = argparse.ArgumentParser(
        prog="mtt report",
        description="Write a study's page: its fronts, figures with intervals, learning curves and sample answers in "
        "one HTML file that opens offline, with the fronts as PNG, every point and the figures as CSV beside it.",
        allow_abbrev=False,
    )
    parser.add_argument("study", type=Path, help="the study's folder, where mtt sweep wrote: runs/NAME")
    parser.add_argument("--output", type=Path, help="the page's place; default: STUDY/report.html")
    options = parser.parse_args(list(argv))
    try:
        import jinja2  # noqa: F401
        import matplotlib.figure  # noqa: F401
        import moocore  # noqa: F401
        import plotly  # noqa: F401
    except ImportError as error:
        raise ModuleNotFoundError(
            f"mtt report needs {error.name}. Install it with: pip install 'mask-the-target[front]'"
        ) from error
    written = write_report(options.study, options.output)
    print("Written: " + ", ".join(map(str, written)) + ".")
    return 0
