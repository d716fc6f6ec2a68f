"""Measuring a latency table: what heads, neurons and layers of a model take on this device.

Blocks of equal shape are measured once. For each shape the whole model is cut to a few widths on
all its axes of that shape alike and timed beside the whole one; the difference, by the number of
axes, is what one axis takes. So everything between the blocks, the backend and the caches are as
they will be. What random cuts of all shapes at once save scales the table at the end: by one factor
for heads and neurons and one for layers.
"""

from __future__ import annotations

import collections
import dataclasses
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from vlprune.anatomy import Anatomy, Axis, under
from vlprune.calls import Inputs
from vlprune.clocks import (
    Backend,
    Clock,
    DeviceClock,
    batch_of,
    device_name,
    device_of,
    kernel_share,
    resized,
)
from vlprune.copies import clone
from vlprune.cutting import cut_
from vlprune.dissect import default_inputs, dissect, fingerprint_of_model
from vlprune.errors import PlanError
from vlprune.latency import latency_ms
from vlprune.plan import Plan, make_plan
from vlprune.ranking import savings
from vlprune.timetable import LatencyRow, LatencyTable

WIDTHS = (0.0, 0.125, 0.25, 0.5, 0.75)  # shares that are measured besides the whole
_MULTIPLES = (1, 2, 4, 8, 16, 32)  # of neurons, that might run fast
_DRAWN = 4  # plans that are measured to scale what is saved
_PENALTY = 0.25  # of a width's own time, from which on it counts as slow

Progress = Callable[[int, int], None]


