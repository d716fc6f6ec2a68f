"""The pictures of a comparison, drawn with matplotlib in the colours of a `Palette`.

The same figures go to PNG files, in plain colours, and into the page, where each colour stands for
a variable of the page's style (`page.py`).
"""

from __future__ import annotations

import collections
import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from vlprune.anatomy import Axis
from vlprune.compare.results import Comparison, Point

_NARROWEST = 5.0  # points of percent across
_MARKS = "osD^vPX*"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Palette:
    """Colours of a figure: text, grid, surface, one per metric, and a scale of shares."""

    ink: str
    grid: str
    paper: str
    lines: tuple[str, ...]
    shares: tuple[str, ...]

    def line(self, number: int) -> str:
        """Return the colour of a metric."""
        return self.lines[number % len(self.lines)]

    def share(self, share: float) -> str:
        """Return the colour of a share in [0, 1]."""
        return self.shares[round(share * (len(self.shares) - 1))]


# Okabe and Ito's colours for the colour-blind, darkened where white ground asks for it.
LIGHT = Palette(
    ink="#24292f",
    grid="#d8dee4",
    paper="#ffffff",
    lines=(
        "#0072b2",
        "#c2491d",
        "#007a5a",
        "#a8447f",
        "#8a6d00",
        "#2f7fb8",
        "#57606a",
        "#6f42c1",
    ),
    shares=("#eceff2", "#d3e3f3", "#a9cbe9", "#7aafdc", "#4a8fcb", "#2171b5", "#0b4f8a"),
)


def quality_chart(
    comparison: Comparison, cost: str, palette: Palette, *, near: bool = False
) -> Figure:
    """Draw the measure over a cost: a line per metric, allocation and repair.

    Args:
        comparison: to draw.
        cost: "params", "macs" or "latency", each as a share of the dense model's.
        palette: colours.
        near: only what has at least 85 % of the dense model's measure.
    """
    figure, panel = _figure(4.7, 3.7, palette)
    lines: dict[tuple[str, str, bool], list[Point]] = collections.defaultdict(list)
    for point in comparison.points:
        lines[point.metric, point.allocation, point.repaired].append(point)
    allocations = list(dict.fromkeys(point.allocation for point in comparison.points))
    for (metric, allocation, repaired), points in lines.items():
        points = sorted(points, key=lambda point: point.keep)
        across = [100 * cost_share(comparison, point, cost) for point in points]
        colour = palette.line(comparison.metrics.index(metric))
        panel.plot(
            across,
            [point.value for point in points],
            color=colour,
            linestyle="-" if repaired else (0, (4, 2)),
            linewidth=1.6 if repaired else 1.1,
        )
        low, high = ([getattr(p, side) for p in points] for side in ("low", "high"))
        if not any(map(math.isnan, low)):
            panel.fill_between(across, low, high, color=colour, alpha=0.14, linewidth=0)
        mark = _MARKS[allocations.index(allocation) % len(_MARKS)]
        for x, point in zip(across, points, strict=True):
            (drawn,) = panel.plot(
                [x],
                [point.value],
                marker=mark,
                markersize=5,
                color=colour,
                markerfacecolor=colour if repaired else palette.paper,
                linestyle="none",
            )
            drawn.set_gid(f"point-{comparison.points.index(point)}")
    panel.axhline(comparison.dense.value, color=palette.ink, linewidth=0.8, linestyle=":")
    panel.annotate(
        "dense",
        (0, comparison.dense.value),
        xycoords=("axes fraction", "data"),
        xytext=(4, 3),
        textcoords="offset points",
        fontsize=8,
        color=palette.ink,
    )
    what = {"params": "parameters", "macs": "MACs", "latency": "measured time of a call"}[cost]
    panel.set_xlabel(f"{what}, % of the dense model", fontsize=9, color=palette.ink)
    panel.set_ylabel(comparison.task, fontsize=9, color=palette.ink)
    panel.grid(color=palette.grid, linewidth=0.6)
    panel.margins(y=0.08)
    left, right = panel.get_xlim()
    if right - left < _NARROWEST:  # one budget: points that differ by a unit are at one place
        middle = (left + right) / 2
        panel.set_xlim(middle - _NARROWEST / 2, middle + _NARROWEST / 2)
    if near:
        dense = comparison.dense.value
        best = max([dense, *(point.value for point in comparison.points)])
        panel.set_ylim(dense - 0.15 * abs(dense), best + 0.01 * abs(dense))
        panel.set_title("near the dense model", loc="left", fontsize=9, color=palette.ink)
    return figure


def cost_share(comparison: Comparison, point: Point, cost: str) -> float:
    """Return what a point costs as a share of the dense model."""
    if cost == "latency":
        return point.latency
    return float(getattr(point, cost) / getattr(comparison.dense, cost))


