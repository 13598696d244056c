"""Tables, the chart and the page: what was learned and what was kept, from one dictionary of results.

A *comparison* is what `mtt eval` and `mtt demo` write as JSON:

    {"title": str, "command": str, "settings": {name: value}, "versions": {package: version},
     "machine": {"cpu": str, "cores": int, "threads": int}, "seconds": {phase: float},
     "arms": [{"name": str, "probes": {probe: {metric: value}}, "prevented": {text probe: {"value", "stderr"}}}, ...]}

The first arm is the base. Probes and metrics are those of `evaluate.evaluate_pair`; whatever was not measured is left
out of table, chart and page.
"""

from __future__ import annotations

import io
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mask_the_target.files import write_whole
from mask_the_target.front.harness import PREFIX

Arm = Mapping[str, Any]
TEXTS = {"text:python_docs": "Python docs", "text:bible": "Bible"}


@dataclass(frozen=True)
class Column:
    """One column of the table: its heading, what it means, which way is better, and whether the Markdown table, where
    it takes width, leaves it out."""

    heading: str
    meaning: str
    better: str = ""
    minor: bool = False


def _number(value: float | None, digits: int = 3) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def _percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.1f}%"


def _with_error(text: str, error: str) -> str:
    return f"{text} ± {error}" if text and error else text


def columns_and_rows(comparison: Mapping[str, Any]) -> tuple[list[Column], list[list[str]]]:
    """Columns that something was measured for, and each arm's cells as text. The first column is the arm's name."""
    arms: Sequence[Arm] = comparison["arms"]
    base = arms[0]["probes"]
    columns, cells = [Column("", "")], [[str(arm["name"]) for arm in arms]]

    def add(column: Column, values: list[str]) -> None:
        if any(values):
            columns.append(column)
            cells.append(values)

    def metric(probe: str, name: str) -> list[float | None]:
        return [arm["probes"].get(probe, {}).get(name) for arm in arms]

    add(
        Column("target loss", "Loss on held-out answers of the task, nats per token: what was learned.", "lower"),
        [_number(value) for value in metric("target", "loss")],
    )
    add(
        Column("exact match", "Share of held-out questions answered exactly right.", "higher"),
        [_percent(value) for value in metric("target", "exact_match")],
    )
    add(
        Column(
            "error rate", "Wrong, missing and extra items (arpabet: phonemes) per item of the right answer.", "lower"
        ),
        [_percent(value) for value in metric("target", "token_error_rate")],
    )
    add(
        Column(
            "chrF", "Characters of the right answers that are found, as F2 of n-grams, 0 to 100.", "higher", minor=True
        ),
        [_number(value, 1) for value in metric("target", "chrf")],
    )
    for probe, name in TEXTS.items():
        losses, errors = metric(probe, "loss"), metric(probe, "stderr")
        start = base.get(probe, {}).get("loss")
        rises = [
            None if loss is None or start is None or error is None else (loss - start, error)
            for loss, error in zip(losses, errors, strict=True)
        ]
        add(
            Column(f"{name} loss", f"Loss on English text ({name}), nats per token: what was kept.", "lower"),
            [_number(loss) for loss in losses],
        )
        add(
            Column(
                f"{name}: rise",
                "That loss less the base's, nats per token, with its standard error over paired windows of text.",
                "lower",
            ),
            [f"{rise[0]:+.3f} ± {_number(rise[1])}" if rise else "" for rise in rises],
        )
        shares = [arm.get("prevented", {}).get(probe) for arm in arms]
        add(
            Column(
                f"{name}: prevented",
                "Share of plain CE's rise that did not happen, with its standard error over paired windows.",
                "higher",
            ),
            [_with_error(_percent(share["value"]), _percent(share["stderr"])) if share else "" for share in shares],
        )
    for probe in dict.fromkeys(probe for arm in arms for probe in arm["probes"] if probe.split(":")[0] == "facts"):
        form = f" ({probe.partition(':')[2]})" if ":" in probe else ""
        add(
            Column(
                f"facts, greedy{form}",
                "Share of questions of general knowledge whose greedy answer names the fact.",
                "higher",
            ),
            [_percent(value) for value in metric(probe, "greedy")],
        )
        add(
            Column(
                f"facts, log-prob{form}",
                "Share of them where the right answer is likelier than its distractors.",
                "higher",
            ),
            [_percent(value) for value in metric(probe, "logprob")],
        )
    add(
        Column("instructions followed", "Share of instructions whose form a program found in the answer.", "higher"),
        [_percent(value) for value in metric("instructions", "followed")],
    )
    for probe in dict.fromkeys(probe for arm in arms for probe in arm["probes"] if probe.startswith(PREFIX)):
        found = [arm["probes"].get(probe, {}) for arm in arms]
        for column, values in _task_columns(probe.removeprefix(PREFIX), found, base.get(probe, {})):
            add(column, values)
    add(
        Column("KL, masked", "KL from the base on held-out answers without the target token, nats per token.", "lower"),
        [_number(value) for value in metric("drift", "masked_kl")],
    )
    add(
        Column(
            "KL, full",
            "The same with the target token: it also holds what was meant to be learned, so it need not be small.",
        ),
        [_number(value) for value in metric("drift", "full_kl")],
    )
    return columns, [list(row) for row in zip(*cells, strict=True)]


