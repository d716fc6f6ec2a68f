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
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

from vlprune.anatomy import Axis, Gate, Knob, Site, Swap
from vlprune.calls import Call, run
from vlprune.classes.narrow import WIDTH, narrow_names
from vlprune.copies import shared_copy
from vlprune.cutting import LAYER_INDICES, cut_
from vlprune.discovery.probe import Coupling
from vlprune.gates import Gates
from vlprune.law import relative_error_of_outputs
from vlprune.plan import PlanRow

TOLERANCE = 1e-9
_MOST_TRIALS = 96
_MOST_SECONDS = 30.0


@dataclasses.dataclass(frozen=True, slots=True)
class Fit:
    """What must follow when units of a coupling go: knobs and swaps, and how few may stay."""

    knobs: tuple[Knob, ...]
    swaps: tuple[Swap, ...]
    least: int


def fit(
    region: nn.Module,
    call: Call,
    coupling: Coupling,
    swaps: tuple[Swap, ...] = (),
    lists: tuple[Knob, ...] = (),
) -> Fit | str:
    """Return how the units of `coupling` can be cut from `region`, or why they cannot.

    Args:
        region: a real float64 replica.
        call: how it is called.
        coupling: what its probe found.
        swaps: classes to take on that are known beforehand.
        lists: attributes of those classes that follow for certain.
    """
    reason = ""
    deadline = time.monotonic() + _MOST_SECONDS
    for taken_on in (swaps, *(() if swaps else _narrowings(region, coupling))):
        bench = _Bench(region, call, coupling, taken_on)
        width = tuple(
            Knob(module=swap.module, attribute=WIDTH, per_unit=coupling.block)
            for swap in taken_on
            if swap not in swaps
        )
        fixed = (*lists, *width)
        for knobs in itertools.islice(_candidates(region, coupling), _MOST_TRIALS):
            fault = bench.fault((*fixed, *knobs))
            if not fault:
                knobs = _complete(bench, (*fixed, *knobs), _attributes(region, coupling)[0])
                least = 1 if bench.fault(knobs, [()]) else 0
                return Fit(knobs, taken_on, least)
            reason = reason or fault
            if time.monotonic() > deadline:
                return f"{reason} (and nothing else that was tried in {_MOST_SECONDS:g} s)"
    return reason


def _complete(bench: _Bench, knobs: tuple[Knob, ...], counts: Sequence[Knob]) -> tuple[Knob, ...]:
    """Add every count of heads that may follow too: none stays stale."""
    for knob in counts:
        free = knob not in knobs and _counts_heads(knob.attribute)
        if free and not bench.fault((*knobs, knob)):
            knobs = (*knobs, knob)
    return knobs


def _narrowings(region: nn.Module, coupling: Coupling) -> Iterator[tuple[Swap, ...]]:
    """Classes that take their width from an attribute, for the modules that hold the units."""
    if not coupling.attends and coupling.block == 1:
        return
    holder = common_path(coupling)
    for path, module in region.get_submodule(holder).named_modules(prefix=holder):
        for name in narrow_names(type(module)):
            yield (Swap(module=path, to=name, when="cut"),)


class _Bench:
    """Cuts copies of a region and compares them with the masked region."""

    def __init__(self, region: nn.Module, call: Call, coupling: Coupling, swaps: tuple[Swap, ...]):
        self._region = region
        self._call = call
        self._axis = axis_of(coupling, "unit", Fit((), swaps, 0))
        units = coupling.units
        some = tuple(
            sorted(
                torch.randperm(units, generator=torch.Generator().manual_seed(3))[
                    : max(units // 2, 1)
                ].tolist()
            )
        )
        self.keeps = list(dict.fromkeys([tuple(range(1, units)), some, (units - 1,)]))
        self._expected: dict[tuple[int, ...], Any] = {}

    def fault(self, knobs: tuple[Knob, ...], keeps: Sequence[tuple[int, ...]] = ()) -> str:
        """Why a region cut with `knobs` is not the masked one; "" where it is."""
        for keep in keeps or self.keeps:
            cut = shared_copy(self._region)
            axis = dataclasses.replace(self._axis, knobs=knobs)
            try:
                with torch.no_grad():
                    cut_(cut, [PlanRow(axis=axis, keep=keep)])
                    got = run(cut, _again(self._call))
            except Exception as error:
                said = str(error).partition("\n")[0]
                return f"{type(error).__name__}: {said}"
            error_size = relative_error_of_outputs(self._masked(keep), got)
            if not error_size <= TOLERANCE:
                return f"masked and cut differ by {error_size:.2g}"
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


def axis_of(coupling: Coupling, name: str, fit: Fit) -> Axis:
    """Return the coupling as an axis with names relative to its region."""
    return Axis(
        name=name,
        kind="head" if coupling.attends or coupling.block > 1 else "ffn",
        tower="",
        depth=0,
        units=coupling.units,
        removal="slice",
        gate=Gate(
            kind="input",
            modules=(coupling.consumer,),
            block=coupling.block,
            dim=coupling.dim,
            norms=coupling.norms,
        ),
        sites=coupling.sites,
        knobs=fit.knobs,
        swaps=fit.swaps,
        least=fit.least,
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
    counts: list[Knob] = []
    widths: list[Knob] = []
    for path, module in region.get_submodule(holder).named_modules(prefix=holder):
        if type(module).__module__.startswith("torch.nn.modules") and not isinstance(
            module, nn.MultiheadAttention
        ):
            continue  # the cut itself keeps their sizes
        for attribute, value in vars(module).items():
            if isinstance(value, tuple) and len(value) > 1 and value[-1] == units:
                counts.append(Knob(module=path, attribute=f"{attribute}[{len(value) - 1}]"))
            plain = isinstance(value, int) and not isinstance(value, bool)
            if not plain or attribute in LAYER_INDICES or value < units or value % units:
                continue
            knob = Knob(module=path, attribute=attribute, per_unit=value // units)
            if value in rows:
                widths.append(knob)
            elif _counts_heads(attribute) or value == units:
                counts.append(knob)
    return counts, widths


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


def sites_under(sites: Sequence[Site], path: str) -> list[Site]:
    """Return those sites whose tensor lies in the module at `path`."""
    return [site for site in sites if site.tensor.startswith(f"{path}." if path else "")]
