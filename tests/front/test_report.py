"""Tables, the chart and the page from one dictionary of results."""

from __future__ import annotations

import copy
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("matplotlib")
pytest.importorskip("jinja2")

from mask_the_target.front import report

HOSTILE = "<script>alert(1)</script>\"'&|"

COMPARISON: dict[str, Any] = {
    "title": "Demo",
    "command": "mtt demo",
    "settings": {"seed": 7, "steps": 12},
    "versions": {"torch": "9.9.9"},
    "machine": {"cpu": "A CPU", "cores": 2, "threads": 2},
    "seconds": {"train ce": 61.4},
    "arms": [
        {
            "name": "base",
            "probes": {
                "target": {"loss": 7.621, "exact_match": 0.0, "token_error_rate": 1.5, "chrf": 3.21, "n": 10},
                "text:python_docs": {"loss": 3.0, "tokens": 100},
                "text:bible": {"loss": 2.5, "tokens": 100},
                "facts": {"greedy": 0.52, "logprob": 0.71, "n": 500},
            },
        },
        {
            "name": "CE",
            "probes": {
                "target": {"loss": 0.913, "exact_match": 0.375, "token_error_rate": 0.25, "chrf": 61.54, "n": 10},
                "text:python_docs": {"loss": 3.5, "stderr": 0.0123, "tokens": 100},
                "text:bible": {"loss": 2.75, "stderr": 0.02, "tokens": 100},
                "facts": {"greedy": 0.21, "logprob": 0.68, "n": 500},
                "instructions": {"followed": 0.123, "n": 72},
                "drift": {"masked_kl": 4.321, "full_kl": 9.876, "tokens": 50},
            },
        },
        {
            "name": "CE + TMKL",
            "probes": {
                "target": {"loss": 0.95, "exact_match": 0.36, "token_error_rate": 0.26, "chrf": 60.0, "n": 10},
                "text:python_docs": {"loss": 3.05, "stderr": 0.004, "tokens": 100},
                "text:bible": {"loss": 2.51, "stderr": 0.003, "tokens": 100},
                "facts": {"greedy": 0.5, "logprob": 0.7, "n": 500},
                "drift": {"masked_kl": 0.321, "full_kl": 8.765, "tokens": 50},
            },
            "prevented": {"text:python_docs": {"value": 0.9, "stderr": 0.015}},
        },
    ],
}


def test_table_has_every_number_in_its_row() -> None:
    lines = report.table(COMPARISON).splitlines()
    assert len(lines) == 2 + 3
    assert len({line.count("|") for line in lines}) == 1
    heading, _, base, ce, tmkl = ([cell.strip() for cell in line.strip("|").split("|")] for line in lines)
    for row, column, text in (
        (base, "target loss", "7.621"),
        (base, "Python docs loss", "3.000"),
        (base, "KL, masked", ""),
        (ce, "exact match", "37.5%"),
        (ce, "Python docs loss", "3.500"),
        (ce, "Python docs: rise", "+0.500 ± 0.012"),
        (base, "Python docs: rise", ""),
        (ce, "Python docs: prevented", ""),
        (ce, "facts, greedy", "21.0%"),
        (ce, "instructions followed", "12.3%"),
        (tmkl, "Python docs: prevented", "90.0% ± 1.5%"),
        (tmkl, "KL, masked", "0.321"),
        (tmkl, "KL, full", "8.765"),
    ):
        assert row[heading.index(column)] == text, (column, row)
    assert "chrF" not in heading  # the page and the terminal have room for it


def test_what_was_not_measured_is_left_out(tmp_path: Path) -> None:
    only_facts = {"arms": [{"name": "base", "probes": {"facts": {"greedy": 0.5, "logprob": 0.25}}}]}
    columns, rows = report.columns_and_rows(only_facts)
    assert [column.heading for column in columns] == ["", "facts, greedy", "facts, log-prob"]
    assert rows == [["base", "50.0%", "25.0%"]]
    assert report.chart(only_facts) is None
    assert not report.write_png(only_facts, tmp_path / "front.png")
    report.write_html(only_facts, tmp_path / "report.html")
    assert "<svg" not in (tmp_path / "report.html").read_text()


