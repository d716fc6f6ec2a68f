"""How a class computes with fewer units: found by trial on one region, proven before it is offered.

A coupling says which rows go. Whether the code around still computes then, which integer attributes
must follow, and which class must be taken on, is tried out on a replica of the region: masked and
cut replica must agree in float64, for several plans. What no trial makes agree is left whole, and
the reason of the nearest trial is told.
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import nn

from vlprune.anatomy import Axis, Gate, Knob, Swap
from vlprune.calls import Call, run
from vlprune.classes.calling import calling_name
from vlprune.classes.narrow import WIDTH, narrow_names
from vlprune.classes.padded import PADDED
from vlprune.classes.picking import KEPT, picking_name
from vlprune.copies import shared_copy
from vlprune.cutting import LAYER_INDICES, cut_
from vlprune.discovery.probe import Coupling
from vlprune.gates import Gates
from vlprune.law import relative_error_of_outputs
from vlprune.plan import PlanRow

TOLERANCE = 1e-9
_MOST_TRIALS = 96
_MOST_SECONDS = 30.0


def fit(
    region: nn.Module,
    call: Call,
    coupling: Coupling,
    holder: str,
    swaps: tuple[Swap, ...] = (),
    lists: tuple[Knob, ...] = (),
) -> Axis | str:
    """Return the units of `coupling` as an axis that can be cut, or why they cannot.

    Args:
        region: a real float64 replica.
        call: how it is called.
        coupling: what its probe found.
        holder: the module that the axis is named after.
        swaps: classes to take on that are known beforehand.
        lists: attributes of those classes that follow for certain.

    Returns:
        The axis, all names relative to the region; tower and depth are left open.
    """
    reason = ""
    plain = axis_of(coupling, holder, swaps)
    picks = _picks(region, coupling)
    deadline = time.monotonic() + _MOST_SECONDS
    for axis, fixed in _widths(region, coupling, plain, lists):
        if picks:
            axis = dataclasses.replace(axis, swaps=(*axis.swaps, *picks))
            fixed = (*fixed, Knob(module="", attribute=KEPT, counts="kept"))
        bench = Bench(region, call, axis)
        for knobs in itertools.islice(_candidates(region, coupling), _MOST_TRIALS):
            fault = bench.fault((*fixed, *knobs))
            if not fault:
                knobs = _complete(bench, (*fixed, *knobs), _attributes(region, coupling)[0])
                return _with_least(bench, dataclasses.replace(axis, knobs=knobs))
            reason = reason or fault
            if time.monotonic() > deadline:
                return f"{reason} (and nothing else that was tried in {_MOST_SECONDS:g} s)"
    padded = fit_padded(region, call, plain)
    return reason if padded is None else padded


def fit_padded(region: nn.Module, call: Call, axis: Axis) -> Axis | None:
    """Return the axis cut from its linear layers alone, if it can be; see `padded_axis`."""
    padded = padded_axis(region, axis)
    if padded is None or padded.swaps == axis.swaps:
        return None
    padded = dataclasses.replace(padded, least=0)  # of its own, found next
    bench = Bench(region, call, padded)
    return None if bench.fault(()) else _with_least(bench, padded)


def _picks(region: nn.Module, coupling: Coupling) -> tuple[Swap, ...]:
    """The class of a region that picks its units from what it is given for all of them."""
    if len(coupling.inputs) != 1:
        return ()
    name = picking_name(type(region), *coupling.inputs[0])
    return (Swap(module="", to=name, when="cut"),) if name else ()


def fit_any(region: nn.Module, call: Call, axes: Iterable[Axis]) -> Axis | str:
    """Return the first of `axes` (knobs, swaps, least) that can be cut; or why none can."""
    reason = ""
    for axis in axes:
        bench = Bench(region, call, axis)
        fault = bench.fault(axis.knobs)
        if not fault:
            return axis
        reason = reason or fault
    return reason


def fit_together(region: nn.Module, call: Call, axes: Sequence[Axis]) -> str:
    """Return why `axes` cannot all lose units at once, another number on each; "" if they can."""
    keeps = {a.name: tuple(range(min(1 + i, a.units - 1), a.units)) for i, a in enumerate(axes)}
    with torch.no_grad(), Gates(region, axes) as gates:
        gates.keep(keeps)
        expected = run(region, _again(call))
    rows = [PlanRow(axis=axis, keep=keeps[axis.name]) for axis in axes]
    return _fault_of_cut(region, call, rows, expected)


def _fault_of_cut(region: nn.Module, call: Call, rows: Sequence[PlanRow], expected: Any) -> str:
    """Why a region cut by `rows` does not answer what is expected; "" where it does."""
    cut = shared_copy(region)
    try:
        with torch.no_grad():
            cut_(cut, rows)
            got = run(cut, _again(call))
    except Exception as error:
        said = str(error).partition("\n")[0]
        return f"{type(error).__name__}: {said}"
    error_size = relative_error_of_outputs(expected, got)
    return "" if error_size <= TOLERANCE else f"masked and cut differ by {error_size:.2g}"


def _with_least(bench: Bench, axis: Axis) -> Axis:
    return dataclasses.replace(axis, least=1 if bench.fault(axis.knobs, [()]) else 0)


def _complete(bench: Bench, knobs: tuple[Knob, ...], counts: Sequence[Knob]) -> tuple[Knob, ...]:
    """Add every count of heads that may follow too: none stays stale."""
    for knob in counts:
        free = knob not in knobs and _counts_heads(knob.attribute)
        if free and not bench.fault((*knobs, knob)):
            knobs = (*knobs, knob)
    return knobs


def _widths(
    region: nn.Module, coupling: Coupling, axis: Axis, lists: tuple[Knob, ...]
) -> Iterator[tuple[Axis, tuple[Knob, ...]]]:
    """The axis as it is, then with classes that take their width from an attribute."""
    yield axis, lists
    if axis.swaps or (not coupling.attends and coupling.block == 1):
        return
    holder = common_path(coupling)
    for path, module in region.get_submodule(holder).named_modules(prefix=holder):
        for name in narrow_names(type(module)):
            width = Knob(module=path, attribute=WIDTH, per_unit=coupling.block)
            swap = Swap(module=path, to=name, when="cut")
            yield dataclasses.replace(axis, swaps=(swap,)), (*lists, width)


def padded_axis(region: nn.Module, axis: Axis) -> Axis | None:
    """The axis cut from its linear layers alone, all around them at full width; None without any.

    See `classes/padded.py`.
    """
    owners = {site.tensor.rpartition(".")[0] for site in axis.sites}
    matrices = {p for p in owners if type(region.get_submodule(p)).forward is nn.Linear.forward}
    if not matrices:
        return None
    sites = tuple(site for site in axis.sites if site.tensor.rpartition(".")[0] in matrices)
    gates = [swap for swap in axis.swaps if swap.when == "gate"]
    users = {path.rpartition(".")[0] for path in matrices}
    calling = {path: calling_name(type(region.get_submodule(path))) for path in sorted(users)}
    swaps = (
        *gates,
        *(Swap(module=path, to=PADDED, when="cut") for path in sorted(matrices)),
        *(Swap(module=path, to=name, when="cut") for path, name in calling.items() if name),
    )
    gate = dataclasses.replace(axis.gate, norms=())
    return dataclasses.replace(axis, sites=sites, swaps=swaps, gate=gate, knobs=(), scopes=())


class Bench:
    """Cuts copies of a region and compares them with the masked region."""

    def __init__(self, region: nn.Module, call: Call, axis: Axis):
        self._region = region
        self._call = call
        self._axis = axis
        units = axis.units
        draw = torch.Generator().manual_seed(3)
        some = torch.randperm(units, generator=draw)[: max(units // 2, 1)]
        keeps = [tuple(range(1, units)), tuple(sorted(some.tolist())), (units - 1,)]
        self.keeps = list(dict.fromkeys(keeps))
        self._expected: dict[tuple[int, ...], Any] = {}

    def fault(self, knobs: tuple[Knob, ...], keeps: Sequence[tuple[int, ...]] = ()) -> str:
        """Why a region cut with `knobs` is not the masked one; "" where it is."""
        axis = dataclasses.replace(self._axis, knobs=knobs)
        for keep in keeps or self.keeps:
            rows = [PlanRow(axis=axis, keep=keep)]
            try:
                expected = self._masked(keep)
            except RuntimeError as error:  # a gate that does not fit what it multiplies
                said = str(error).partition("\n")[0]
                return f"masked, it raises {type(error).__name__}: {said}"
            fault = _fault_of_cut(self._region, self._call, rows, expected)
            if fault:
                return fault
        return ""

    def _masked(self, keep: tuple[int, ...]) -> Any:
        if keep not in self._expected:
            with torch.no_grad(), Gates(self._region, [self._axis]) as gates:
                gates.keep({self._axis.name: keep})
                self._expected[keep] = run(self._region, _again(self._call))
        return self._expected[keep]


def _again(call: Call) -> Call:
    """The call with mutable arguments (caches) fresh."""
    tensors = {id(t): t for t in (*call.args, *call.kwargs.values()) if isinstance(t, torch.Tensor)}
    return Call(
        copy.deepcopy(call.args, dict(tensors)), copy.deepcopy(dict(call.kwargs), dict(tensors))
    )


def axis_of(coupling: Coupling, holder: str, swaps: tuple[Swap, ...] = ()) -> Axis:
    """Return the coupling as an axis with names relative to its region."""
    return Axis(
        name=f"{holder}:{coupling.kind}",
        kind=coupling.kind,
        tower="",
        depth=0,
        units=coupling.units,
        removal="slice",
        gate=Gate(
            kind="input",
            modules=(coupling.consumer, *coupling.others),
            block=coupling.block,
            dim=coupling.dim,
            norms=coupling.norms,
        ),
        sites=coupling.sites,
        swaps=swaps,
        scopes=((holder,),) if coupling.kind == "head" else (),
    )


def common_path(coupling: Coupling) -> str:
    """Return the path of the innermost module that holds all sites, relative to the region."""
    owners = [site.tensor.split(".")[:-1] for site in coupling.sites]
    steps = zip(*owners, strict=False)
    shared = itertools.takewhile(lambda names: len(set(names)) == 1, steps)
    path = ".".join(names[0] for names in shared)
    return path


def _candidates(region: nn.Module, coupling: Coupling) -> Iterator[tuple[Knob, ...]]:
    """Sets of knobs, the most plausible first: what counts heads follows, widths where needed."""
    counts, widths = _attributes(region, coupling)
    if coupling.block == 1 and not coupling.attends:
        counts, widths = [], [*counts, *widths]
    named = [knob for knob in counts if "head" in knob.attribute or "group" in knob.attribute]
    bases = list(dict.fromkeys([tuple(counts), tuple(named), ()]))
    for size in range(len(widths) + 1):
        for base in bases:
            for chosen in itertools.combinations(widths, size):
                yield (*base, *chosen)
    for size in range(1, len(counts)):
        yield from itertools.combinations(counts, size)


def _attributes(region: nn.Module, coupling: Coupling) -> tuple[list[Knob], list[Knob]]:
    """Integer attributes around the coupling that may count its units, and its rows."""
    holder = common_path(coupling)
    units = coupling.units
    rows = _row_counts(coupling)
    sharing = units * coupling.block // min(site.block for site in coupling.sites)
    counts: list[Knob] = []
    widths: list[Knob] = []
    for path, module in region.get_submodule(holder).named_modules(prefix=holder):
        if type(module).__module__.startswith("torch.nn.modules") and not isinstance(
            module, nn.MultiheadAttention
        ):
            continue  # the cut itself keeps their sizes
        for attribute, value in vars(module).items():
            for place, entry in _entries(value):
                knob = Knob(
                    module=path, attribute=f"{attribute}[{place}]", per_unit=max(entry // units, 1)
                )
                if entry == units:
                    counts.append(knob)
                elif entry in rows:
                    widths.append(knob)
            plain = isinstance(value, int) and not isinstance(value, bool)
            if not plain or attribute in LAYER_INDICES or value < units or value % units:
                continue
            knob = Knob(module=path, attribute=attribute, per_unit=value // units)
            if value in rows:
                widths.append(knob)
            elif _counts_heads(attribute) or value in (units, sharing):
                counts.append(knob)
    return counts, widths


def _entries(value: Any) -> Iterator[tuple[int, int]]:
    """(place, number) of the entries of a row of sizes."""
    if isinstance(value, (tuple, list)) and len(value) > 1:
        yield from ((i, v) for i, v in enumerate(value) if type(v) is int)


def _counts_heads(attribute: str) -> bool:
    return "head" in attribute and not any(word in attribute for word in ("dim", "size", "width"))


def _row_counts(coupling: Coupling) -> set[int]:
    """Numbers of rows that the units take in any tensor, alone or all together."""
    by_tensor: dict[tuple[str, int], int] = {}
    for site in coupling.sites:
        key = (site.tensor, site.dim)
        by_tensor[key] = by_tensor.get(key, 0) + site.block * coupling.units
    blocks = {site.block * coupling.units for site in coupling.sites}
    return {
        size
        for size in (*by_tensor.values(), *blocks)
        if size > coupling.units or coupling.block == 1
    }
