"""The plots of a study's page, as plain dictionaries for plotly.js, and the same fronts for a PNG with matplotlib.

A method is told apart by marker, dash and a label at its line, and by colour last. Text from data is escaped here:
plotly reads a part of HTML in names and labels, matplotlib reads formulas.
"""

from __future__ import annotations

import html
import io
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from mask_the_target.front.fronts import TOLERANCES, Box

INK, DIM, LINE = "#1f2430", "#5b6272", "#c9ced8"
COLORS = ("#d55e00", "#0072b2", "#009e73", "#cc79a7", "#b07d00", "#3a9bd1", "#5b6272")  # Okabe and Ito's, darker
# Plotly's name and matplotlib's.
MARKERS = (
    *(("circle", "o"), ("square", "s"), ("diamond", "D"), ("triangle-up", "^"), ("x", "X"), ("triangle-down", "v")),
    *(("pentagon", "p"), ("cross", "P"), ("star", "*"), ("hexagon", "h")),
)
DASHES: tuple[tuple[str, Any], ...] = (
    *(("solid", "-"), ("dash", (0, (5, 3))), ("dot", ":"), ("dashdot", "-."), ("longdash", (0, (10, 3)))),
    *(("longdashdot", (0, (10, 3, 2, 3))),),
)
SIZES = {"wide": (760, 400), "narrow": (270, 330)}  # of the area within the axes, about, in pixels
X_TITLE, Y_TITLE = "target loss, nats per token", "rise of text loss, nats per token"
FONT = {"family": "system-ui, sans-serif", "size": 13, "color": INK}


@dataclass(frozen=True)
class Style:
    """How a method is drawn."""

    color: str
    marker: tuple[str, str]
    dash: tuple[str, Any]

    @classmethod
    def of(cls, place: int) -> Style:
        """The style of the method at this place; no two of the first 210 are the same."""
        kinds: Any = (COLORS, MARKERS, DASHES)
        return cls(*(kind[place % len(kind)] for kind in kinds))


@dataclass(frozen=True)
class Dot:
    """A point to draw, and the lines of text that say what it is."""

    x: float
    y: float
    text: Sequence[str] = ()


@dataclass(frozen=True)
class Fronts:
    """What is drawn of one recipe: {method: its front, and its other points}, the base, and plain CE's box if any."""

    base: Dot
    fronts: Mapping[str, Sequence[Dot]]
    others: Mapping[str, Sequence[Dot]]
    styles: Mapping[str, Style]
    box: Box | None = None
    area: tuple[tuple[float, float], tuple[float, float]] = field(init=False)  # what is shown, of x and of y
    outside: int = field(init=False)  # points that are not within it

    def __post_init__(self) -> None:
        everything = [self.base, *itertools.chain(*self.fronts.values(), *self.others.values())]
        kept = [self.base, *itertools.chain(*self.fronts.values())]
        if self.box is not None and not self.box.is_empty():
            kept.append(Dot(self.box.best_loss, self.box.worst_rise))
        sides = [[[getattr(dot, axis) for dot in dots] for dots in (kept, everything)] for axis in ("x", "y")]
        object.__setattr__(self, "area", tuple(_range(*side) for side in sides))
        (x0, x1), (y0, y1) = self.area
        hidden = [dot for dot in everything if not (x0 <= dot.x <= x1 and y0 <= dot.y <= y1)]
        object.__setattr__(self, "outside", len(hidden))


def _range(core: Sequence[float], whole: Sequence[float]) -> tuple[float, float]:
    """What an axis shows: all of the core, and as much of the whole as is near it.

    One run that went astray would leave no room for the others.
    """
    span = max(core) - min(core) or 1.0
    low, high = max(min(whole), min(core) - 0.3 * span), min(max(whole), max(core) + 0.3 * span)
    margin = 0.06 * ((high - low) or 1.0)
    return low - margin, high + margin


