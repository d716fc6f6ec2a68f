"""Scores and plans: what every unit is worth, and which units stay.

Values that print and go to JSON. Who makes them: `metrics/` and `allocation/`. Who interprets
them: `gates.py` (masked) and `pruner.py` (cut), which must agree.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import functools
import hashlib
import importlib.metadata
import json
import math
import operator
from collections.abc import Mapping
from typing import Any

from vlprune.anatomy import Anatomy, Axis
from vlprune.errors import PlanError


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """Parameters and multiply-accumulates (of one call on the example inputs).

    `latency_ms` is what a latency table says of one call, None where there is no table.
    """

    params: int
    macs: int
    latency_ms: float | None = None

    def __str__(self) -> str:
        timed = "" if self.latency_ms is None else f" and {self.latency_ms:.4g} ms"
        return f"{self.params:,} params and {self.macs:,} macs{timed}"

    def shares_of(self, dense: Cost) -> dict[str, str]:
        """Return every number that both have in words, with its share of the dense one."""
        found = {}
        for field in dataclasses.fields(self):
            part, whole = getattr(self, field.name), getattr(dense, field.name)
            if part is not None and whole is not None:
                name = "latency" if field.name == "latency_ms" else field.name
                found[name] = _share(part, whole)
        return found


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Scores:
    """What every unit of every axis is worth: higher = keep.

    Attributes:
        anatomy: the axes that were scored, with the shapes to price any plan.
        values: axis name to one finite float per unit.
        metric: name of the metric.
        settings: how it was run, JSON values only (seed, examples, options).
        intervals: axis name to (low, high) per unit, 95 %, for metrics that know how sure they
            are; else empty.
    """

    anatomy: Anatomy
    values: dict[str, tuple[float, ...]]
    metric: str
    settings: dict[str, Any] = dataclasses.field(default_factory=dict)
    intervals: dict[str, tuple[tuple[float, float], ...]] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        faults = [_score_fault(axis, self.values.get(axis.name)) for axis in self.anatomy.axes]
        faults += [
            f"axis {name!r} has scores but is not in the anatomy"
            for name in sorted(set(self.values) - {axis.name for axis in self.anatomy.axes})
        ]
        found = [fault for fault in faults if fault]
        if found:
            raise PlanError(
                f"scores of {self.metric!r} must hold one finite number per unit; "
                + "; ".join(found)
                + ". Look for NaN in the loss, or score again on this model."
            )

    def __str__(self) -> str:
        lines = [f"scores of {self.metric!r} on {self.anatomy.model}"]
        for axis in self.anatomy.axes:
            row = self.values[axis.name]
            lines.append(
                f"  {axis.name:<56} {axis.units:>5} units  "
                f"min {min(row):.3g}  mean {sum(row) / len(row):.3g}  max {max(row):.3g}"
            )
        if self.intervals:
            apart, units = self.apart_from_zero()
            lines.append(f"  {apart:,} of {units:,} units are told apart from zero (95 %)")
        return "\n".join(lines)

    def apart_from_zero(self) -> tuple[int, int]:
        """Return how many units have an interval without zero, of how many that have one."""
        rows = [interval for row in self.intervals.values() for interval in row]
        return sum(low > 0 or high < 0 for low, high in rows), len(rows)


def _score_fault(axis: Axis, row: tuple[float, ...] | None) -> str:
    if row is None:
        return f"axis {axis.name!r} has no scores"
    if len(row) != axis.units:
        return f"axis {axis.name!r} has {len(row)} scores for {axis.units} units"
    bad = sum(not math.isfinite(value) for value in row)
    return f"axis {axis.name!r} has {bad} scores that are NaN or infinite" if bad else ""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class PlanRow:
    """One axis of a plan and which of its units stay, in rising order."""

    axis: Axis
    keep: tuple[int, ...]

    def __post_init__(self) -> None:
        fault = _keep_fault(self.axis, self.axis.name, self.keep)
        if not fault and list(self.keep) != sorted(self.keep):
            fault = f"axis {self.axis.name!r}: kept units must rise, got {self.keep[:8]}"
        if fault:
            raise PlanError(f"{fault}. A plan fits one anatomy; make it with vlprune.plan.")

    @property
    def removed(self) -> tuple[int, ...]:
        """The units that go."""
        kept = set(self.keep)
        return tuple(unit for unit in range(self.axis.units) if unit not in kept)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Which units stay, and who decided it. Axes without a row stay whole.

    A plan holds its axes, sites included, so that it can be applied without another dissection.

    Attributes:
        fingerprint: of the anatomy that it fits, see `Anatomy.fingerprint`.
        rows: one per axis that it decides on.
        asked: the budget as given, for instance {"params": 0.5}.
        dense, planned: cost of the whole model before and after, counted from the anatomy.
        made_by: metric, strategy, allocation, seed, versions; JSON values only.
    """

    fingerprint: str
    rows: tuple[PlanRow, ...]
    asked: dict[str, float] = dataclasses.field(default_factory=dict)
    dense: Cost | None = None
    planned: Cost | None = None
    made_by: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def axes(self) -> tuple[Axis, ...]:
        """The axes that it decides on."""
        return tuple(row.axis for row in self.rows)

    @property
    def keep(self) -> dict[str, tuple[int, ...]]:
        """Axis name to kept units."""
        return {row.axis.name: row.keep for row in self.rows}

    @property
    def digest(self) -> str:
        """A short hash of what is kept: equal for plans that cut alike."""
        rows = sorted((row.axis.name, row.axis.units, row.keep) for row in self.rows)
        return hashlib.sha256(json.dumps([self.fingerprint, rows]).encode()).hexdigest()[:16]

    def __str__(self) -> str:
        lines = [f"plan {self.digest} ({_signature(self.made_by)})"]
        if self.asked:
            asked = ", ".join(f"{key} {show_limit(value)}" for key, value in self.asked.items())
            lines.append(f"  asked    keep {asked}")
        if self.dense and self.planned:
            shares = self.planned.shares_of(self.dense)
            lines.append("  planned  " + ", ".join(f"{k} {share}" for k, share in shares.items()))
        return "\n".join(lines + _density_lines(self.rows))


