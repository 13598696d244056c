"""The tables of docs/evidence.md and the README, from the figures that `mtt report` wrote beside the page of a study:
`python -m benchmarks.evidence results/smollm2`."""

from __future__ import annotations

import csv
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mask_the_target import TMKL
from mask_the_target.front.fronts import compare
from mask_the_target.front.results import Recipe, Result, read_results
from mask_the_target.front.suggest import Outcome, leave_one_out

RECOMMENDED = ("both", "tmkl_weight 0.1, tmkl_context_weight 3,")
# Method, and what its setting begins with where only one of several is meant: how it is called.
METHODS = {
    ("ce", ""): "plain CE, with early stop and scaling",
    ("full_kl", "tmkl_weight 0.3,"): "full KL, weight 0.3",
    ("full_kl", "tmkl_weight 1,"): "full KL, weight 1",
    ("tmkl", "tmkl_weight 0.3,"): "TMKL, weight 0.3",
    ("tmkl", "tmkl_weight 1,"): "TMKL, weight 1",
    ("ewc", "rival_weight 1e+04,"): "EWC, weight 1e4",
    ("context", "tmkl_context_weight 1,"): "prompt's KL, weight 1",
    ("context", "tmkl_context_weight 3,"): "prompt's KL, weight 3",
    ("both", "tmkl_weight 0.3, tmkl_context_weight 1,"): "TMKL 0.3, prompt's KL 1",
    RECOMMENDED: "TMKL 0.1, prompt's KL 3: `TMKL.recommended()`",
    ("budget", "max_drift 0.01,"): "TMKL 0.1, prompt's drift 0.01",
    ("budget", "max_drift 0.02,"): "TMKL 0.1, prompt's drift 0.02",
    ("anchors", "tmkl_context_weight 1,"): "anchors, weight 1",
    ("anchors_both", "tmkl_context_weight 1,"): "TMKL 0.1, anchors 1",
    ("both", "tmkl_context_weight 1,"): "TMKL 0.3, anchors 1",
    ("both", "tmkl_context_weight 3,"): "TMKL 0.1, prompt's KL 3",  # rank 64
}
MEASURES = {"text": "English text", "facts.greedy": "facts asked in chat", "instructions.followed": "instructions"}
NOTHING = "–"
Row = dict[str, str]


def read(file: Path) -> list[Row]:
    with file.open(encoding="utf-8", newline="") as lines:
        return list(csv.DictReader(lines))