def place_labels(
    lines: Mapping[str, Sequence[tuple[float, float]]],
    area: tuple[tuple[float, float], tuple[float, float]],
    size: tuple[float, float],
    ink: Sequence[tuple[float, float]] = (),
) -> dict[str, tuple[float, float, float, float]]:
    """Where each line's label goes: {name: (x, y of one of its points, label's centre from there in pixels)}.

    Each label takes the place beside one of its line's points where it covers least: other labels, then points and
    `ink` (more places that should stay free). `size` is that of the `area` of x and y, in pixels; up is positive.
    """
    (x0, x1), (y0, y1) = area

    def pixels(point: tuple[float, float]) -> tuple[float, float]:
        return (point[0] - x0) / (x1 - x0) * size[0], (point[1] - y0) / (y1 - y0) * size[1]

    dark = np.array([pixels(point) for point in [*itertools.chain(*lines.values()), *ink]]).reshape(-1, 2)
    taken: list[tuple[float, float, float, float]] = []
    found = {}
    for name, points in lines.items():
        wide, high = 3.6 * len(name) + 6, 10.0
        best: tuple[float, Any, Any] | None = None
        for point, distance, turn in itertools.product(points, (22, 36, 55, 80), range(8)):
            x, y = pixels(point)
            angle = math.pi * (turn + 0.5) / 4
            dx = math.cos(angle) * (distance + wide * 0.8)
            dy = math.sin(angle) * distance
            left, right, low, top = x + dx - wide, x + dx + wide, y + dy - high, y + dy + high
            cost = 0.15 * distance
            cost += 1000 * (left < 0 or right > size[0] or low < 0 or top > size[1])
            cost += 300 * sum(left < r and l < right and low < t and b < top for l, r, b, t in taken)  # noqa: E741
            if best is not None and cost >= best[0]:
                continue
            cost += 4 * int(np.all((dark > (left, low)) & (dark < (right, top)), axis=1).sum())
            if best is None or cost < best[0]:
                best = (cost, (*point, dx, dy), (left, right, low, top))
        if best is not None:
            found[name] = best[1]
            taken.append(best[2])
    return found


def _stairs(dots: Sequence[Dot], count: int = 24) -> Iterator[tuple[float, float]]:
    """Points along the edge of what a front dominates."""
    for a, b in itertools.pairwise(dots):
        for part in range(1, count):
            yield a.x + (b.x - a.x) * part / count, a.y
            yield b.x, a.y + (b.y - a.y) * part / count


def front_labels(drawn: Fronts, size: tuple[float, float]) -> dict[str, tuple[float, float, float, float]]:
    (x0, x1), (y0, y1) = drawn.area

    def shown(dots: Sequence[Dot]) -> list[tuple[float, float]]:
        return [(dot.x, dot.y) for dot in dots if x0 <= dot.x <= x1 and y0 <= dot.y <= y1]

    lines = {name: shown(dots) for name, dots in drawn.fronts.items()} | {"base": shown([drawn.base])}
    ink = [*itertools.chain(*(_stairs(dots) for dots in drawn.fronts.values()))]
    return place_labels(lines, drawn.area, size, [*ink, *shown([*itertools.chain(*drawn.others.values())])])


# ---------------------------------------------------------------------------------------------------------- plotly


def _plain(text: str) -> str:
    """Text as plotly shows it: nothing in it is a tag or a link."""
    return html.escape(text, quote=False)


def _hover(dots: Sequence[Dot]) -> list[str]:
    return ["<br>".join(_plain(line) for line in dot.text) for dot in dots]


def _trace(name: str, style: Style, dots: Sequence[Dot], **more: Any) -> dict[str, Any]:
    return {
        "type": "scatter",
        "name": _plain(name),
        "legendgroup": _plain(name),
        "x": [dot.x for dot in dots],
        "y": [dot.y for dot in dots],
        "hovertext": _hover(dots),
        "hoverinfo": "text",
        "marker": {"color": style.color, "symbol": style.marker[0], "size": 9, "line": {"color": "#fff", "width": 1}},
        "line": {"color": style.color, "dash": style.dash[0], "width": 2},
    } | more


