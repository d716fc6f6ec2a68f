"""What people look at: a picture and a table of what a plan keeps, and one of an anatomy.

Pictures are drawn with matplotlib without a display; tables are rich's.
"""

from __future__ import annotations

import collections
import os
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from rich.table import Table

from vlprune.anatomy import Anatomy, Axis
from vlprune.cost import dense_cost, least_cost, price
from vlprune.plan import Plan, PlanRow
from vlprune.timetable import LatencyTable

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_KEPT, _GONE, _INK = "#2563a8", "#e3e6ea", "#30363d"


def anatomy_table(anatomy: Anatomy) -> Table:
    """Return a table of what can be removed: one row per tower and kind."""
    dense, least = dense_cost(anatomy), least_cost(anatomy)
    table = Table(
        title=f"{anatomy.model}: {dense.params:,} parameters, {dense.macs:,} MACs a call; "
        f"{(dense.params - least.params) / dense.params:.0%} of the parameters can go"
    )
    for name in ("tower", "kind", "axes", "units", "params a unit", "params in all"):
        table.add_column(name, justify="left" if name in ("tower", "kind") else "right")
    for (tower, kind), axes in _groups(anatomy.axes):
        units = sum(axis.units for axis in axes)
        saved = dense.params - price(anatomy, {axis.name: () for axis in axes}).params
        table.add_row(
            tower, kind, str(len(axes)), f"{units:,}", f"{saved / units:,.0f}", f"{saved:,}"
        )
    return table


def plan_table(plan: Plan) -> Table:
    """Return a table of what a plan keeps: one row per tower and kind, counts per layer."""
    table = Table(title=f"plan {plan.digest}")
    for name in ("tower", "kind", "kept", "share", "kept per layer"):
        table.add_column(name, justify="right" if name in ("kept", "share") else "left")
    for (tower, kind), axes in _groups(plan.axes):
        kept = [len(plan.keep[axis.name]) for axis in axes]
        units = sum(axis.units for axis in axes)
        table.add_row(
            tower,
            kind,
            f"{sum(kept):,} of {units:,}",
            f"{sum(kept) / units:.0%}",
            " ".join(str(count) for count in kept),
        )
    return table


def latency_table(table: LatencyTable) -> Table:
    """Return a table of what blocks take: one row per shape, milliseconds by units that stay."""
    place = ", ".join(str(value) for value in table.place.values())
    found = Table(title=f"{table.model}: {table.dense_ms:.4g} ms ({place})")
    for name in ("kind", "axes", "such as", "ms of one, by units that stay", "of all"):
        found.add_column(name, justify="right" if name in ("axes", "of all") else "left")
    for row in table.rows:
        cells = "  ".join(f"{k}: {ms:.3g}" for k, ms in zip(row.kept, row.ms, strict=True))
        share = row.ms[-1] * len(row.axes) / table.dense_ms
        alone = "" if row.kind not in ("layer", "sublayer") else " each"
        found.add_row(row.kind, str(len(row.axes)), row.axes[0], cells, f"{share:.0%}{alone}")
    return found


def draw_plan(plan: Plan, path: str | os.PathLike[str], title: str = "") -> None:
    """Draw which heads and how many neurons every layer keeps, as a PNG.

    Args:
        plan: with axes of kind "head" or "ffn"; others are left out.
        path: of the picture.
        title: above it.

    Raises:
        ValueError: if the plan has neither heads nor neurons.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # lazy: only for pictures
    from matplotlib.figure import Figure

    rows = [row for row in plan.rows if row.axis.kind in ("head", "ffn")]
    towers = list(dict.fromkeys(row.axis.tower for row in rows))
    if not towers:
        raise ValueError("plan must decide on heads or neurons to be drawn; it has neither.")
    depths = {t: max(r.axis.depth for r in rows if r.axis.tower == t) + 1 for t in towers}
    height = 1.3 + sum(0.9 + 0.32 * depth for depth in depths.values())
    figure = Figure(figsize=(9, height), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(
        len(towers), 2, squeeze=False, height_ratios=[2 + depths[t] for t in towers]
    )
    for (left, right), tower in zip(panels, towers, strict=True):
        here = [row for row in rows if row.axis.tower == tower]
        _draw_heads(left, tower, [row for row in here if row.axis.kind == "head"])
        _draw_neurons(right, tower, [row for row in here if row.axis.kind == "ffn"])
    if title:
        figure.suptitle(title, color=_INK)
    figure.savefig(path, dpi=130)


def _draw_heads(panel: Axes, tower: str, rows: Sequence[PlanRow]) -> None:
    for place, row in enumerate(rows):
        for unit in range(row.axis.units):
            color = _KEPT if unit in row.keep else _GONE
            panel.add_patch(_square(unit, place, color))
    if not rows:
        panel.set_axis_off()
        return
    most = max(row.axis.units for row in rows)
    panel.set(xlim=(0, most), xticks=[unit + 0.5 for unit in range(most)])
    panel.set_xticklabels([str(unit) for unit in range(most)])
    _finish(panel, rows, f"{tower}: heads kept", "head")


def _draw_neurons(panel: Axes, tower: str, rows: Sequence[PlanRow]) -> None:
    if not rows:
        panel.set_axis_off()
        return
    for place, row in enumerate(rows):
        share = len(row.keep) / row.axis.units
        panel.barh(place + 0.5, 1, height=0.8, color=_GONE)
        panel.barh(place + 0.5, share, height=0.8, color=_KEPT)
        inside = share > 0.25
        panel.text(
            share - 0.01 if inside else share + 0.01,
            place + 0.5,
            f"{len(row.keep)} of {row.axis.units}",
            ha="right" if inside else "left",
            va="center",
            fontsize=8,
            color="white" if inside else _INK,
        )
    panel.set(xlim=(0, 1), xticks=[0, 0.5, 1])
    panel.set_xticklabels(["0", "half", "all"])
    _finish(panel, rows, f"{tower}: FFN neurons kept", "share of neurons")


def _layer_label(axis: Axis) -> str:
    return f"layer {axis.depth}" + (" cross" if "cross" in axis.name else "")


def _square(x: float, y: float, color: str) -> Any:
    from matplotlib.patches import Rectangle  # lazy: only for pictures

    return Rectangle((x + 0.06, y + 0.1), 0.88, 0.8, color=color, linewidth=0)


def _finish(panel: Axes, rows: Sequence[PlanRow], title: str, label: str) -> None:
    panel.set_title(title, loc="left", fontsize=10, color=_INK)
    panel.set_xlabel(label, fontsize=8, color=_INK)
    panel.set_ylim(len(rows), 0)  # the first layer on top
    panel.set_yticks([place + 0.5 for place in range(len(rows))])
    panel.set_yticklabels([_layer_label(row.axis) for row in rows])
    panel.tick_params(length=0, labelsize=8, colors=_INK)
    for side in ("top", "right", "bottom", "left"):
        panel.spines[side].set_visible(False)


def _groups(axes: Iterable[Axis]) -> list[tuple[tuple[str, str], list[Axis]]]:
    groups: dict[tuple[str, str], list[Axis]] = collections.defaultdict(list)
    for axis in axes:
        groups[axis.tower, axis.kind].append(axis)
    return list(groups.items())
