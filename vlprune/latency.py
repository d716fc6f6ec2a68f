"""What a plan takes by a latency table, as arithmetic over axes; no model is needed.

The time of a cut model is that of the whole one less what its parts no longer take. Parts add up,
with two exceptions: what lies in a removed layer goes with it and counts once, and axes of one
attention (its heads and their dimensions) multiply.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Iterable, Mapping

from vlprune.anatomy import Anatomy, Axis, under
from vlprune.errors import BudgetError, PlanError
from vlprune.timetable import LatencyRow, LatencyTable

Keep = Mapping[str, tuple[int, ...]]

HOW_TO_MEASURE = (
    "Measure one on the device that will run the model: table = vlprune.profile(model, "
    "example_inputs), then vlprune.plan(..., latency=table); or `vlprune profile MODEL --out "
    "table.json`, then `--latency table.json`."
)


def with_latency(anatomy: Anatomy, table: LatencyTable) -> Anatomy:
    """Return `anatomy` with the table that its plans are priced by.

    Raises:
        PlanError: if the table was measured on a model of another structure, or lacks an axis.
    """
    if table.fingerprint != anatomy.fingerprint:
        raise PlanError(
            f"latency table must fit the anatomy of {anatomy.model} {anatomy.fingerprint}; got "
            f"one of {table.model} {table.fingerprint}. {HOW_TO_MEASURE}"
        )
    known = table.by_axis
    missing = [axis for axis in anatomy.axes if axis.name not in known]
    if missing:
        kinds = ", ".join(repr(kind) for kind in sorted({axis.kind for axis in missing}))
        raise PlanError(
            f"latency table must have times for every axis; {len(missing)} have none, such as "
            f"{missing[0].name!r}. Measure them: vlprune.profile(..., strategies=({kinds}, ...))."
        )
    return dataclasses.replace(anatomy, latency=table)


def table_of(anatomy: Anatomy) -> LatencyTable:
    """Return the table that an anatomy is priced by.

    Raises:
        BudgetError: if there is none; says how to make one.
    """
    if anatomy.latency is None:
        raise BudgetError(f"budget 'latency' must come with a latency table. {HOW_TO_MEASURE}")
    return anatomy.latency


def latency_ms(table: LatencyTable, axes: Iterable[Axis], keep: Keep) -> float:
    """Return the milliseconds of the whole model when only `keep` stays on the axes it names.

    Args:
        table: of the model.
        axes: that may lose units; those of a plan are enough.
        keep: axis name to units that stay.

    Raises:
        PlanError: if an axis that loses units has no times.
    """
    cut = [axis for axis in axes if len(keep.get(axis.name, range(axis.units))) < axis.units]
    rows = table.by_axis
    missing = [axis.name for axis in cut if axis.name not in rows]
    if missing:
        raise PlanError(
            f"latency table must have times for every axis; it has none for {missing[0]!r}. "
            "Measure them: vlprune.profile(..., strategies=...)."
        )
    gone = [
        (axis.name, scope)
        for axis in cut
        if axis.removal != "slice"
        for unit in _removed(axis, keep)
        for scope in axis.scopes[unit]
    ]
    saved = 0.0
    places: dict[str, list[tuple[float, float]]] = collections.defaultdict(list)
    for axis in cut:
        row = rows[axis.name]
        if axis.removal == "slice":
            if not _is_gone(axis, 0, gone):
                places[axis.path].append(_whole_and_saved(row, axis.units, len(keep[axis.name])))
        else:
            counted = [u for u in _removed(axis, keep) if not _is_gone(axis, u, gone)]
            saved += (row.at(1) - row.at(0)) * len(counted)
    return max(table.dense_ms - saved - sum(map(_together, places.values())), 0.0)


def _removed(axis: Axis, keep: Keep) -> list[int]:
    kept = set(keep[axis.name])
    return [unit for unit in range(axis.units) if unit not in kept]


def _is_gone(axis: Axis, unit: int, gone: list[tuple[str, str]]) -> bool:
    """Say whether a unit lies in what vanishes with a unit of another axis."""
    place = axis.gate.modules[unit if axis.removal != "slice" else 0]
    return any(owner != axis.name and under(place, scope) for owner, scope in gone)


def _whole_and_saved(row: LatencyRow, units: int, kept: int) -> tuple[float, float]:
    now = row.at(units)
    return now - row.ms[0], now - row.at(kept)


def _together(parts: list[tuple[float, float]]) -> float:
    """What axes of one module save together, each (all that it could save, what it saves)."""
    whole = max(most for most, _ in parts)
    stays = 1.0
    for _, saved in parts:
        stays *= 1.0 - saved / whole if whole else 1.0
    return whole * (1.0 - stays)
