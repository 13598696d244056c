"""Published numbers beside ours: what a study file holds under `paper`, and the table that `mtt sweep` ends with.

    paper:
      source: "arXiv 2605.29498"
      base: {target: 3.21, wikitext: 16.46}                    # perplexities; texts by their names in the study
      rows:
        - {method: ce, target: 3.05, drift: {wikitext: 37}}
        - {method: weights, setting: {tmkl_weight: 0.1}, prevented: {wikitext: 34}}

`target` is the perplexity on the adaptation set; `drift` the rise of a text's perplexity over the base's, and
`prevented` the share of plain CE's drift that did not happen, both in percent. A number may be a range, [low, high].
Ours are of a run's end, at the adapter's own scale, means over seeds; plain CE's drift is that of the same options.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from mask_the_target.front.results import Result, is_plain, plain_key, text_drifts
from mask_the_target.front.study import Study, check_known

ROW = ("method", "setting", "target", "drift", "prevented")
MEASURES = ("drift", "prevented")


def check_paper(paper: Any, where: str) -> None:
    """Raises ValueError with a sentence if `paper` of a study file is not as above.

    Numbers of a text that the study doesn't measure, or of a method that it doesn't have, are fine: they are printed.
    """
    if not isinstance(paper, dict):
        raise ValueError(f"{where}: paper must hold 'source', 'base' and 'rows', but is {paper!r:.80}.")
    for key in paper:
        check_known(str(key), ("source", "base", "rows"), "key", f"{where}: paper")
    for place, value in paper.get("base", {}).items():
        _check_number(value, f"{where}: paper.base.{place}")
    for number, row in enumerate(paper.get("rows", [])):
        here = f"{where}: paper.rows[{number}]"
        if not isinstance(row, dict) or not row.get("method"):
            raise ValueError(f"{here} needs a method, but is {row!r:.80}.")
        for key in row:
            check_known(str(key), ROW, "key", here)
        if "target" in row:
            _check_number(row["target"], f"{here}.target")
        for measure in MEASURES:
            for text, value in row.get(measure, {}).items():
                _check_number(value, f"{here}.{measure}.{text}")


def _check_number(value: Any, where: str) -> None:
    ends = value if isinstance(value, list) and len(value) == 2 else [value]
    if not all(isinstance(end, (int, float)) and not isinstance(end, bool) for end in ends):
        raise ValueError(f"{where} must be a number or a range [low, high], but is {value!r:.80}.")


# ----------------------------------------------------------------------------------------------------------- ours


def measured(results: Sequence[Result]) -> list[dict[str, Any]]:
    """One row for each recipe, method and setting of complete results: what `paper.rows` hold, with `seeds`, and each
    number as [mean, standard deviation over seeds (None for one)]. `target` is a perplexity, the others percent.
    """
    groups: dict[str, list[Result]] = {}
    for result in results:
        if result["status"] == "complete":
            groups.setdefault(_group(result["recipe"], result["method"], result["setting"]), []).append(result)
    plain = {
        plain_key(group[0]): {text: statistics.fmean(values) for text, values in _drifts(group).items()}
        for group in groups.values()
        if is_plain(group[0])
    }
    rows = []
    for group in groups.values():
        first, drifts = group[0], _drifts(group)
        row: dict[str, Any] = {
            **{key: first[key] for key in ("recipe", "method", "setting")},
            "seeds": len(group),
            "target": _spread([math.exp(result["learned"]) for result in group]),
            "drift": {text: _spread([100 * value for value in values]) for text, values in drifts.items()},
            "prevented": {},
        }
        for text, lost in plain.get(plain_key(first), {}).items():
            if lost > 0 and not is_plain(first):
                row["prevented"][text] = _spread([100 * (1 - value / lost) for value in drifts[text]])
        rows.append(row)
    return rows


def _drifts(group: Sequence[Result]) -> dict[str, list[float]]:
    """Relative rise of each text's perplexity over the base's, for each result."""
    each = [text_drifts(result) for result in group]
    return {probe.removeprefix("text:"): [found[probe] for found in each] for probe in each[0]}


def _group(*parts: Any) -> str:
    return json.dumps(parts, sort_keys=True)


def _spread(values: Sequence[float]) -> list[float | None]:
    return [statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None]


# ---------------------------------------------------------------------------------------------------------- table


def table(study: Study, results: Sequence[Result] = ()) -> str:
    """Ours and the paper's numbers as a Markdown table, aligned for the terminal; the paper's are in brackets.

    Every row of `study.paper` is in it, also where nothing was measured. With several recipes, the paper's numbers
    are those of the first.
    """
    rows, ours = study.paper.get("rows", []), measured(results)
    pairs: list[tuple[Mapping[str, Any], Mapping[str, Any]]]
    pairs = [(mine, next((row for row in rows if _is_of(row, mine, study)), {})) for mine in ours]
    pairs += [({}, row) for row in rows if not any(row is theirs for _, theirs in pairs)]
    texts = [probe[5:] for probe in study.probes if probe.startswith("text:")]
    texts = list(
        dict.fromkeys([*texts, *(text for row in rows for measure in MEASURES for text in row.get(measure, {}))])
    )
    columns: list[tuple[str, Callable[[Mapping[str, Any]], Any], str]] = [
        ("target", lambda row: row.get("target"), "{:.2f}")
    ]
    columns += [(f"{text} drift", _reader("drift", text), "{:+.1f}%") for text in texts]
    columns += [(f"{text} prevented", _reader("prevented", text), "{:.0f}%") for text in texts]

    lines = [["method", "setting", "seeds", *(heading for heading, _, _ in columns)]]
    for mine, theirs in pairs:
        either = mine or theirs
        name = either["method"] + (f" ({mine['recipe']})" if mine and len(study.recipes) > 1 else "")
        setting = ", ".join(f"{key} {value}" for key, value in either.get("setting", {}).items())
        cells = [_cell(value(mine), value(theirs), shown) for _, value, shown in columns]
        lines.append([name, setting, str(mine.get("seeds", "")), *cells])
    wide = [max(map(len, column)) for column in zip(*lines, strict=True)]
    lines.insert(1, ["-" * width for width in wide])
    padded = [[cell.ljust(width) for cell, width in zip(line, wide, strict=True)] for line in lines]
    drawn = [f"| {' | '.join(line)} |" for line in padded]
    return "\n".join([_bases(study, results), "", *drawn, "", _caption(study)])


def _reader(measure: str, text: str) -> Callable[[Mapping[str, Any]], Any]:
    return lambda row: row.get(measure, {}).get(text)


def _is_of(row: Mapping[str, Any], mine: Mapping[str, Any], study: Study) -> bool:
    """A row without a setting is of a method without a grid: of one with a grid, the paper says its best only."""
    same = row["method"] == mine["method"] and row.get("setting", {}) == mine["setting"]
    return same and mine["recipe"] == study.recipes[0]


def _bases(study: Study, results: Sequence[Mapping[str, Any]]) -> str:
    """The base's perplexities: unless they agree, the data are not the paper's, and the rest needn't agree."""
    base: Mapping[str, Any] = next((result["base"] for result in results if "base" in result), {})
    ours = {
        name.removeprefix("text:"): [math.exp(found["loss"]), None] for name, found in base.items() if "loss" in found
    }
    theirs = study.paper.get("base", {})
    cells = [f"{name} {_cell(ours.get(name), theirs.get(name), '{:.2f}')}" for name in {**ours, **theirs}]
    return f"Base, perplexity: {', '.join(cells) or 'not measured yet'}."


def _caption(study: Study) -> str:
    text = (
        "target: perplexity. drift: rise of the text's perplexity over the base's. prevented: share of plain CE's "
        "drift, with the same adapter and options, that did not happen. At a run's end, mean and standard deviation "
        "over seeds."
    )
    if "source" not in study.paper:
        return text
    source = f"In brackets: {study.paper['source']}."
    return f"{text} {source} A row without ours was not run, or is their choice out of a grid."


def _cell(mine: Any, theirs: Any, shown: str) -> str:
    """Ours as mean and deviation, theirs in brackets; what isn't there is left out."""
    parts = []
    if mine is not None:
        error = "" if mine[1] is None else " ± " + shown.replace("+", "").format(mine[1])
        parts.append(shown.format(mine[0]) + error)
    if theirs is not None:
        ends = theirs if isinstance(theirs, list) else [theirs]
        parts.append(f"[{' to '.join(shown.format(end) for end in ends)}]")
    return " ".join(parts)