def _task_columns(
    task: str, found: Sequence[Mapping[str, Any]], base: Mapping[str, Any]
) -> list[tuple[Column, list[str]]]:
    """A task of lm-evaluation-harness: its main figure, and that less the base's, for each arm's result of it."""
    metric, better = next((values["metric"], values["better"]) for values in found if values)
    name = f"{Path(task).name.removesuffix('.yaml')} {metric.removesuffix(',none')}"
    scores, changes = [], []
    for values in found:
        score = values.get("score")
        own = values.get("_stderr,".join(values.get("metric", ",").rsplit(",", 1)))
        scores.append(_with_error(_number(score), _number(own)))
        paired = "score_stderr" in values and "score" in base
        changes.append(f"{score - base['score']:+.3f} ± {_number(values['score_stderr'])}" if paired else "")
    meaning = f"What lm-evaluation-harness gives for its task {task}, in its unit, with its standard error."
    change = "That figure less the base's, with its standard error over paired documents."
    return [(Column(name, meaning, better), scores), (Column(f"{name}: change", change, better), changes)]


def table(comparison: Mapping[str, Any]) -> str:
    """The comparison as a Markdown table, arms as rows, without minor columns."""
    columns, rows = columns_and_rows(comparison)
    kept = [place for place, column in enumerate(columns) if not column.minor]
    lines = [[columns[place].heading for place in kept], ["---", *["---:"] * (len(kept) - 1)]]
    lines += [[row[place] for place in kept] for row in rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def print_table(comparison: Mapping[str, Any]) -> None:
    """The same on the terminal, measures as rows, so that it fits 80 columns."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    columns, rows = columns_and_rows(comparison)
    grid = Table(box=box.SIMPLE_HEAD, title=Text(str(comparison.get("title", ""))), title_justify="left")
    grid.add_column("")
    for row in rows:
        grid.add_column(Text(row[0]), justify="right")
    for place, column in enumerate(columns[1:], 1):
        arrow = {"lower": " ↓", "higher": " ↑"}.get(column.better, "")
        grid.add_row(Text(column.heading + arrow), *[Text(row[place]) for row in rows])
    console = Console()
    console.print(grid)
    console.print("↓ lower is better, ↑ higher is better; ± is a standard error over the measured sample.", style="dim")


# ----------------------------------------------------------------------------------------------------------- chart


def chart(comparison: Mapping[str, Any]) -> Any:
    """The matplotlib figure: learning (held-out target loss) against retention (rise of English text loss).

    One panel for each English text; the base is at a rise of 0. Error bars are standard errors of the difference to
    the base. None if either side was not measured.
    """
    from matplotlib.figure import Figure

    arms: Sequence[Arm] = comparison["arms"]
    base = arms[0]["probes"]
    panels = [probe for probe in TEXTS if "loss" in base.get(probe, {})]
    if not panels or "loss" not in base.get("target", {}):
        return None
    figure = Figure(figsize=(4.6 * len(panels), 3.9), layout="constrained")
    axes = figure.subplots(1, len(panels), sharex=True, sharey=True, squeeze=False)[0]
    colors = ["#6b7280", "#c2410c", "#0f766e", "#6d28d9", "#0369a1"]
    for axis, probe in zip(axes, panels, strict=True):
        start = base[probe]["loss"]
        for place, arm in enumerate(arms):
            measured = arm["probes"]
            if probe not in measured or "target" not in measured:
                continue
            x, y = measured["target"]["loss"], measured[probe]["loss"] - start
            color = colors[place % len(colors)]
            axis.errorbar(
                x,
                y,
                xerr=measured["target"].get("stderr"),
                yerr=measured[probe].get("stderr"),
                fmt="o",
                color=color,
                capsize=3,
                markersize=7,
            )
            left = x > sum(a["probes"]["target"]["loss"] for a in arms if "target" in a["probes"]) / len(arms)
            axis.annotate(
                str(arm["name"]).replace("$", r"\$"),
                (x, y),
                xytext=(-8 if left else 8, 7 if place % 2 else -15),  # neighbours' labels on either side
                textcoords="offset points",
                ha="right" if left else "left",
                color=color,
                fontweight="bold",
            )
        axis.axhline(0, color="#9ca3af", linewidth=0.8, zorder=0)
        axis.margins(0.18)
        axis.set_title(TEXTS[probe], fontsize=10)
        axis.set_xlabel("target loss, nats per token\n← better: more learned")
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("rise of English text loss, nats per token\nbetter: more kept ↓")
    return figure


def write_png(comparison: Mapping[str, Any], path: Path) -> bool:
    """The chart as PNG; False, and no file, where there is nothing to draw."""
    figure = chart(comparison)
    if figure is None:
        return False
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=160, facecolor="white")
    write_whole(path, buffer.getvalue())
    return True


def _svg(comparison: Mapping[str, Any]) -> str:
    from matplotlib import rc_context

    figure = chart(comparison)
    if figure is None:
        return ""
    buffer = io.StringIO()
    with rc_context({"svg.hashsalt": "mask-the-target", "svg.fonttype": "path"}):
        nothing: dict[str, Any] = {"Date": None, "Creator": None, "Format": None, "Type": None}
        figure.savefig(buffer, format="svg", facecolor="white", metadata=nothing)
    text = buffer.getvalue()
    return text[text.index("<svg") :]


# ------------------------------------------------------------------------------------------------------------ page

STYLE = """\
:root { color-scheme: light dark; --ink: #1f2430; --dim: #5b6272; --line: #d5d9e0; --ground: #fff; --mark: #0f766e; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e8ec; --dim: #a3aaba; --line: #3a4050; --ground: #171a21; --mark: #5eead4; }
}
body { margin: 0 auto; max-width: 62rem; padding: 2rem 1rem; background: var(--ground); color: var(--ink);
       font: 16px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.1rem; margin-top: 2rem; }
.dim, figcaption { color: var(--dim); }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .35rem .8rem; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
.plain td { white-space: normal; text-align: left; vertical-align: top; overflow-wrap: anywhere; }
figure { margin: 1rem 0; } figure svg { max-width: 100%; height: auto; border-radius: 6px; background: #fff; }
code { font-size: .9em; overflow-wrap: anywhere; }
em { color: var(--mark); font-style: normal; }
"""
PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ title }}</title>
<style>
{{ style }}
</style>
</head>
<body>
<h1>{{ title }}</h1>
{% for line in summary %}<p>{{ line }}</p>
{% endfor %}
<h2>The table</h2>
<div class="scroll"><table>
<thead><tr><th scope="col">measure</th>{% for row in rows %}<th scope="col">{{ row[0] }}</th>{% endfor %}</tr></thead>
<tbody>
{% for column in columns[1:] %}<tr><th scope="row">{{ column.heading }}
{% if column.better == "lower" %}<em title="lower is better">↓</em>{% elif column.better == "higher" %}\
<em title="higher is better">↑</em>{% endif %}</th>
{% set place = loop.index %}{% for row in rows %}<td>{{ row[place] }}</td>{% endfor %}</tr>
{% endfor %}</tbody></table></div>
<p class="dim">↓ lower is better, ↑ higher is better; ± is a standard error over the measured sample.</p>
{% if svg %}<h2>Learning against retention</h2>
<figure role="img" aria-label="Target loss against the rise of English text loss, one point for each row of the table">
{{ svg }}
<figcaption>Left is more learned, down is more kept.
Bars are standard errors of the difference to the base over the measured sample.</figcaption>
</figure>{% endif %}
<h2>What each measure means</h2>
<table class="plain"><tbody>
{% for column in columns[1:] %}<tr><td>{{ column.heading }}</td><td>{{ column.meaning }}</td></tr>
{% endfor %}</tbody></table>
{% for name, values in details.items() if values %}<h2>{{ name }}</h2>
<table class="plain"><tbody>
{% for key, value in values.items() %}<tr><td>{{ key }}</td><td>{{ value }}</td></tr>
{% endfor %}</tbody></table>
{% endfor %}
<p class="dim">Made by mask-the-target. Method: Xu, Garg, Saratchandran, Lucey, Mask the Target, arXiv 2605.29498.</p>
</body>
</html>
"""


def summary(comparison: Mapping[str, Any]) -> list[str]:
    """A few sentences that say what the numbers say, and how far they carry."""
    lines = []
    for arm in comparison["arms"]:
        for probe, share in arm.get("prevented", {}).items():
            lines.append(
                f"{arm['name']} prevented {_percent(share['value'])} ± {_percent(share['stderr'])} of the rise that "
                f"plain CE causes in the loss on English text ({TEXTS.get(probe, probe)})."
            )
    seed = comparison.get("settings", {}).get("seed")
    lines.append(
        ("One seed" if seed is None else f"One seed ({seed})")
        + ", one setting: the standard errors cover which text and questions were measured, not how another seed, "
        "learning rate or data set would come out."
    )
    return lines


def render(template: str, **values: Any) -> str:
    """A page of STYLE from a Jinja template; every value is escaped, unless it is Markup."""
    from jinja2 import Environment
    from markupsafe import Markup

    page = Environment(autoescape=True, trim_blocks=True).from_string(template)
    return page.render(style=Markup(STYLE), **values)


def write_html(comparison: Mapping[str, Any], path: Path) -> None:
    """One self-contained page: no script, no font, no link to load; every value is escaped."""
    from markupsafe import Markup

    columns, rows = columns_and_rows(comparison)
    details = {
        "Settings": comparison.get("settings", {}),
        "How it was made": {
            **({"command": comparison["command"]} if "command" in comparison else {}),
            **comparison.get("machine", {}),
            **{f"{phase}, seconds": f"{seconds:.0f}" for phase, seconds in comparison.get("seconds", {}).items()},
        },
        "Versions": comparison.get("versions", {}),
    }
    text = render(
        PAGE,
        title=str(comparison.get("title", "What was learned, what was kept")),
        summary=summary(comparison),
        columns=columns,
        rows=rows,
        svg=Markup(_svg(comparison)),  # matplotlib escapes the text that it draws
        details=details,
    )
    write_whole(path, text.encode())


def machine() -> dict[str, Any]:
    """CPU (and accelerator) name, cores and torch threads of this machine."""
    import torch

    cpu = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
        cpu = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), cpu)
    except OSError:
        pass
    found = {"cpu": cpu, "cores": os.cpu_count() or 1, "threads": torch.get_num_threads()}
    if torch.cuda.is_available():
        found["accelerator"] = torch.cuda.get_device_name()
    return found
