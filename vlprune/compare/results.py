"""What a comparison found, as values: points, differences, agreement; to CSV and JSON.

No model and no scores in here: names, numbers and plans, enough to draw the page again.
"""

from __future__ import annotations

import csv
import dataclasses
import math
import os
from pathlib import Path
from typing import Any

from vlprune.plan import Plan


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """One cut model, or the dense one.

    Attributes:
        metric: name of the metric, "dense" for the model as it was.
        allocation: how the budget was spread.
        keep: the share that was asked for, of what the comparison's `resource` counts.
        repaired: whether what stays was solved again.
        params, macs: counted on the model that was measured.
        latency: milliseconds of one call over those of the dense model, the two in turns.
        value, low, high: the task's measure, and its 95 % bootstrap interval (NaN if unknown).
        repair_seconds: what repair took.
        plan: digest of the plan, "" for the dense model.
        command: makes this model again.
    """

    metric: str
    allocation: str
    keep: float
    repaired: bool
    params: int
    macs: int
    latency: float
    value: float
    low: float
    high: float
    repair_seconds: float
    plan: str
    command: str

    @property
    def label(self) -> str:
        """Metric, allocation, and whether repaired."""
        return f"{self.metric}, {self.allocation}{' + repair' if self.repaired else ''}"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """A point that could not be made, and why."""

    metric: str
    allocation: str
    keep: float
    reason: str


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Scoring:
    """What scoring by one metric took: seconds, and how many forward passes last as long."""

    metric: str
    seconds: float
    passes: float
    settings: dict[str, Any]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """Measure of one point minus another's at the same budget, examples resampled alike.

    Attributes:
        first, second: places in `Comparison.points`.
        difference: of the measures.
        low, high: its interval; those of all pairs of a budget hold at once with 95 %.
    """

    first: int
    second: int
    difference: float
    low: float
    high: float

    @property
    def is_beyond_noise(self) -> bool:
        """Whether the interval is without zero."""
        return self.low > 0 or self.high < 0


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Agreement:
    """Spearman's rank correlation of two metrics.

    Attributes:
        first, second: the metrics.
        within: the mean over axes, among the units of each; NaN where no axis has three units that
            differ.
        across: among all units, by score per parameter.
    """

    first: str
    second: str
    within: float
    across: float


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """All that `compare` found.

    Attributes:
        model, task: what was compared on.
        resource: what the budgets are shares of, such as "prunable_params".
        keeps: the shares, falling.
        dense: the model as it was.
        points: one per metric, allocation, budget and repair that could be made.
        failures: those that could not.
        scorings: what each metric took.
        differences: of all pairs at equal budget.
        agreements: of all pairs of metrics.
        plans: digest to plan.
        examples: how many were scored on and measured on, where known; "same" says whether the
            two are the same examples.
        made_by: versions, device, threads, seed; JSON values only.
    """

    model: str
    task: str
    resource: str
    keeps: tuple[float, ...]
    dense: Point
    points: tuple[Point, ...]
    failures: tuple[Failure, ...]
    scorings: tuple[Scoring, ...]
    differences: tuple[Difference, ...]
    agreements: tuple[Agreement, ...]
    plans: dict[str, Plan]
    made_by: dict[str, Any]

    @property
    def metrics(self) -> tuple[str, ...]:
        """The metrics, in the order they were asked for."""
        return tuple(scoring.metric for scoring in self.scorings)

    def at(self, keep: float) -> tuple[Point, ...]:
        """Return the points of one budget, the best first."""
        found = [point for point in self.points if point.keep == keep]
        return tuple(sorted(found, key=lambda point: -_rank(point.value)))

    def not_told_apart(self, point: Point) -> tuple[Point, ...]:
        """Return the points at the same budget whose difference to this one is within noise."""
        place = self.points.index(point)
        pairs = [d for d in self.differences if place in (d.first, d.second)]
        others = [d.first + d.second - place for d in pairs if not d.is_beyond_noise]
        return tuple(self.points[other] for other in others)

    def of_dense(self, point: Point) -> float:
        """Return the share of the dense model's measure that a point has."""
        return point.value / self.dense.value if self.dense.value else float("nan")

    def __str__(self) -> str:
        lines = [f"{self.model}, {self.task}: dense {self.dense.value:.2f}"]
        for keep in self.keeps:
            for point in self.at(keep):
                lines.append(
                    f"  keep {keep:<5g} {point.label:<40} {point.value:8.2f} "
                    f"({self.of_dense(point):.1%})  {point.params:,} params  "
                    f"{point.latency:.2f} x the time"
                )
        lines += [
            f"  keep {f.keep:<5g} {f.metric}, {f.allocation}: could not be made: {f.reason}"
            for f in self.failures
        ]
        return "\n".join(lines)


def _rank(value: float) -> float:
    return -math.inf if math.isnan(value) else value


def write_csv(comparison: Comparison, path: str | os.PathLike[str]) -> None:
    """Write the dense model and all points, one a line."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    names = [field.name for field in dataclasses.fields(Point)]
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow([*names, "of_dense"])
        for point in (comparison.dense, *comparison.points):
            values = [getattr(point, name) for name in names]
            writer.writerow([*values, comparison.of_dense(point)])