def _annotations(
    labels: Mapping[str, tuple[float, float, float, float]], styles: Mapping[str, Style], axis: str = ""
) -> list[dict[str, Any]]:
    return [
        {
            "text": _plain(name),
            "x": x,
            "y": y,
            "yref": f"y{axis}",
            "ax": dx,
            "ay": -dy,
            "arrowhead": 0,
            "arrowwidth": 1,
            "arrowcolor": DIM,
            "standoff": 5,
            "bgcolor": "rgba(255,255,255,0.9)",
            "bordercolor": styles[name].color if name in styles else INK,
            "borderpad": 2,
            "font": {"size": 12, "color": INK},
        }
        for name, (x, y, dx, dy) in labels.items()
    ]


def _axis(title: str, **more: Any) -> dict[str, Any]:
    return {
        "title": {"text": title, "standoff": 8},
        "automargin": True,
        "gridcolor": "#eceef2",
        "linecolor": LINE,
        "zeroline": False,
        "ticks": "outside",
        "tickcolor": LINE,
    } | more


def _layouts(names: Sequence[str], axes: Mapping[str, Any], height: int = 0) -> dict[str, Any]:
    """The layout, and what differs between a wide and a narrow page; `height` is added to that of one plot."""
    layout: dict[str, Any] = {
        **axes,
        "font": FONT,
        "paper_bgcolor": "#fff",
        "plot_bgcolor": "#fff",
        "hovermode": "closest",
        "hoverlabel": {"align": "left", "bgcolor": "#fff", "bordercolor": LINE, "font": {"size": 13, "color": INK}},
        "showlegend": True,
        "legend": {"orientation": "h", "yref": "container", "y": 0, "yanchor": "bottom", "x": 0, "itemwidth": 40},
    }
    found: dict[str, Any] = {"layout": layout}
    for kind, (width, inner) in SIZES.items():
        rows, used = min(1, len(names)), 0.0
        for name in names:
            entry = 54 + 7.5 * len(name)
            rows, used = (rows + 1, entry) if used + entry > width and used else (rows, used + entry)
        legend = 22 * rows + 12
        found[kind] = {
            "height": inner + height + 70 + legend,
            "margin": {"l": 56, "r": 30, "t": 14, "b": 56 + legend},
            "dragmode": "zoom" if kind == "wide" else False,  # a finger scrolls the page
            "annotations": [],
        }
    return found


def plot_fronts(drawn: Fronts) -> dict[str, Any]:
    """Learning against keeping: a line for each method's front, faint markers for its other points."""
    data = [
        _trace(name, drawn.styles[name], dots, mode="markers", opacity=0.35, showlegend=False)
        for name, dots in drawn.others.items()
        if dots
    ]
    for name, dots in drawn.fronts.items():
        line = {"color": drawn.styles[name].color, "dash": drawn.styles[name].dash[0], "width": 2, "shape": "hv"}
        data.append(_trace(name, drawn.styles[name], dots, mode="lines+markers", line=line))
    marker = {"color": INK, "symbol": "star-diamond", "size": 13}
    data.append(_trace("base", Style.of(0), [drawn.base], mode="markers", marker=marker))
    area: Any = drawn.area
    found = _layouts(
        [*drawn.fronts, "base"],
        {
            "xaxis": _axis(f"{X_TITLE}<br>← learned more", range=area[0]),
            "yaxis": _axis(f"{Y_TITLE}<br>← kept more", range=area[1]),
        },
    )
    shapes: list[dict[str, Any]] = []
    if drawn.box is not None and not drawn.box.is_empty():
        box = {"x0": drawn.box.best_loss, "x1": drawn.box.base_loss, "y0": 0, "y1": drawn.box.worst_rise}
        shapes.append({"type": "rect", **box, "line": {"color": DIM, "width": 1, "dash": "dot"}, "layer": "below"})
        shapes[0]["fillcolor"] = "rgba(91,98,114,0.05)"
    marks = []
    for tolerance in TOLERANCES:
        y = math.log1p(tolerance)
        if area[1][0] < y < area[1][1]:
            place = {"xref": "paper", "x0": 0, "x1": 1, "y0": y, "y1": y}
            shapes.append({"type": "line", **place, "line": {"color": LINE, "width": 1}, "layer": "below"})
            text = {"text": f"{tolerance:.0%}", "font": {"size": 11, "color": DIM}}
            marks.append({**text, "showarrow": False, "xref": "paper", "x": 1, "xanchor": "left", "y": y})
    found["layout"]["shapes"] = shapes
    for kind, size in SIZES.items():
        found[kind]["annotations"] = [*marks, *_annotations(front_labels(drawn, size), drawn.styles)]
    return found | {"data": data, "outside": drawn.outside}