def table(header: list[str], rows: list[list[str]]) -> str:
    """A table of Markdown."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def cell(row: Row | None, name: str, form: str) -> str:
    """Mean and interval; the mean alone of one seed, which has none."""
    if row is None or not row.get(name):
        return NOTHING
    mean, low, high = (row[key] for key in (name, f"{name}, low", f"{name}, high"))
    return with_interval(float(mean), *((float(low), float(high)) if low else (None, None)), form)


def with_interval(mean: float, low: float | None, high: float | None, form: str) -> str:
    return form.format(mean) + ("" if low is None else f" [{form.format(low)}, {form.format(high)}]")


def by_kept(recipe: Recipe, measure: str) -> Recipe:
    """The recipe by one of MEASURES as what is kept."""
    found = recipe.by_score(*measure.split(".")) if "." in measure else recipe
    assert found is not None, f"{recipe.name}: plain CE has no {measure}"
    return found


def tables(study: Path) -> dict[str, str]:
    """Each by its name: hypervolume, that less plain CE's and less full KL's, what is learned within 1% and 5%, each
    setting's hypervolume less plain CE's and the runs at their end; of a study of several weights also TMKL less the
    full KL at the same settings, everything less the recommended weights, seed 0 alone and `mtt suggest` judged by
    them."""
    points = read(study / "report.csv")
    figures = {
        (row["recipe"], row["kept"], row["method"], row["setting"]): row for row in read(study / "report.figures.csv")
    }
    sets = list(dict.fromkeys(recipe for recipe, *_ in figures))

    def find(recipe: str, kept: str, method: str, begins: str) -> Row | None:
        """That setting, or of those that begin so the one with most seeds."""
        if (exact := figures.get((recipe, kept, method, begins))) is not None:  # "": the method as a whole
            return exact
        whose = (recipe, kept, method)
        meant = [row for (*own, setting), row in figures.items() if tuple(own) == whose and setting.startswith(begins)]
        return max(meant, key=lambda row: int(row["seeds"]), default=None)

    def rows(name: str, form: str, kept: str, words: str, leave_out: str = "") -> list[list[str]]:
        found = {
            called: [cell(find(one, kept, *method), name, form) for one in sets]
            for method, called in METHODS.items()
            if method[0] != leave_out
        }
        return [[words.format(called), *cells] for called, cells in found.items() if set(cells) != {NOTHING}]

    def by_measure(name: str, form: str, leave_out: str = "") -> str:
        each = [rows(name, form, kept, f"{words}: {{}}", leave_out) for kept, words in MEASURES.items()]
        return table(["", *sets], [row for part in each for row in part])

    within = [
        row
        for tolerance in ("1%", "5%")
        for row in rows(f"learned losing {tolerance}", "{:.0%}", "text", f"{{}}, {tolerance}")
    ]
    several = {}
    if find(sets[0], "text", *RECOMMENDED):  # not at rank 64, of which the tables above say all
        results = read_results(study)
        recipes = [Recipe(one, [result for result in results if result["recipe"] == one]) for one in sets]
        several = {
            "TMKL less full KL": table(["", *sets], tmkl_less_full_kl(recipes)),
            "less the recommended": table(["", *sets], less_recommended(recipes)),
            "seed 0": table(["", *sets], seed_zero(recipes)),
            "left out": left_out(results),
        }
    return {
        "hypervolume": by_measure("hypervolume", "{:.3f}"),
        "less plain CE's": by_measure("hypervolume less ce's", "{:+.3f}", "ce"),
        "less full KL's": by_measure("hypervolume less full_kl's", "{:+.3f}", "full_kl"),
        "learned within": table(["", *sets], within),
        "each setting": table(["", *sets], each_setting(points, sets, find)),
        "ends": table(["", *sets], ends(points, sets)),
        **several,
    }


def each_setting(
    points: list[Row], sets: list[str], find: Callable[[str, str, str, str], Row | None]
) -> list[list[str]]:
    """The hypervolume of each setting's own front less that of plain CE's with all of its settings, at the same seeds
    (in brackets how many): by text, facts and instructions."""
    rows = []
    for method, setting in sorted({(row["method"], row["setting"]) for row in points if row["method"] != "ce"}):
        cells = []
        for one in sets:
            here = [row for kept in MEASURES if (row := find(one, kept, method, setting)) is not None]
            means = ", ".join(format(float(row["hypervolume less ce's"]), "+.3f") for row in here)
            cells.append(f"{means} ({here[0]['seeds']})" if here else NOTHING)
        rows.append([f"{method}: {setting}", *cells])
    return rows


def tmkl_less_full_kl(recipes: list[Recipe]) -> list[list[str]]:
    """TMKL's hypervolume less the full KL's at the same seeds: of each setting that both have, and of the settings
    that all of these seeds have as one front."""
    found: dict[tuple[str, str], dict[str, str]] = {}
    for here in recipes:
        groups = here.groups()
        settings = [setting for method, setting in groups if method == "tmkl" and ("full_kl", setting) in groups]
        pairs = {setting: [*groups["tmkl", setting], *groups["full_kl", setting]] for setting in settings}
        if settings:
            pairs["settings that all seeds have, as one front"] = [*here.of("tmkl"), *here.of("full_kl")]
        for setting, pair in pairs.items():
            runs = Recipe(here.name, [*here.of("ce"), *pair])
            for measure, words in MEASURES.items():
                more = by_kept(runs, measure).figures["tmkl"]["against"]["full_kl"]
                cells = found.setdefault((words, setting), {})
                cells[here.name] = with_interval(more["mean"], more["low"], more["high"], "{:+.3f}")
    order = list(MEASURES.values())
    names = sorted(found, key=lambda name: (order.index(name[0]), name[1]))
    return [[": ".join(name), *(found[name].get(here.name, NOTHING) for here in recipes)] for name in names]


def less_recommended(recipes: list[Recipe]) -> list[list[str]]:
    """The hypervolume of what METHODS names less that of the recommended weights, at the seeds that both have."""
    recommended = METHODS[RECOMMENDED]
    found: dict[tuple[str, str], dict[str, str]] = {}
    for here in recipes:
        apart = [
            {**run, "method": name}
            for (own, setting), runs in here.groups().items()
            for (method, begins), name in METHODS.items()
            if own == method and setting.startswith(begins)
            for run in runs
        ]
        both = Recipe(here.name, [*here.of("ce"), *apart])
        for measure, words in MEASURES.items():
            compared = compare(by_kept(both, measure).results, "ce", [recommended])[here.name]["methods"]
            for name in {run["method"] for run in apart} - {recommended}:
                less = compared[name]["against"][recommended]
                cells = found.setdefault((words, name), {})
                cells[here.name] = with_interval(less["mean"], less["low"], less["high"], "{:+.3f}")
    order = [(words, name) for words in MEASURES.values() for name in METHODS.values()]
    return [
        [": ".join(key), *(found[key].get(here.name, NOTHING) for here in recipes)] for key in order if key in found
    ]


def seed_zero(recipes: list[Recipe]) -> list[list[str]]:
    """The hypervolume at seed 0 of each setting's own front, and of plain CE's with all of its settings: by text, facts
    and instructions, and the mean of the three. So what only seed 0 has can be compared with the rest."""
    found: dict[str, dict[str, list[float]]] = {}
    for here in recipes:
        groups = {f"{method}: {setting}": own for (method, setting), own in here.groups().items() if method != "ce"}
        named = {METHODS["ce", ""]: here.of("ce"), **groups}
        apart = [{**run, "method": name} for name, own in named.items() for run in own if run["seed"] == 0]
        both = Recipe(here.name, [*here.of("ce"), *apart])
        for measure in MEASURES:
            for name, figures in by_kept(both, measure).figures.items():
                if name != "ce":
                    found.setdefault(name, {}).setdefault(here.name, []).append(figures["hypervolume"]["mean"])
    form = "{:.3f}, {:.3f}, {:.3f}; {:.3f}"
    cells = {
        name: [
            form.format(*own[here.name], statistics.fmean(own[here.name])) if here.name in own else NOTHING
            for here in recipes
        ]
        for name, own in sorted(found.items(), key=lambda item: (item[0] != METHODS["ce", ""], item[0]))
    }
    return [[name, *own] for name, own in cells.items()]


def ends(points: list[Row], sets: list[str]) -> list[list[str]]:
    """Target loss, rise of the text loss, facts answered and instructions followed, means over the seeds (in brackets
    how many) of each setting."""
    own = [row for row in points if (row["checkpoint"], row["scale"]) == ("1.0", "1.0")]
    rows = []
    for method, setting in sorted({(row["method"], row["setting"]) for row in own}):
        cells = []
        for one in sets:
            here = [r for r in own if (r["recipe"], r["method"], r["setting"]) == (one, method, setting)]
            names = ("learned", "rise", "facts.greedy", "instructions.followed")
            means = [statistics.fmean(float(row[name]) for row in here) for name in names] if here else []
            form = "{:.3f}, {:+.3f}, {:.0%}, {:.0%}"
            cells.append(f"{form.format(*means)} ({len(here)})" if here else NOTHING)
        rows.append([f"{method}: {setting}", *cells])
    return rows


def left_out(results: list[Result]) -> str:
    """What `mtt suggest` would have taken in each set, knowing the others: seed 0, halfway as the pilot; candidates as
    it has them on data with prompts."""
    recommended = TMKL.recommended()
    weights = {"tmkl_weight": recommended.weight, "tmkl_context_weight": recommended.context_weight}
    candidates = [
        result
        for result in results
        if result["seed"] == 0
        and (
            result["method"] in ("ce", "tmkl", "context")
            or (result["method"] == "both" and result["setting"] | weights == result["setting"])
        )
    ]
    rows = []
    for tolerance in (0.01, 0.05):
        for name, found in leave_one_out(candidates, early=0.5, tolerance=tolerance).items():
            taken, best = (_called(found[which]) for which in ("suggested", "best"))
            behind, over = f"{found['behind']:+.1%}", f"{found['over']:.3f}"
            best = "the same" if taken == best else best
            rows.append([f"{name}, {tolerance:.0%}", f"{found['growth']:.2f}", taken, behind, over, best])
    return table(["", "growth", "suggested", "learning behind the best", "nats over the tolerance", "best"], rows)


def _called(setting: dict[str, Any]) -> str:
    return Outcome(setting["method"], setting["setting"], learned=setting["share"], rise=setting["rise"]).name


def main(argv: list[str]) -> None:
    for name, text in tables(Path(argv[0])).items():
        print(f"{name}\n\n{text}\n")


if __name__ == "__main__":
    main(sys.argv[1:])