def kept_chart(comparison: Comparison, metric: str, tower: str, palette: Palette) -> Figure | None:
    """Draw at how many budgets each head stays, and the share of neurons at each budget.

    Of the metric's first allocation; None where it kept nothing to show in that tower.
    """
    plans = _plans_of(comparison, metric)
    axes = [
        axis
        for axis in (plans[0][1].axes if plans else ())
        if axis.tower == tower and axis.removal == "slice"
    ]
    heads = [axis for axis in axes if axis.kind == "head"]
    others = [axis for axis in axes if axis.kind == "ffn"]
    if not heads and not others:
        return None
    rows = max(len(heads), len(others))
    figure, panels = _figure(4.7, 1.15 + 0.2 * rows, palette, columns=2)
    left, right = panels
    kept = [(keep, plan.keep) for keep, plan in plans]
    _cells(
        left,
        [[_share_of(kept, axis, unit) for unit in range(axis.units)] for axis in heads],
        palette,
    )
    _finish(left, heads, f"{tower}: heads", "head", palette)
    _cells(
        right,
        [[len(keep[axis.name]) / axis.units for _, keep in kept] for axis in others],
        palette,
        numbers=True,
    )
    _finish(right, others, f"{tower}: neurons, % kept", "share asked for", palette)
    right.set_xticks([place + 0.5 for place in range(len(kept))])
    right.set_xticklabels([f"{keep:g}" for keep, _ in kept])
    return figure


def towers_of(comparison: Comparison) -> list[str]:
    """Return the towers that plans decide on."""
    axes = (axis for plan in comparison.plans.values() for axis in plan.axes)
    return list(dict.fromkeys(axis.tower for axis in axes))


def _plans_of(comparison: Comparison, metric: str) -> list[tuple[float, Any]]:
    """Budget and plan of a metric's first allocation, the largest budget first."""
    points = [point for point in comparison.points if point.metric == metric]
    first = [point for point in points if point.allocation == points[0].allocation]
    found = {point.keep: comparison.plans[point.plan] for point in first}
    return sorted(found.items(), reverse=True)


def _share_of(kept: Sequence[tuple[float, Any]], axis: Axis, unit: int) -> float:
    return sum(unit in keep[axis.name] for _, keep in kept) / len(kept)


def _cells(panel: Any, rows: list[list[float]], palette: Palette, numbers: bool = False) -> None:
    for y, row in enumerate(rows):
        for x, share in enumerate(row):
            patch = Rectangle(
                (x + 0.04, y + 0.06), 0.92, 0.88, color=palette.share(share), linewidth=0
            )
            panel.add_patch(patch)
            if numbers:
                dark = share > 0.6
                panel.text(
                    x + 0.5,
                    y + 0.53,
                    f"{100 * share:.0f}",
                    ha="center",
                    va="center",
                    fontsize=7,
                    color=palette.shares[0] if dark else palette.ink,
                )
    width = max((len(row) for row in rows), default=1)
    panel.set_xlim(0, width)
    panel.set_ylim(max(len(rows), 1), 0)
    step = 1 if width <= 12 else 4
    panel.set_xticks([place + 0.5 for place in range(0, width, step)])
    panel.set_xticklabels([str(place) for place in range(0, width, step)])


def _finish(panel: Any, axes: list[Axis], title: str, label: str, palette: Palette) -> None:
    if not axes:
        panel.set_axis_off()
        return
    panel.set_title(title, loc="left", fontsize=8.5, color=palette.ink)
    panel.set_xlabel(label, fontsize=8, color=palette.ink)
    panel.set_yticks([place + 0.5 for place in range(len(axes))])
    panel.set_yticklabels([f"{axis.depth}{'x' if 'cross' in axis.name else ''}" for axis in axes])
    panel.set_ylabel("layer", fontsize=8, color=palette.ink)
    for side in panel.spines.values():
        side.set_visible(False)
    panel.tick_params(length=0)


def _figure(width: float, height: float, palette: Palette, columns: int = 1) -> tuple[Figure, Any]:
    figure = Figure(figsize=(width, height), layout="constrained", facecolor="none")
    FigureCanvasAgg(figure)
    found = figure.subplots(1, columns)
    for panel in found if columns > 1 else (found,):
        panel.set_facecolor("none")
        panel.tick_params(colors=palette.ink, labelsize=8)
        for name, side in panel.spines.items():
            side.set_color(palette.grid)
            side.set_visible(name in ("left", "bottom"))
    return figure, found


def draw_all(comparison: Comparison, palette: Palette, keep: Callable[[str, Figure], None]) -> None:
    """Draw every figure and hand it on by name: quality-params, ..., kept-METRIC-TOWER."""
    for cost in ("params", "macs", "latency"):
        keep(f"quality-{cost}", quality_chart(comparison, cost, palette))
    keep("quality-near", quality_chart(comparison, "params", palette, near=True))
    for metric in comparison.metrics:
        for tower in towers_of(comparison):
            figure = kept_chart(comparison, metric, tower, palette)
            if figure is not None:
                keep(f"kept-{metric}-{tower}", figure)