@dataclass(frozen=True)
class Curve:
    """One method and setting along its run: target loss and rise of text loss, mean over seeds, x from 0 to 1."""

    method: str
    learned: Sequence[Dot]
    rise: Sequence[Dot]


def plot_curves(curves: Sequence[Curve], drawn: Fronts) -> dict[str, Any]:
    """Target loss above, rise of text loss below, along the run; the label is at the setting that learned most.

    Both are shown as far as in the plot of the fronts.
    """
    styles, area = drawn.styles, drawn.area
    data: list[dict[str, Any]] = []
    best: dict[str, Curve] = {}
    for curve in curves:
        style, first = styles[curve.method], curve.method not in best
        if first or curve.learned[-1].y < best[curve.method].learned[-1].y:
            best[curve.method] = curve
        for axis, dots in (("", curve.learned), ("2", curve.rise)):
            legend = first and not axis
            trace = _trace(curve.method, style, dots, mode="lines+markers", yaxis=f"y{axis}", showlegend=legend)
            trace["marker"] |= {"size": 7}
            data.append(trace | {"opacity": 0.85, "line": trace["line"] | {"width": 1.5}})
    found = _layouts(
        list(best),
        {
            "xaxis": _axis("share of the run's steps", tickformat=".0%", range=[-0.03, 1.06], anchor="y2"),
            "yaxis": _axis("target loss", domain=[0.54, 1]),
            "yaxis2": _axis("rise of text loss", domain=[0, 0.46]),
        },
        height=180,
    )
    outside = 0
    for axis, side, (low, high) in (("", "learned", area[0]), ("2", "rise", area[1])):
        lines = {name: [(dot.x, dot.y) for dot in getattr(curve, side)[1:]] for name, curve in best.items()}
        every = [(dot.x, dot.y) for curve in curves for dot in getattr(curve, side)]
        found["layout"][f"yaxis{axis}"]["range"] = (low, high)
        outside += sum(not low <= y <= high for _, y in every)
        lines = {name: [point for point in points if low <= point[1] <= high] for name, points in lines.items()}
        for kind, (width, height) in SIZES.items():
            labels = place_labels(lines, ((-0.03, 1.06), (low, high)), (width, (height + 180) * 0.46), every)
            found[kind]["annotations"] += _annotations(labels, styles, axis)
    return found | {"data": data, "outside": outside}


