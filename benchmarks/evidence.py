"""The tables of docs/evidence.md and the README, from the figures that `mtt report` wrote beside a study's page.

    python -m benchmarks.evidence                       # of results/smollm2
    python -m benchmarks.evidence results/smollm2-documents
"""

from __future__ import annotations

import csv
import statistics
import sys
from pathlib import Path

from benchmarks.measure import ROOT

METHODS = {
    "ce": "plain CE, with early stop and scaling",
    "full_kl": "full KL, weight 1",
    "tmkl": "TMKL, weight 1",
    "context": "prompt's KL, weight 1",
    "anchors": "the base's own sequences, weights 1 and 3",
    "both": "TMKL 0.3 and prompt's KL 1",
}
MEASURES = {"text": "English text", "facts.greedy": "facts asked in chat", "instructions.followed": "instructions"}
Row = dict[str, str]


def read(file: Path) -> list[Row]:
    with file.open(encoding="utf-8", newline="") as lines:
        return list(csv.DictReader(lines))


def table(header: list[str], rows: list[list[str]]) -> str:
    """A table of Markdown."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def cell(row: Row | None, name: str, form: str) -> str:
    """Mean and interval; the mean alone of one seed."""
    if row is None or not row.get(name):
        return "–"
    if not row[f"{name}, low"]:
        return form.format(float(row[name]))
    mean, low, high = (form.format(float(row[key])) for key in (name, f"{name}, low", f"{name}, high"))
    return f"{mean} [{low}, {high}]"


def tables(study: Path) -> dict[str, str]:
    """Each by its name: hypervolume, that less plain CE's and less full KL's, what is learned within 1% and 5%, and the
    runs at their end."""
    figures, points = read(study / "report.figures.csv"), read(study / "report.csv")
    found = {(row["recipe"], row["kept"], row["method"]): row for row in figures}
    sets = list(dict.fromkeys(row["recipe"] for row in figures))
    methods = [name for name in METHODS if any((one, "text", name) in found for one in sets)]
    seeds = {one: found[one, "text", "ce"]["seeds"] for one in sets}
    header = ["", *(f"{one}, {n} seed{'' if n == '1' else 's'}" for one, n in seeds.items())]

    def by_measure(name: str, form: str, leave_out: str = "") -> str:
        return table(
            header,
            [
                [f"{words}: {METHODS[method]}", *(cell(found.get((one, kept, method)), name, form) for one in sets)]
                for kept, words in MEASURES.items()
                for method in methods
                if method != leave_out
            ],
        )

    within = [
        [
            f"{METHODS[method]}, {tolerance}",
            *(cell(found.get((one, "text", method)), f"learned losing {tolerance}", "{:.0%}") for one in sets),
        ]
        for tolerance in ("1%", "5%")
        for method in methods
    ]
    return {
        "hypervolume": by_measure("hypervolume", "{:.3f}"),
        "less plain CE's": by_measure("hypervolume less ce's", "{:+.3f}", "ce"),
        "less full KL's": by_measure("hypervolume less full_kl's", "{:+.3f}", "full_kl"),
        "learned within": table(header, within),
        "ends": table(header, ends(points, methods, sets)),
    }


def ends(points: list[Row], methods: list[str], sets: list[str]) -> list[list[str]]:
    """Target loss, rise of the text loss, facts answered and instructions followed, means over seeds, of each setting
    that all seeds of its method have."""
    rows = []
    for method in methods:
        own = [row for row in points if row["method"] == method and (row["checkpoint"], row["scale"]) == ("1.0", "1.0")]
        for setting in dict.fromkeys(row["setting"] for row in own):
            cells = []
            for one in sets:
                here = [row for row in own if row["recipe"] == one]
                chosen = [row for row in here if row["setting"] == setting]
                if len(chosen) < len({row["seed"] for row in here}) or not chosen:
                    cells.append("")
                    continue
                loss, rise, facts, followed = (
                    statistics.fmean(float(row[name]) for row in chosen)
                    for name in ("learned", "rise", "facts.greedy", "instructions.followed")
                )
                cells.append(f"{loss:.3f}, {rise:+.3f}, {facts:.0%}, {followed:.0%}")
            if any(cells):
                rows.append([f"{method}: {setting}", *cells])
    return rows


def main(argv: list[str]) -> None:
    for name, text in tables(Path(argv[0]) if argv else ROOT / "results" / "smollm2").items():
        print(f"{name}\n\n{text}\n")


if __name__ == "__main__":
    main(sys.argv[1:])