def profile(
    model: nn.Module,
    example_inputs: Inputs | None = None,
    *,
    anatomy: Anatomy | None = None,
    strategies: tuple[str, ...] = ("head", "ffn", "layer"),
    batch_size: int | None = None,
    backend: Backend = "eager",
    widths: Sequence[float] = WIDTHS,
    rounds: int = 7,
    clock: Clock | None = None,
    progress: Progress | None = None,
) -> LatencyTable:
    """Return what the parts of `model` take on the device that it is on.

    Args:
        model: left as it was; with the threads that torch is set to.
        example_inputs: what is timed; default: made by the family of the model's class.
        anatomy: of the model, to spare a dissection.
        strategies: kinds of axes to measure.
        batch_size: examples in a call; default: as many as there are.
        backend: "eager", "compile" or "onnx" (needs the packages of the extra `onnx`).
        widths: shares of units that are measured besides the whole.
        rounds: turns that every model takes.
        clock: measures instead of a `DeviceClock`.
        progress: called with (done, total), by shapes of blocks.

    Returns:
        The table. Memory: as many models as there are widths. Time: shapes * (widths + 1) *
        rounds calls of the model, and as many compilations or exports.
    """
    if anatomy is None:
        anatomy = dissect(model, example_inputs)
    inputs = default_inputs(model, batch_size or 1) if example_inputs is None else example_inputs
    inputs = resized(inputs, batch_size) if batch_size else inputs
    anatomy = anatomy.select(strategies)
    measure = clock or DeviceClock(backend=backend, rounds=rounds)
    bench = _Bench(model=model, inputs=inputs, anatomy=anatomy, clock=measure)
    groups = list(like_axes(anatomy))
    if progress:
        progress(0, len(groups) + 1)
    found: list[tuple[float, LatencyRow]] = []
    for done, axes in enumerate(groups, start=1):
        found.append(bench.row(axes, widths))
        if progress:
            progress(done, len(groups) + 1)
    dense_ms = sorted(ms for ms, _ in found)[len(found) // 2] if found else bench.dense_ms()
    rows = tuple(_scaled(row, dense_ms / ms) for ms, row in found)
    table = LatencyTable(
        fingerprint=anatomy.fingerprint,
        model=anatomy.model,
        **_place(model, inputs, measure),
        dense_ms=dense_ms,
        rows=rows,
    )
    table = bench.together(table) if rows else table
    table = dataclasses.replace(
        whole_layers(table, anatomy),
        round_to=bench.fast_multiple(table),
        busy=bench.busy(is_own=clock is None),
    )
    if progress:
        progress(len(groups) + 1, len(groups) + 1)
    return table


def _place(model: nn.Module, inputs: Inputs, clock: Clock) -> dict[str, Any]:
    """Where and how a table is measured, as `LatencyTable.place`."""
    parameter = next(model.parameters(), torch.empty(0))
    return {
        "device": device_name(device_of(model)),
        "backend": getattr(clock, "backend", "eager"),
        "dtype": str(parameter.dtype).removeprefix("torch."),
        "batch": batch_of(inputs),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }


def like_axes(anatomy: Anatomy) -> Iterator[list[Axis]]:
    """Yield the axes by shape: of one kind, with as many units of one price."""
    params, macs = savings(anatomy, "params"), savings(anatomy, "macs")
    groups: dict[tuple[object, ...], list[Axis]] = collections.defaultdict(list)
    for axis in anatomy.axes:
        prices = (max(params[axis.name], default=0), max(macs[axis.name], default=0))
        groups[axis.kind, axis.name.rpartition(":")[2], axis.units, axis.least, *prices].append(
            axis
        )
    yield from groups.values()


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class _Bench:
    """One model, cut to widths and timed."""

    model: nn.Module
    inputs: Inputs
    anatomy: Anatomy
    clock: Clock

    def dense_ms(self) -> float:
        return self.clock([self.model], self.inputs)[0]

    def cut(self, axes: Sequence[Axis], units: int) -> nn.Module:
        keep = {axis.name: tuple(range(units)) for axis in axes}
        small = clone(self.model)
        cut_(small, make_plan(self.anatomy, keep).rows)
        return small

    def times(self, axes: Sequence[Axis], counts: Sequence[int]) -> list[float]:
        """Milliseconds of the whole model and of it with so many units on all of `axes`."""
        return self.clock([self.model, *(self.cut(axes, count) for count in counts)], self.inputs)

    def row(self, axes: Sequence[Axis], widths: Sequence[float]) -> tuple[float, LatencyRow]:
        """What the whole model takes, and what one of `axes` adds."""
        first = axes[0]
        names = tuple(axis.name for axis in axes)
        if first.removal != "slice":
            whole, without = self.times(axes, [first.least])
            gone = max((first.units - first.least) * len(axes), 1)
            unit = max(whole - without, 0.0) / gone
            return whole, LatencyRow(kind=first.kind, axes=names, kept=(0, 1), ms=(0.0, unit))
        from scipy.optimize import isotonic_regression  # lazy: spares `import vlprune` 0.4 s

        counts = _counts(first, widths)
        whole, *small = self.times(axes, counts)
        each = [ms / len(axes) for ms in (*small, whole)]
        rising = isotonic_regression(each).x
        ms = tuple(float(value - rising[0]) for value in rising)
        kept = (*counts, first.units)
        return whole, LatencyRow(kind=first.kind, axes=names, kept=kept, ms=ms)

    def together(self, table: LatencyTable) -> LatencyTable:
        """The table with one factor for heads and neurons, and one for layers, that fit at best.

        What random cuts of all shapes at once save is set beside what the table says they save.
        """
        draw = random.Random(0)
        plans = [_drawn_plan(self.anatomy, draw, number % 2 == 1) for number in range(_DRAWN)]
        cuts = []
        for plan in plans:
            cuts.append(clone(self.model))
            cut_(cuts[-1], plan.rows)
        whole, *small = self.clock([self.model, *cuts], self.inputs)
        found = np.array([1.0 - ms / whole for ms in small])
        said = np.array([_saved_parts(table, plan) for plan in plans]) / table.dense_ms
        known = said.any(axis=0)
        factors = np.ones(2)
        factors[known] = np.linalg.lstsq(said[:, known], found, rcond=None)[0]
        sliced, layers = factors.clip(0.5, 2.0).tolist()
        whole_parts = {axis.name for axis in self.anatomy.axes if axis.removal != "slice"}
        rows = [
            _scaled(row, layers if row.axes[0] in whole_parts else sliced) for row in table.rows
        ]
        return dataclasses.replace(table, rows=tuple(rows))

    def fast_multiple(self, table: LatencyTable) -> int:
        """The multiple of neurons from which on no width takes extra time."""
        rows = [row for row in table.rows if row.kind == "ffn"]
        row = max(rows, key=lambda row: row.ms[-1] * len(row.axes), default=None)
        middle = 0 if row is None else row.kept[-1] // 2 // 64 * 64
        if row is None or not middle:
            return 1
        slow = self._slow_widths(row, middle, _MULTIPLES)
        if slow:  # what else the machine does can do so once: what is slow twice is slow
            slow = self._slow_widths(row, middle, slow)
        return 2 * max(slow, default=0) or 1

    def _slow_widths(
        self, row: LatencyRow, middle: int, multiples: Sequence[int]
    ) -> tuple[int, ...]:
        """Those numbers that less than `middle` neurons take more time than `middle` should."""
        axes = [self.anatomy.axis(name) for name in row.axes]
        counts = [middle, *(middle - multiple for multiple in multiples)]
        _, whole, *small = self.times(axes, counts)
        most = whole + _PENALTY * len(axes) * row.at(middle)
        return tuple(m for m, ms in zip(multiples, small, strict=True) if ms > most)

    def busy(self, *, is_own: bool) -> float | None:
        """The share of the time that is the device's work, see `LatencyTable.busy`."""
        if is_own and device_of(self.model).type == "cuda":
            return kernel_share(self.model, self.inputs)
        doubled = resized(self.inputs, 2 * batch_of(self.inputs))
        once = self.dense_ms()
        return max(self.clock([self.model], doubled)[0] / once - 1.0, 0.0)


def _drawn_plan(anatomy: Anatomy, draw: random.Random, layers: bool) -> Plan:
    """A random plan that keeps between a quarter and all units of every axis."""
    keep = {}
    for axis in anatomy.axes:
        if axis.removal == "slice" or layers:
            fewest = max(-(-axis.units // 4), axis.least)
            keep[axis.name] = tuple(range(draw.randint(fewest, axis.units)))
    return make_plan(anatomy, keep)


def _saved_parts(table: LatencyTable, plan: Plan) -> tuple[float, float]:
    """What a plan saves in milliseconds by units of what stays, and by layers that go."""
    parts = {row.axis.name: row.keep for row in plan.rows if row.axis.removal != "slice"}
    without = latency_ms(table, plan.axes, parts)
    return without - latency_ms(table, plan.axes, plan.keep), table.dense_ms - without


def _counts(axis: Axis, widths: Sequence[float]) -> list[int]:
    """Numbers of units to measure: shares of them, to whole eights where there are many.

    One unit less than all is measured, too, where units are few: some classes compute another way
    as soon as any is gone.
    """
    step = 8 if axis.units >= 64 else 1
    counts = {round(share * axis.units / step) * step for share in widths}
    if axis.units < 64:
        counts.add(axis.units - 1)
    return sorted({max(count, axis.least) for count in counts if count < axis.units})


def _scaled(row: LatencyRow, factor: float) -> LatencyRow:
    return dataclasses.replace(row, ms=tuple(ms * factor for ms in row.ms))


def whole_layers(table: LatencyTable, anatomy: Anatomy) -> LatencyTable:
    """Return the table with no layer cheaper than the parts in it, as noise may have made it."""
    parts: dict[str, float] = collections.defaultdict(float)
    sliced = [axis for axis in anatomy.axes if axis.removal == "slice"]
    for axis in anatomy.axes:
        if axis.removal == "slice":
            continue
        for unit in range(axis.units):
            inside = [
                part
                for part in sliced
                if any(under(part.gate.modules[0], scope) for scope in axis.scopes[unit])
            ]
            none = {part.name: tuple(range(part.least)) for part in inside}
            most = table.dense_ms - latency_ms(table, inside, none)
            parts[axis.name] = max(parts[axis.name], most)
    rows = [
        dataclasses.replace(row, ms=(0.0, max([row.ms[1], *(parts[name] for name in row.axes)])))
        if any(name in parts for name in row.axes)
        else row
        for row in table.rows
    ]
    return dataclasses.replace(table, rows=tuple(rows))


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Prediction:
    """What a table says of a cut model, and what was measured beside the whole one.

    Attributes:
        dense_ms: of the whole model, measured in the same run.
        predicted, measured: share of the whole model's time.
    """

    dense_ms: float
    predicted: float
    measured: float

    @property
    def error(self) -> float:
        """By how much of the measured time the prediction is off; positive: too slow."""
        return self.predicted / self.measured - 1.0

    def __str__(self) -> str:
        said, found = self.predicted * self.dense_ms, self.measured * self.dense_ms
        return (
            f"predicted {said:.4g} of {self.dense_ms:.4g} ms ({self.predicted:.1%}), measured "
            f"{found:.4g} ms ({self.measured:.1%}): off by {self.error:+.1%}"
        )


def predicted_beside_measured(
    table: LatencyTable,
    model: nn.Module,
    plan: Plan,
    example_inputs: Inputs | None = None,
    *,
    small: nn.Module | None = None,
    rounds: int = 7,
    clock: Clock | None = None,
) -> Prediction:
    """Return what `table` says of `model` cut by `plan`, beside what it takes here.

    Args:
        table: measured on this model and device, with these threads.
        model: the dense one, left as it was.
        plan: made for it.
        example_inputs: of the table's batch; default: made by the family of the model's class.
        small: the cut model, where there is one already.
        rounds: turns that both models take.
        clock: measures instead of a `DeviceClock`.

    Raises:
        PlanError: if table or plan are of another structure.
        ValueError: if the table was measured elsewhere or in another way.
    """
    fingerprint = fingerprint_of_model(model)
    for what, found in (("latency table", table.fingerprint), ("plan", plan.fingerprint)):
        if found != fingerprint:
            raise PlanError(
                f"{what} must fit the model {type(model).__name__} {fingerprint}; got one made "
                f"for {found}. Make it again on this model."
            )
    inputs = default_inputs(model) if example_inputs is None else example_inputs
    inputs = resized(inputs, table.batch)
    measure = clock or DeviceClock(backend=_known(table.backend), rounds=rounds)
    check_place(table, _place(model, inputs, measure))
    if small is None:
        small = clone(model)
        cut_(small, plan.rows)
    dense_ms, small_ms = measure([model, small], inputs)
    predicted = latency_ms(table, plan.axes, plan.keep) / table.dense_ms
    return Prediction(dense_ms=dense_ms, predicted=predicted, measured=small_ms / dense_ms)


def _known(backend: str) -> Backend:
    found: Backend = backend  # type: ignore[assignment]  # DeviceClock refuses any other
    return found


def check_place(table: LatencyTable, here: Mapping[str, object]) -> None:
    """Raise ValueError unless `table` was measured here, in this way."""
    faults = [
        f"{name} {value!r}, here it is {here[name]!r}"
        for name, value in table.place.items()
        if here[name] != value
    ]
    if faults:
        raise ValueError(
            f"latency table must be of this device and these settings; it was measured with "
            f"{'; '.join(faults)}. Measure it again here with vlprune.profile."
        )