def plot_distance(recipes: Mapping[str, Dot]) -> dict[str, Any]:
    """How far each recipe's answers are from the base, against what plain CE forgets on it."""
    dots = list(recipes.values())
    xs, ys = [dot.x for dot in dots], [dot.y for dot in dots]
    area: Any = tuple(
        (min(values) - 0.12 * span, max(values) + 0.12 * span)
        for values in (xs, [0.0, *ys])
        for span in [(max(values) - min(values)) or 1.0]
    )
    data = [
        _trace(name, Style.of(place), [dot], mode="markers", showlegend=False)
        for place, (name, dot) in enumerate(recipes.items())
    ]
    found = _layouts(
        [],
        {
            "xaxis": _axis("base's target loss, nats per token<br>farther from the base →", range=area[0]),
            "yaxis": _axis("plain CE's rise of text loss", range=area[1]),
        },
        height=-60,
    )
    for kind, size in SIZES.items():
        labels = place_labels({name: [(dot.x, dot.y)] for name, dot in recipes.items()}, area, size)
        found[kind]["annotations"] = _annotations(labels, {})
    found["layout"]["showlegend"] = False
    return found | {"data": data, "outside": 0}


# ------------------------------------------------------------------------------------------------------ matplotlib


def png_of_fronts(recipes: Mapping[str, Fronts]) -> bytes:
    """The fronts as a static picture, one panel for each recipe."""
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    columns = min(2, len(recipes))
    rows = math.ceil(len(recipes) / columns)
    figure = Figure(figsize=(6.4 * columns + (0.6 if columns == 1 else 0), 5.0 * rows), layout="constrained")
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axis in axes[len(recipes) :]:
        axis.set_axis_off()
    for axis, (recipe, drawn) in zip(axes, recipes.items(), strict=False):
        if drawn.box is not None and not drawn.box.is_empty():
            corner = (drawn.box.best_loss, 0)
            size = (drawn.box.base_loss - drawn.box.best_loss, drawn.box.worst_rise)
            axis.add_patch(Rectangle(corner, *size, facecolor="#5b627210", edgecolor=DIM, linestyle=":", zorder=0))
        for tolerance in TOLERANCES:
            if drawn.area[1][0] < math.log1p(tolerance) < drawn.area[1][1]:
                axis.axhline(math.log1p(tolerance), color=LINE, linewidth=0.8, zorder=0)
                place = (drawn.area[0][1], math.log1p(tolerance))
                axis.text(*place, f" {tolerance:.0%}", ha="left", va="center", size=7, color=DIM)
        for name, dots in drawn.others.items():
            style = drawn.styles[name]
            places = [dot.x for dot in dots], [dot.y for dot in dots]
            axis.scatter(*places, s=22, color=style.color, marker=style.marker[1], alpha=0.3, linewidths=0)
        for name, dots in drawn.fronts.items():
            style = drawn.styles[name]
            axis.plot(
                [dot.x for dot in dots],
                [dot.y for dot in dots],
                color=style.color,
                marker=style.marker[1],
                linestyle=style.dash[1],
                drawstyle="steps-post",
                markeredgecolor="white",
                markersize=7,
            )
        axis.plot(drawn.base.x, drawn.base.y, color=INK, marker="D", markersize=8)
        axis.set_xlim(drawn.area[0])
        axis.set_ylim(drawn.area[1])
        axis.set_title(_formula_free(recipe), loc="left", fontsize=11)
        axis.set_xlabel(f"{X_TITLE}\n← learned more")
        axis.set_ylabel(f"{Y_TITLE}\n← kept more")
        axis.spines[["top", "right"]].set_visible(False)
        for name, (x, y, dx, dy) in front_labels(drawn, (520, 420)).items():
            color = drawn.styles[name].color if name in drawn.styles else INK
            axis.annotate(
                _formula_free(name),
                (x, y),
                xytext=(0.72 * dx, 0.72 * dy),  # points, of 72 to the inch instead of 100
                textcoords="offset points",
                ha="center",
                va="center",
                size=8,
                bbox={"boxstyle": "round,pad=0.2", "facecolor": "#ffffffe6", "edgecolor": color},
                arrowprops={"arrowstyle": "-", "color": DIM, "linewidth": 0.8},
            )
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=160, facecolor="white", metadata={"Software": None})
    return buffer.getvalue()


def _formula_free(text: str) -> str:
    return text.replace("$", r"\$")
