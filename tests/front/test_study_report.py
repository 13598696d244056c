"""`mtt report`: the numbers on the page and in the CSV against the files, poor studies, and the page in a browser."""

from __future__ import annotations

import copy
import csv
import itertools
import json
import math
import random
import re
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("matplotlib")
pytest.importorskip("jinja2")
pytest.importorskip("plotly")
pytest.importorskip("moocore")

import browser
import studies
from test_report import Page

from mask_the_target.cli import main
from mask_the_target.front import plots, study_report
from mask_the_target.front.fronts import by_score, compare
from mask_the_target.front.plots import Dot, Fronts, Style
from mask_the_target.front.results import Recipe, read_results
from mask_the_target.front.study_report import write_report

HOSTILE = "</script><script>window.hacked=1</script><img src=x onerror=window.hacked=2>"
LINK = '<a href="https://example.org">here</a>'


class Tables(Page):
    """Also the tables of a page, by the headings above them (h2, h3): rows of cells, the first the columns'."""

    def __init__(self, text: str) -> None:
        self.tables: dict[tuple[str, str], list[list[list[str]]]] = {}
        self.scripts: list[str] = []
        self._headings = {"h2": "", "h3": ""}
        self._open = ""
        super().__init__(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        super().handle_starttag(tag, attrs)
        if tag in ("h2", "h3"):
            self._headings |= {tag: ""} if tag == "h3" else {"h2": "", "h3": ""}
        if tag in ("h2", "h3", "td", "th", "script"):
            self._open = tag
        if tag == "script":
            self.scripts.append("")
        here = self.tables.setdefault((self._headings["h2"], self._headings["h3"]), [])
        if tag == "table":
            here.append([])
        if tag == "tr":
            here[-1].append([])
        if tag in ("td", "th"):
            here[-1][-1].append("")

    def handle_endtag(self, tag: str) -> None:
        if tag == self._open:
            self._open = ""

    def handle_data(self, data: str) -> None:
        super().handle_data(data)
        if self._open in ("h2", "h3"):
            self._headings[self._open] += data
        if self._open == "script":
            self.scripts[-1] += data
        if self._open in ("td", "th"):
            self.tables[self._headings["h2"], self._headings["h3"]][-1][-1][-1] += data

    def rows(self, section: str, heading: str = "", place: int = 0) -> list[list[str]]:
        """The cells of one table, without arrows; special spaces and minus signs as on a keyboard."""
        return [
            [cell.replace("\u00a0", " ").replace("−", "-").strip(" ↓↑") for cell in row]
            for row in self.tables[section, heading][place]
        ]

    def table(self, section: str, heading: str = "", place: int = 0) -> list[dict[str, str]]:
        """Its rows by the columns' headings."""
        headings, *rows = self.rows(section, heading, place)
        return [dict(zip(headings, row, strict=True)) for row in rows]


def report(folder: Path, results: list[dict[str, Any]]) -> Tables:
    write_report(studies.write(folder, results))
    return Tables((folder / "report.html").read_text(encoding="utf-8"))


def words(found: dict[str, Any], form: str = "{:.3f}", factor: float = 1.0) -> str:
    """An interval as the page has it."""
    mean, low, high = (form.format(factor * found[name]) for name in ("mean", "low", "high"))
    return f"{mean} [{low}, {high}]"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    """A study of two recipes, three methods and three seeds, one trial of it failed; its page is written."""
    folder = tmp_path_factory.mktemp("whole")
    results = studies.study(("arpabet", "smiles"))
    lost = studies.trial(
        "arpabet", "tmkl", {"learning_rate": 0.001, "tmkl_weight": 30.0}, 0, options={"method": "tmkl"}
    )
    results.append(studies.failed(lost, "The loss became nan in step 12."))
    write_report(studies.write(folder, results))
    return folder, results


@pytest.fixture(scope="module")
def tables(whole: tuple[Path, list[dict[str, Any]]]) -> Tables:
    return Tables((whole[0] / "report.html").read_text(encoding="utf-8"))


# -------------------------------------------------------------------------------------------------------- numbers


def test_figures_are_those_of_compare(whole: tuple[Path, list[dict[str, Any]]], tables: Tables) -> None:
    for recipe, found in compare(whole[1], against=["ce", "full_kl"]).items():
        rows = {row["method"]: row for row in tables.table(recipe, "The fronts in numbers")}
        assert list(rows) == ["ce", "full_kl", "tmkl"]
        for name, figures in found["methods"].items():
            row = rows[name]
            assert row["hypervolume"] == words(figures["hypervolume"])
            for tolerance in (0.01, 0.05):
                share = figures["learned_within"][tolerance]
                assert row[f"learned, losing ≤ {tolerance:.0%}"] == words(share, "{:.1f}%", 100)
            for other in ("ce", "full_kl"):
                difference = words(figures["against"][other], "{:+.3f}") if other != name else "–"
                assert row[f"less {other}'s"] == difference
            assert (row["trials"], row["failed"]) == (str(figures["trials"]), str(figures["failed"]))
        box = found["box"]
        assert f"The base's target loss is {box.base_loss:.3f} nats per token." in tables.text
        assert f"gets it down to {box.best_loss:.3f}, where the loss on English text is {box.worst_rise:.3f}" in (
            tables.text
        )
    assert "hypervolume: above: full_kl, tmkl." in tables.text
    assert "With 3 seeds a bootstrap interval is too narrow" in tables.text


def test_points_of_the_fronts_are_listed(whole: tuple[Path, list[dict[str, Any]]], tables: Tables) -> None:
    found = compare(whole[1])["smiles"]["methods"]
    count = sum(len(figures["front"]) for figures in found.values())
    assert f"The {count} points of the fronts" in tables.text
    by_key = {result["key"]: result for result in whole[1]}
    assert [list(row.values()) for row in tables.table("smiles", "The fronts in numbers", 1)] == [
        [
            name,
            ", ".join(f"{key} {value:g}" for key, value in by_key[p.key]["setting"].items()),
            str(by_key[p.key]["seed"]),
            f"{p.checkpoint:.0%}",
            f"{p.scale:g}",
            f"{p.loss:.3f}",
            f"{p.rise:+.3f}",
            f"{100 * math.expm1(p.rise):+.1f}%",
        ]
        for name, figures in found.items()
        for p in figures["front"]
    ]


def test_the_papers_summary(whole: tuple[Path, list[dict[str, Any]]], tables: Tables) -> None:
    rows = tables.table("arpabet", "As the paper sums it up: each run at its end")
    ends = {(r["method"], *r["setting"].values(), r["seed"]): r for r in whole[1] if r["recipe"] == "arpabet"}

    def drift(*run: Any) -> float:
        end = ends[run]["points"][2]["probes"]["text:bible"]["loss"]
        return math.exp(end) / math.exp(ends[run]["base"]["text:bible"]["loss"]) - 1

    def kl(*run: Any) -> float:
        return ends[run]["points"][2]["probes"]["drift"]["masked_kl"]

    assert len(rows) == 2 + 6 + 6
    setting = ("learning_rate 0.001", "tmkl_weight 3")
    (row,) = [r for r in rows if (r["method"], r["setting"]) == ("tmkl", ", ".join(setting))]
    own = [("tmkl", 1e-3, 3.0, seed) for seed in range(3)]
    plain = [("ce", 1e-3, seed) for seed in range(3)]  # at the same rate
    assert row["seeds"] == "3"
    assert row["target loss"] == f"{statistics.fmean(ends[run]['learned'] for run in own):.3f}"
    assert row["Bible drift"] == f"{100 * statistics.fmean(drift(*run) for run in own):+.1f}%"
    assert row["masked KL"] == f"{statistics.fmean(kl(*run) for run in own):.3f}"
    for name, measure in (("Bible", drift), ("masked KL", kl)):
        shares = [1 - measure(*a) / measure(*b) for a, b in zip(own, plain, strict=True)]
        mean, low, high = (f"{100 * value:.1f}%" for value in (statistics.fmean(shares), min(shares), max(shares)))
        assert row[f"{name}: prevented"] == f"{mean} [{low}, {high}]"  # of three, 2.5% are in the lowest
    assert all(row["Bible: prevented"] == "–" for row in rows if row["method"] == "ce")


def test_everything_measured_at_the_end_stands_beside_the_base(tmp_path: Path) -> None:
    results = studies.study(seeds=(0, 1))
    for result in results:
        for place, probes in enumerate([result["base"], result["points"][2]["probes"]]):
            probes["lm_eval:hellaswag"] = {"score": 0.5 - 0.125 * place, "metric": "acc,none", "acc,none": 0.5, "n": 80}
            probes["target"]["chrf"] = 10.0 + 50 * place
    rows = report(tmp_path, results).table("arpabet", "All that was measured at the end")
    assert len(rows) == 1 + 2 + 6 + 6
    base, ce = rows[0], rows[1]
    assert (base["method"], base["target loss"], base["exact match"]) == ("base", "4.000", "1.8%")
    assert (base["Python docs loss"], base["Bible loss"], base["facts, greedy"]) == ("3.000", "2.500", "50.0%")
    assert (base["KL, masked"], base["chrF"], base["lm_eval:hellaswag: acc,none"]) == ("–", "10.000", "0.500")
    assert (ce["chrF"], ce["lm_eval:hellaswag: acc,none"], ce["facts, log-prob"]) == ("60.000", "0.375", "70.0%")
    ends = [result["points"][2]["probes"] for result in results if result["method"] == "ce"][:2]
    for heading, probe, metric in (("KL, masked", "drift", "masked_kl"), ("KL, full", "drift", "full_kl")):
        assert ce[heading] == f"{statistics.fmean(end[probe][metric] for end in ends):.3f}"


def test_fronts_of_scores_are_those_of_compare(whole: tuple[Path, list[dict[str, Any]]], tables: Tables) -> None:
    rows = {row["method"]: row for row in tables.table("arpabet", "Fronts of facts and instructions")}
    here = [result for result in whole[1] if result["recipe"] == "arpabet"]
    figures = compare(by_score(here, "facts", "greedy"))["arpabet"]["methods"]
    assert list(rows) == list(figures)
    for method, found in figures.items():
        assert rows[method]["facts: hypervolume"] == words(found["hypervolume"])
        assert rows[method]["facts: learned, losing ≤ 5%"] == words(found["learned_within"][0.05], "{:.1f}%", 100)
        less = "–" if method == "ce" else words(found["against"]["ce"], "{:+.3f}")
        assert rows[method]["facts: less ce's"] == less
    assert not any(heading.startswith("instr.") for heading in rows["ce"])


def test_distance_and_forgetting(whole: tuple[Path, list[dict[str, Any]]], tables: Tables) -> None:
    rows = tables.table("Distance from the base, and forgetting")
    assert [row["recipe"] for row in rows] == ["arpabet", "smiles"]
    for row, found in zip(rows, compare(whole[1]).values(), strict=True):
        assert row["base's target loss"] == f"{found['box'].base_loss:.3f}"
        assert row["text loss there"] == f"{found['box'].worst_rise:+.3f}"
        assert row["perplexity there"] == f"{100 * math.expm1(found['box'].worst_rise):+.1f}%"


def test_figures_csv_is_compare_by_each_measure(whole: tuple[Path, list[dict[str, Any]]]) -> None:
    folder, results = whole
    with (folder / "report.figures.csv").open(encoding="utf-8", newline="") as file:
        every = list(csv.DictReader(file))
    rows = {(row["recipe"], row["kept"], row["method"]): row for row in every if not row["setting"]}
    measures = {"text": results, "facts.greedy": by_score(results, "facts", "greedy")}
    for kept, here in measures.items():
        for recipe, found in compare(here, against=["ce", "full_kl"]).items():
            for method, figures in found["methods"].items():
                row = rows[recipe, kept, method]
                assert int(row["seeds"]) == figures["hypervolume"]["n"]
                pairs = {"hypervolume": figures["hypervolume"], "learned losing 5%": figures["learned_within"][0.05]}
                pairs |= {f"hypervolume less {other}'s": less for other, less in figures["against"].items()}
                for name, each in pairs.items():
                    cells = [row[name], row[f"{name}, low"], row[f"{name}, high"]]
                    assert [float(cell) if cell else None for cell in cells] == [
                        each["mean"],
                        each["low"],
                        each["high"],
                    ]
    assert {kept for _, kept, _ in rows} >= set(measures)
    settings = {
        (row["method"], row["setting"]): row
        for row in every
        if row["setting"] and (row["recipe"], row["kept"]) == ("arpabet", "text")
    }
    assert {("tmkl", "learning_rate 0.0005, tmkl_weight 3"), ("tmkl", "learning_rate 0.001, tmkl_weight 0.3")} < set(
        settings
    )
    assert {method for method, _ in settings} == {"tmkl", "full_kl"}
    here = [result for result in results if result["recipe"] == "arpabet"]
    for (method, name), row in settings.items():
        own = [r for r in here if ", ".join(f"{key} {value:g}" for key, value in r["setting"].items()) == name]
        alone = [r for r in own if r["method"] == method] + [r for r in here if r["method"] == "ce"]
        mean = compare(alone)["arpabet"]["methods"][method]["hypervolume"]["mean"]
        assert (float(row["hypervolume"]) if row["hypervolume"] else None) == mean, name


def test_csv_is_every_point_of_the_files(whole: tuple[Path, list[dict[str, Any]]]) -> None:
    folder, results = whole
    with (folder / "report.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    files = [json.loads(path.read_text()) for path in (folder / "results").iterdir()]
    points = {(r["key"], p["step"], p["scale"]): (r, p) for r in files for p in r["points"]}
    assert len(rows) == len(points) == 5 * (len(results) - 1)
    for row in rows:
        result, point = points.pop((row["key"], int(row["step"]), float(row["scale"])))
        for name in ("recipe", "method", "status", "model"):
            assert row[name] == result[name]
        assert row["setting"] == ", ".join(f"{key} {value:g}" for key, value in result["setting"].items())
        assert int(row["seed"]) == result["seed"]
        assert float(row["checkpoint"]) == point["checkpoint"]
        assert float(row["learned"]) == point["learned"]
        assert float(row["rise"]) == point["rise"]
        assert float(row["base_target_loss"]) == result["base"]["target"]["loss"]
        assert float(row["target.exact_match"]) == point["probes"]["target"]["exact_match"]
        assert float(row["drift.full_kl"]) == point["probes"]["drift"]["full_kl"]
    assert not points
    fronts = {
        (p.key, p.checkpoint, p.scale)
        for found in compare(results).values()
        for figures in found["methods"].values()
        for p in figures["front"]
    }
    on_front = {(r["key"], float(r["checkpoint"]), float(r["scale"])) for r in rows if r["on_front"] == "1"}
    assert on_front == fronts


def test_settings_versions_and_failures(tables: Tables) -> None:
    def pairs(heading: str) -> dict[str, str]:
        return {row[0]: row[1] for row in tables.rows("Settings and versions", heading)}

    assert pairs("All runs")["base model"] == "package:smollm2"
    assert pairs("All runs")["lora_r"] == "16"
    assert pairs("Methods")["tmkl"] == "method: tmkl, learning_rate: 0.0005; 0.001, tmkl_weight: 0.3; 1; 3; 30"
    assert pairs("Versions") == studies.VERSIONS
    assert pairs("How it was made")["training, hours over all trials"] == f"{84 * 90 / 3600:.2f}"
    (lost,) = tables.table("Failed trials")
    assert lost["setting"] == "learning_rate 0.001, tmkl_weight 30"
    assert lost["reason"] == "The loss became nan in step 12."


def test_answers_stand_side_by_side(whole: tuple[Path, list[dict[str, Any]]], tables: Tables) -> None:
    text = "".join(tables.text.split())
    for recipe in ("arpabet", "smiles"):
        own = [result for result in whole[1] if result["recipe"] == recipe and result["status"] == "complete"]
        ce, tmkl = (
            min((r for r in own if r["method"] == method), key=lambda result: result["learned"])
            for method in ("ce", "tmkl")
        )
        shown = (
            f"ce: learning_rate {ce['setting']['learning_rate']:g}, seed {ce['seed']}. "
            f"tmkl: learning_rate {tmkl['setting']['learning_rate']:g}, "
            f"tmkl_weight {tmkl['setting']['tmkl_weight']:g}, seed {tmkl['seed']}. "
            "Of each method the run that learned most at its end. Greedy, the same questions for all. "
            "question Spell the word HELLO. right answer HH AH0 L OW1 base The base doesn't know. "
            f"ce {ce['key']} answers tmkl {tmkl['key']} answers"
        )
        assert "".join(shown.split()) in text
        assert "rightanswerParisbaseParis,saysThebase" in text


# --------------------------------------------------------------------------------------------------- poor studies


def only(results: list[dict[str, Any]], **wanted: Any) -> list[dict[str, Any]]:
    return [result for result in results if all(result[name] == value for name, value in wanted.items())]


def test_one_seed_has_no_interval(tmp_path: Path) -> None:
    found = report(tmp_path, studies.study(seeds=(7,)))
    assert "Only one seed (7) was run, so there are no intervals" in found.text
    for row in found.table("arpabet", "The fronts in numbers"):
        assert re.fullmatch(r"\d\.\d{3}", row["hypervolume"])
    assert "too narrow" not in found.text
    assert "paired difference in hypervolume:" not in found.text


def test_one_seed_of_a_method_and_two_of_another(tmp_path: Path) -> None:
    """Neither caution hides the other, and two seeds are no verdict."""
    results = [r for r in studies.study() if not (r["seed"] == 2 and r["method"] == "full_kl")]
    found = report(tmp_path, [r for r in results if r["seed"] == 0 or r["method"] != "tmkl"])
    assert "Where a method has a single seed, there is no interval" in found.text
    assert "With 2 seeds a bootstrap interval is too narrow" in found.text
    assert "hypervolume: two seeds, too few to say: full_kl." in found.text


def test_prevented_is_of_plain_ce_with_the_same_adapter_and_options(tmp_path: Path) -> None:
    """By hand: the rise of a text's perplexity of each against that of the run that differs in the objective alone."""
    named = {
        "ce": {"method": "ce", "adapter": "lora"},
        "tmkl": {"method": "tmkl", "adapter": "lora"},
        "pissa-ce": {"method": "ce", "adapter": "pissa"},
        "pissa-tmkl": {"method": "tmkl", "adapter": "pissa"},
        "vera-tmkl": {"method": "tmkl", "adapter": "vera"},  # whose plain CE was not run
    }
    keeps = {"ce": 0.0, "tmkl": 0.6, "pissa-ce": -1.0, "pissa-tmkl": 0.2, "vera-tmkl": 0.5}
    results = [
        studies.trial("arpabet", name, {}, 0, keep=keeps[name], options=options) for name, options in named.items()
    ]
    rows = report(tmp_path, results).table("arpabet", "As the paper sums it up: each run at its end")
    found = {row["method"]: row["Bible: prevented"] for row in rows}
    drifts = {
        name: math.expm1(run["points"][2]["probes"]["text:bible"]["loss"] - run["base"]["text:bible"]["loss"])
        for name, run in zip(named, results, strict=True)
    }
    assert found == {
        "ce": "–",
        "tmkl": f"{1 - drifts['tmkl'] / drifts['ce']:.1%}",
        "pissa-ce": "–",
        "pissa-tmkl": f"{1 - drifts['pissa-tmkl'] / drifts['pissa-ce']:.1%}",
        "vera-tmkl": "–",
    }


def test_without_plain_ce_there_are_fronts_and_a_sentence(tmp_path: Path) -> None:
    found = report(tmp_path, [result for result in studies.study() if result["method"] != "ce"])
    assert "There is no measured run of a method named 'ce' (plain cross-entropy)" in found.text
    rows = found.table("arpabet", "The fronts in numbers")
    assert [row["method"] for row in rows] == ["full_kl", "tmkl"]
    assert "hypervolume" not in rows[0]
    assert (rows[0]["trials"], rows[0]["failed"]) == ("18", "0")
    assert "-tmkl-seed" in found.text  # answers are shown
    assert (tmp_path / "report.png").exists()
    # As good as none: it failed.
    (tmp_path / "failed").mkdir()
    results = [studies.failed(r, "nan") if r["method"] == "ce" else r for r in studies.study()]
    assert "There is no measured run of a method named 'ce'" in report(tmp_path / "failed", results).text


def test_full_kl_by_its_options_under_another_name(tmp_path: Path) -> None:
    methods = {"ce": studies.METHODS["ce"], "lwf": studies.METHODS["full_kl"], "masked": studies.METHODS["tmkl"]}
    results = studies.study(methods=methods)
    (row, *_) = report(tmp_path, results).table("arpabet", "The fronts in numbers")
    assert {"less ce's", "less lwf's"} <= set(row)
    recipe = Recipe("arpabet", read_results(tmp_path))
    assert (recipe.full_kl, recipe.tmkl) == ("lwf", "masked")


def test_all_failed_is_a_page_with_the_reasons(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "report.png").write_bytes(b"of an earlier report")
    results = [studies.failed(result, f"Lost {place}.") for place, result in enumerate(studies.study(seeds=(0,)))]
    studies.write(tmp_path, results)
    assert main(["report", str(tmp_path)]) == 0
    assert "report.png" not in capsys.readouterr().out
    assert not (tmp_path / "report.png").exists()
    found = Tables((tmp_path / "report.html").read_text(encoding="utf-8"))
    assert "None of the 14 trials gave a measured point" in found.text
    assert sorted(row["reason"] for row in found.table("Failed trials")) == sorted(f"Lost {n}." for n in range(14))
    assert (tmp_path / "report.csv").read_text().startswith("recipe,method,setting,seed,checkpoint,step,scale,learned")


def test_points_that_are_not_numbers_are_left_out_and_counted(tmp_path: Path) -> None:
    results = studies.study()
    broken = next(result for result in results if result["method"] == "tmkl")
    for point in broken["points"][2:]:
        point["learned"] = math.nan
    broken |= {"status": "failed", "error": "At its end, target loss nan and text loss rise 0.1."}
    found = report(tmp_path, results)
    assert f"3 of {5 * len(results)} points are not finite numbers and are left out" in found.text
    assert "1 of 42 trials failed" in found.text
    assert "NaN" not in found.scripts[0]
    with (tmp_path / "report.csv").open() as file:
        assert sum(row["learned"] == "nan" for row in csv.DictReader(file)) == 3
    (row,) = [
        row
        for row in found.table("arpabet", "As the paper sums it up: each run at its end")
        if (row["method"], row["setting"]) == ("tmkl", "learning_rate 0.0005, tmkl_weight 0.3")
    ]
    assert row["seeds"] == "2"


@pytest.mark.parametrize(
    ("learned", "rise", "sentence"),
    [
        (4.5, 0.2, "Plain CE learned nothing: its target loss never fell below the base's, so there is no area"),
        (2.0, 0.0, "Plain CE lost nothing: where it learned most, the text loss is no higher than the base's"),
    ],
)
def test_an_empty_box_is_said(tmp_path: Path, learned: float, rise: float, sentence: str) -> None:
    results = studies.study()
    for result in only(results, method="ce"):
        for point in result["points"]:
            point |= {"learned": learned, "rise": rise}
    found = report(tmp_path, results)
    assert sentence in found.text
    rows = found.table("arpabet", "The fronts in numbers")
    assert [row["method"] for row in rows] == ["ce", "full_kl", "tmkl"]
    assert all("hypervolume" not in row for row in rows)


def test_one_point_and_points_outside_of_the_box(tmp_path: Path) -> None:
    results = studies.study(seeds=(0,))
    ce = only(results, method="ce")[-1]
    ce["points"] = [ce["points"][2]]
    worse = only(results, method="tmkl")[0]
    for point in worse["points"]:
        point |= {"learned": 5.0, "rise": 9.0}
    found = report(tmp_path, [ce, worse])
    rows = found.table("arpabet", "The fronts in numbers")
    assert [row["hypervolume"] for row in rows] == ["0.000", "0.000"]
    assert rows[1]["less ce's"] == "+0.000"
    (tmp_path / "one").mkdir()
    assert "The one point of the fronts" in report(tmp_path / "one", [ce]).text


def refused(argv: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    assert main(["report", *argv]) == 2
    return capsys.readouterr().err


def test_refusals_before_anything_is_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert f"{tmp_path / 'nowhere'} holds no results/*.json. Give the folder of a study" in refused(
        [str(tmp_path / "nowhere")], capsys
    )
    (tmp_path / "study.yaml").touch()
    assert "study.yaml is a file. Give the folder" in refused([str(tmp_path / "study.yaml")], capsys)
    folder = studies.write(tmp_path / "study", studies.study(seeds=(0,)))
    assert "--output" in (message := refused([str(folder), "--output", str(tmp_path / "page")], capsys))
    assert "give the page's name with .html" in message
    first = sorted((folder / "results").iterdir())[0]
    whole = first.read_text()
    for content, sentence in (
        (whole[:100], f"{first} is not JSON"),
        ("[]", f"{first} is not a trial's result as mtt sweep writes it: it lacks key, recipe"),
        (json.dumps(json.loads(whole) | {"model": "other"}), "they differ in their model: other ("),
        (json.dumps(json.loads(whole) | {"sizes": "full"}), "they differ in their sizes: full ("),
        (json.dumps(json.loads(whole) | {"data": {"test": "b"}}), "they differ in their data: {'test': 'b'} ("),
        (json.dumps(json.loads(whole) | {"texts": {"wikitext": {}}}), "they differ in their texts: {'wikitext': {}} ("),
        (json.dumps({k: v for k, v in json.loads(whole).items() if k != "base"}), "no base's target loss"),
        (whole.replace('"scale"', '"skale"'), f"{first}: a point lacks scale"),
    ):
        first.write_text(content)
        assert sentence in refused([str(folder)], capsys)
    assert [path.name for path in folder.iterdir()] == ["results"]


def test_a_missing_package_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = studies.write(tmp_path, studies.study(seeds=(0,)))
    monkeypatch.setitem(sys.modules, "plotly", None)
    assert "mtt report needs plotly. Install it with: pip install 'mask-the-target[front]'" in refused(
        [str(folder)], capsys
    )
    assert [path.name for path in folder.iterdir()] == ["results"]


def test_output_and_what_is_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = studies.write(tmp_path / "study", studies.study(seeds=(0,)))
    assert main(["report", str(folder), "--output", str(tmp_path / "out" / "page.html")]) == 0
    names = ["page.html", "page.csv", "page.figures.csv", "page.png"]
    assert capsys.readouterr().out == f"Written: {', '.join(str(tmp_path / 'out' / name) for name in names)}.\n"
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted(names)
    assert (tmp_path / "out" / "page.png").read_bytes().startswith(b"\x89PNG")
    assert [path.name for path in folder.iterdir()] == ["results"]
    first = (tmp_path / "out" / "page.html").read_bytes()
    main(["report", str(folder), "--output", str(tmp_path / "out" / "page.html")])
    assert (tmp_path / "out" / "page.html").read_bytes() == first  # the same study is the same page


# ---------------------------------------------------------------------------------------------------------- plots


def test_no_two_methods_look_alike() -> None:
    looks = [Style.of(place) for place in range(210)]
    assert len({(look.color, look.marker, look.dash) for look in looks}) == 210
    assert len({(look.marker, look.dash) for look in looks[:30]}) == 30  # and not by colour alone


def test_labels_overlap_only_where_there_is_no_room() -> None:
    chance = random.Random(0)
    lines = {f"method_{n}": sorted((chance.random(), chance.random()) for _ in range(6)) for n in range(12)}
    found = plots.place_labels(lines, ((0.0, 1.0), (0.0, 1.0)), (760, 400))
    assert list(found) == list(lines)
    boxes = []
    for name, (x, y, dx, dy) in found.items():
        assert (x, y) in lines[name]
        half = 3.6 * len(name) + 6
        left, right, low, top = 760 * x + dx - half, 760 * x + dx + half, 400 * y + dy - 10, 400 * y + dy + 10
        assert left >= 0
        assert right <= 760
        assert low >= 0
        assert top <= 400
        boxes.append((left, right, low, top))
    for a, b in itertools.combinations(boxes, 2):
        assert a[1] <= b[0] or b[1] <= a[0] or a[3] <= b[2] or b[3] <= a[2]


def test_a_run_astray_is_outside_of_the_plot_and_counted() -> None:
    fronts = {"ce": [Dot(1.0, 0.4), Dot(2.0, 0.1)]}
    styles = {"ce": Style.of(0), "ewc": Style.of(1)}
    drawn = Fronts(Dot(4.0, 0.0), fronts, {"ewc": [Dot(1.5, 0.45), Dot(1.0, 7.0)]}, styles)
    assert drawn.outside == 1
    assert 0.45 < drawn.area[1][1] < 0.7
    assert drawn.area[0][0] < 1.0 < 4.0 < drawn.area[0][1]


def test_plotly_knows_all_that_the_plots_ask_for(tmp_path: Path) -> None:
    import plotly.graph_objects as go

    results = studies.study(("arpabet", "smiles"), seeds=(0,))
    found = json.loads(report(tmp_path, results).scripts[0])
    assert set(found) == {"fronts0", "curves0", "fronts1", "curves1", "distance"}
    for plot in found.values():
        for size in ("wide", "narrow"):
            go.Figure({"data": plot["data"], "layout": plot["layout"] | plot[size]})  # raises for an unknown name
    traces = {trace["name"]: trace for trace in found["fronts0"]["data"] if trace["mode"] == "lines+markers"}
    for name, figures in compare(results)["arpabet"]["methods"].items():
        assert traces[name]["x"] == [p.loss for p in figures["front"]]
        assert traces[name]["y"] == [p.rise for p in figures["front"]]
        assert traces[name]["line"]["shape"] == "hv"  # a front dominates what lies above and to the right of a point
    labels = [note["text"] for note in found["fronts0"]["wide"]["annotations"]]
    assert labels == ["1%", "5%", "ce", "full_kl", "tmkl", "base"]


def test_learning_curves_are_means_over_seeds(tmp_path: Path) -> None:
    results = studies.study()
    found = json.loads(report(tmp_path, results).scripts[0])["curves0"]
    curves = [trace for trace in found["data"] if trace["name"] == "ce"]
    assert [trace["yaxis"] for trace in curves] == ["y", "y2", "y", "y2"]
    own = [result for result in only(results, method="ce") if result["setting"]["learning_rate"] == 1e-3]
    for trace, name, start in ((curves[2], "learned", 4.0), (curves[3], "rise", 0.0)):
        assert trace["x"] == [0.0, 0.25, 0.5, 1.0]
        means = [statistics.fmean(result["points"][place][name] for result in own) for place in range(3)]
        assert trace["y"] == pytest.approx([start, *means])


def test_the_picture_draws_each_front(whole: tuple[Path, list[dict[str, Any]]], monkeypatch: Any) -> None:
    from matplotlib.figure import Figure

    drawn: list[Figure] = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: (drawn.append(self), save(self, *a, **k))[1])
    recipe = Recipe("arpabet", [r for r in read_results(whole[0]) if r["recipe"] == "arpabet"])
    styles = {name: Style.of(place) for place, name in enumerate(recipe.methods)}
    fronts = study_report.drawn_fronts(recipe, styles)
    assert fronts is not None
    assert plots.png_of_fronts({"a $recipe$": fronts}).startswith(b"\x89PNG")
    (axis,) = drawn[0].axes
    lines = [line for line in axis.lines if len(line.get_xdata()) > 2]
    for line, figures in zip(lines, recipe.figures.values(), strict=True):
        assert list(line.get_xdata()) == [p.loss for p in figures["front"]]
        assert list(line.get_ydata()) == [p.rise for p in figures["front"]]
    assert {"ce", "full_kl", "tmkl", "base"} <= {text.get_text() for text in axis.texts}


# ------------------------------------------------------------------------------------------------- hostile content


def hostile() -> list[dict[str, Any]]:
    """A study in which every text that comes from data is an attack."""
    results = studies.study(("arpabet",), seeds=(0, 1))
    for result in results:
        end = result["points"][2]["probes"]
        for state in (result["base"], end):
            for answer in state["target"]["answers"]:
                answer |= {"question": f"{HOSTILE} question", "right": f"{HOSTILE} right"}
        for answer in end["target"]["answers"]:
            answer["answer"] = f"{HOSTILE} answer"
        end[f"lm_eval:{HOSTILE}"] = {"score": 0.5, "metric": HOSTILE, "better": HOSTILE}
        result["recipe"] = f"{HOSTILE} recipe"
        result["versions"] = {HOSTILE: HOSTILE}
        result["device"] = result["model"] = HOSTILE
        result["setting"] = result["setting"] | {f"{LINK}option": f"{LINK}value"}
        if result["method"] == "full_kl":
            result["method"] = f"{LINK}<b>bold</b> method"
    lost = studies.failed(copy.deepcopy(results[0]), f"{HOSTILE} reason")
    return [*results, lost | {"key": "lost", "method": f"=cmd {HOSTILE} " + "long" * 60}]


def test_hostile_text_is_text(tmp_path: Path, tables: Tables) -> None:
    found = report(tmp_path, hostile())
    assert set(found.tags) <= set(tables.tags)  # no tag that an ordinary page lacks
    assert found.tags.count("script") == tables.tags.count("script") == 3
    for name, _ in found.attributes:
        assert not name.startswith("on")
        assert name not in ("src", "href")
    for part in ("question", "right", "answer", "recipe", "reason"):
        assert f"{HOSTILE} {part}" in found.text
    assert f"{LINK}option {LINK}value" in found.text.replace("\u00a0", " ")
    assert "<" not in found.scripts[0]  # the plots' JSON ends nowhere before its end
    notes = json.loads(found.scripts[0])["fronts0"]["wide"]["annotations"]
    assert not [note for note in notes if "<" in note["text"]]  # plotly would make a link of it
    with (tmp_path / "report.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert rows[0]["recipe"] == f"{HOSTILE} recipe"
    assert not [cell for row in rows for cell in row.values() if cell.startswith("=")]


def test_a_formula_is_text_in_a_spreadsheet(tmp_path: Path) -> None:
    results = studies.study(seeds=(0,))
    for result in only(results, method="tmkl"):
        result["method"] = '=HYPERLINK("https://example.org")'
        for point in result["points"]:
            point["probes"]["=1+1"] = {"loss": 1.0}  # a name in the header
    report(tmp_path, results)
    with (tmp_path / "report.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert {row["method"] for row in rows} == {"ce", "full_kl", '\'=HYPERLINK("https://example.org")'}
    assert "'=1+1.loss" in rows[0]


# -------------------------------------------------------------------------------------------------- in a browser


@pytest.fixture(scope="module")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[browser.Browser]:
    program = browser.find()
    if program is None:
        pytest.skip(f"no browser found: none of {', '.join(browser.PROGRAMS)} is installed")
    found = browser.Browser(program, tmp_path_factory.mktemp("profile"))
    try:
        yield found
    finally:
        found.close()


WIDTHS = [(375, True), (1200, False)]


@pytest.mark.parametrize(("width", "mobile"), WIDTHS)
def test_the_page_opens_offline(
    whole: tuple[Path, list[dict[str, Any]]], chromium: browser.Browser, width: int, mobile: bool
) -> None:
    path = whole[0] / "report.html"
    chromium.open(path, width, mobile=mobile)
    assert chromium.troubles() == []
    assert chromium.requests() == [path.resolve().as_uri()]
    assert chromium.run("document.documentElement.scrollWidth") <= width
    plots = chromium.run(
        "[...document.querySelectorAll('.plot')].map(p => [p.id, p.querySelectorAll('svg .point').length,"
        " p.getBoundingClientRect().right, p.querySelector('.main-svg').getBoundingClientRect().width, p.clientWidth])"
    )
    assert [plot[0] for plot in plots] == ["fronts0", "curves0", "fronts1", "curves1", "distance"]
    for name, points, right, drawn, room in plots:
        assert points >= 2, name
        assert right <= width
        assert drawn == pytest.approx(room, abs=1)
    # Every point of the study is drawn, the base with it.
    assert plots[0][1] == 5 * 42 + 1
    # Tables wider than the page scroll by themselves.
    assert chromium.run(
        "[...document.querySelectorAll('table')].every(t => t.closest('.scroll') || t.clientWidth <= innerWidth)"
    )


def test_labels_are_in_the_plot(whole: tuple[Path, list[dict[str, Any]]], chromium: browser.Browser) -> None:
    for width, mobile in WIDTHS:
        chromium.open(whole[0] / "report.html", width, mobile=mobile)
        boxes = chromium.run(
            "(() => { const outer = document.getElementById('fronts0').getBoundingClientRect();"
            " return [...document.querySelectorAll('#fronts0 .annotation')].map(a => {"
            " const b = a.querySelector('.bg').getBoundingClientRect();"
            " return [a.textContent, b.left - outer.left, outer.right - b.right, b.top - outer.top, b.left, b.right,"
            " b.top, b.bottom]; }); })()"
        )
        named = [box for box in boxes if box[0] not in ("1%", "5%")]
        assert [box[0] for box in named] == ["ce", "full_kl", "tmkl", "base"]
        for box in named:
            assert min(box[1:4]) >= 0
        for a, b in itertools.combinations(named, 2):
            assert a[5] <= b[4] or b[5] <= a[4] or a[7] <= b[6] or b[7] <= a[6], (a[0], b[0], width)


def test_a_tooltip_says_what_a_point_is(whole: tuple[Path, list[dict[str, Any]]], chromium: browser.Browser) -> None:
    chromium.open(whole[0] / "report.html", 1200)
    place, key = chromium.run(
        "(() => { const data = document.getElementById('fronts0').data;"
        " return [data.findIndex(t => t.name === 'tmkl' && t.mode === 'lines+markers'), 0]; })()"
    )
    text = chromium.run(
        f"(() => {{ Plotly.Fx.hover('fronts0', [{{curveNumber: {place}, pointNumber: {key}}}]);"
        " return document.querySelector('#fronts0 .hoverlayer').textContent; })()"
    )
    best = compare(whole[1])["arpabet"]["methods"]["tmkl"]["front"][0]
    result = next(result for result in whole[1] if result["key"] == best.key)
    for part in (
        f"learning_rate {result['setting']['learning_rate']:g}",
        f"tmkl_weight {result['setting']['tmkl_weight']:g}",
        f"seed {result['seed']}, step 160 (100% of the run)",
        f"adapter × {best.scale:g}",
        f"target loss {best.loss:.3f} nats per token",
        f"text loss {best.rise:+.3f} nats per token",
    ):
        assert part in text


def test_show_all_shows_the_run_that_went_astray(tmp_path: Path, chromium: browser.Browser) -> None:
    results = studies.study(seeds=(0,))
    astray = only(results, method="tmkl")[0]
    for point in astray["points"]:
        point["rise"] = 7.0
    report(tmp_path, results)
    chromium.open(tmp_path / "report.html", 1200)
    top = "document.getElementById('fronts0').layout.yaxis.range[1]"
    assert chromium.run(top) < 1
    assert "5 points lie outside" in chromium.run("document.body.textContent")
    chromium.run("document.querySelector('button[data-plot=fronts0]').click()")
    assert chromium.run(top) > 7
    chromium.run("document.querySelector('button[data-plot=fronts0]').click()")
    assert chromium.run(top) < 1


@pytest.mark.parametrize(("width", "mobile"), WIDTHS)
def test_hostile_text_does_nothing(tmp_path: Path, chromium: browser.Browser, width: int, mobile: bool) -> None:
    report(tmp_path, hostile())
    chromium.open(tmp_path / "report.html", width, mobile=mobile)
    assert chromium.troubles() == []
    assert chromium.requests() == [(tmp_path / "report.html").resolve().as_uri()]
    chromium.run(
        "document.getElementById('fronts0').data.forEach((t, n) =>"
        " Plotly.Fx.hover('fronts0', [{curveNumber: n, pointNumber: 0}]))"
    )
    assert chromium.run("typeof window.hacked") == "undefined"
    assert chromium.run("document.querySelectorAll('img, a, iframe, object').length") == 0
    assert chromium.run("document.querySelectorAll('script').length") == 3
    assert LINK in chromium.run("document.querySelector('#fronts0 .legend').textContent")
    assert HOSTILE in chromium.run("document.querySelector('.sample').textContent")
    assert chromium.run("document.documentElement.scrollWidth") <= width


def test_even_a_script_that_got_in_would_not_run(
    whole: tuple[Path, list[dict[str, Any]]], chromium: browser.Browser
) -> None:
    chromium.open(whole[0] / "report.html", 1200)
    chromium.run(
        "(() => { const s = document.createElement('script'); s.textContent = 'window.hacked = 1';"
        " document.body.append(s);"
        " document.body.insertAdjacentHTML('beforeend', '<img src=x onerror=window.hacked=2>');"
        " return new Promise(done => setTimeout(done, 200)); })()"
    )
    assert chromium.run("typeof window.hacked") == "undefined"
    assert chromium.run("fetch('https://example.org').then(() => 'reached', () => 'refused')") == "refused"
    assert any("Content Security Policy" in trouble for trouble in chromium.troubles())