def show_limit(value: float) -> str:
    """A budget's share as it is, its count with commas, milliseconds with their fraction."""
    return f"{value:g}" if value <= 1 or value % 1 else f"{value:,.0f}"


def _signature(made_by: Mapping[str, Any]) -> str:
    parts = [str(made_by[key]) for key in ("metric", "allocation") if key in made_by]
    return ", ".join(parts) or "by hand"


def _share(part: float, whole: float) -> str:
    now, before = (
        f"{value:,}" if isinstance(value, int) else f"{value:.4g} ms" for value in (part, whole)
    )
    return f"{now} of {before} ({part / whole:.1%})" if whole else now


def _density_lines(rows: tuple[PlanRow, ...]) -> list[str]:
    """One line per tower and kind: kept units of every axis, in order of depth."""
    groups: dict[tuple[str, str], list[PlanRow]] = collections.defaultdict(list)
    for row in rows:
        groups[row.axis.tower, row.axis.kind].append(row)
    lines = []
    for (tower, kind), members in groups.items():
        kept, units = sum(len(r.keep) for r in members), sum(r.axis.units for r in members)
        sizes = sorted({r.axis.units for r in members})
        each = str(sizes[0]) if len(sizes) == 1 else f"{sizes[0]}..{sizes[-1]}"
        counts = " ".join(str(len(r.keep)) for r in members)
        lines.append(
            f"  {tower:<8} {kind:<9} {kept}/{units} ({kept / units:.0%})  of {each} each: {counts}"
        )
    return lines


def make_plan(
    anatomy: Anatomy,
    keep: Mapping[str, tuple[int, ...]],
    *,
    asked: Mapping[str, float] | None = None,
    dense: Cost | None = None,
    planned: Cost | None = None,
    made_by: Mapping[str, Any] | None = None,
) -> Plan:
    """Return a checked plan for `anatomy` that keeps `keep` (axis name to unit indices).

    Raises:
        PlanError: naming every axis that is unknown or whose units are out of range or repeated.
    """
    axes = {axis.name: axis for axis in anatomy.axes}
    keep = {name: _whole_units(units) for name, units in keep.items()}
    faults = [_keep_fault(axes.get(name), name, units) for name, units in keep.items()]
    found = [fault for fault in faults if fault]
    if found:
        raise PlanError("; ".join(found) + ". A plan fits one anatomy; make it with vlprune.plan.")
    rows = tuple(
        PlanRow(axis=axis, keep=tuple(sorted(keep[axis.name])))
        for axis in anatomy.axes
        if axis.name in keep
    )
    return Plan(
        fingerprint=anatomy.fingerprint,
        rows=rows,
        asked=dict(asked or {}),
        dense=dense,
        planned=planned,
        made_by={**(made_by or {}), "versions": versions()},
    )


def _whole_units(units: tuple[Any, ...]) -> tuple[int, ...]:
    if all(type(unit) is int for unit in units):
        return tuple(units)
    return tuple(map(_whole, units))


def _whole(unit: Any) -> int:
    """The unit as a plain int; numpy's and torch's integers are fine, fractions are not."""
    is_mask = "bool" in str(getattr(unit, "dtype", type(unit).__name__))  # torch indexes by it
    with contextlib.suppress(TypeError):
        if not is_mask:
            return operator.index(unit)
    raise PlanError(f"units must be whole numbers; got {unit!r}.")


def _keep_fault(axis: Axis | None, name: str, units: tuple[int, ...]) -> str:
    if axis is None:
        return f"axis {name!r}: must be in the anatomy; it is not"
    valid = len(set(units)) == len(units) and all(0 <= u < axis.units for u in units)
    if valid and len(units) >= axis.least:
        return ""
    if valid:
        counts = f"at least {axis.least} of its {axis.units} units must stay, got {len(units)}"
        return f"axis {name!r}: {counts}"
    shown = str(tuple(units)) if len(units) <= 8 else f"{len(units)} units"
    return f"axis {name!r}: keep must hold distinct units in [0, {axis.units}), got {shown}"


@functools.cache
def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def versions() -> dict[str, str]:
    """Return the versions of vlprune and of what it cuts with."""
    return {package: _version(package) for package in ("vlprune", "torch", "torch-pruning")}