class Page(HTMLParser):
    """Tags, attributes and text of a page as a browser would see them."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_data(self, data: str) -> None:
        self.text += data


def test_page_is_self_contained_and_holds_the_numbers(tmp_path: Path) -> None:
    report.write_html(COMPARISON, tmp_path / "report.html")
    source = (tmp_path / "report.html").read_text(encoding="utf-8")
    page = Page(source)
    assert "svg" in page.tags
    assert not {"script", "link", "img", "iframe", "object", "embed", "image"} & set(page.tags)
    for name, value in page.attributes:
        if name.startswith("xmlns"):
            continue  # a namespace is a name, nothing is loaded
        assert not re.search(r"https?:|//", value or ""), (name, value)
        assert name not in ("src", "href", "xlink:href") or (value or "").startswith("#"), (name, value)
    assert not re.search(r"url\((?!#)|@import", source)
    for text in (
        "7.621",
        "chrF",
        "61.5",
        "+0.500 ± 0.012",
        "90.0% ± 1.5%",
        "A CPU",
        "9.9.9",
        "mtt demo",
        "One seed (7)",
        "61",
    ):
        assert text in page.text
    for column in report.columns_and_rows(COMPARISON)[0][1:]:
        assert column.meaning in page.text


def test_each_cell_stands_under_its_arm(tmp_path: Path) -> None:
    report.write_html(COMPARISON, tmp_path / "report.html")
    source = (tmp_path / "report.html").read_text(encoding="utf-8")
    first = source[source.index("target loss") :]
    cells = re.findall(r"<td>(.*?)</td>", first[: first.index("</tr>")])
    assert cells == ["7.621", "0.913", "0.950"]


def test_page_escapes_hostile_text(tmp_path: Path) -> None:
    hostile = copy.deepcopy(COMPARISON)
    hostile["title"] = hostile["command"] = HOSTILE
    hostile["settings"][HOSTILE] = HOSTILE
    hostile["machine"]["cpu"] = HOSTILE
    hostile["versions"][HOSTILE] = HOSTILE
    hostile["arms"][2]["name"] = HOSTILE
    report.write_html(hostile, tmp_path / "report.html")
    page = Page((tmp_path / "report.html").read_text(encoding="utf-8"))
    assert "script" not in page.tags
    assert page.text.count(HOSTILE) >= 8  # shown as text, in each place
    assert "\\|" in report.table(hostile)


def test_chart_draws_each_arm_at_its_numbers(tmp_path: Path) -> None:
    figure = report.chart(COMPARISON)
    assert len(figure.axes) == 2
    for axis, rises in zip(figure.axes, ([0.0, 0.5, 0.05], [0.0, 0.25, 0.01]), strict=True):
        points = [container.lines[0] for container in axis.containers]
        assert [line.get_xdata()[0] for line in points] == pytest.approx([7.621, 0.913, 0.95])
        assert [line.get_ydata()[0] for line in points] == pytest.approx(rises)
        assert [text.get_text() for text in axis.texts] == ["base", "CE", "CE + TMKL"]
        assert "better" in axis.get_xlabel()
    assert "better" in figure.axes[0].get_ylabel()
    assert report.write_png(COMPARISON, tmp_path / "front.png")
    assert (tmp_path / "front.png").read_bytes().startswith(b"\x89PNG")
    assert [path.name for path in tmp_path.iterdir()] == ["front.png"]


def test_terminal_table(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    report.print_table(COMPARISON)
    out = capsys.readouterr().out
    for text in ("target loss ↓", "exact match ↑", "0.913", "90.0% ± 1.5%", "standard error"):
        assert text in out
