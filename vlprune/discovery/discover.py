"""What can be taken out of a model, found and proven region by region.

Every region (a block, or an attention pool outside of all blocks) is probed once per signature:
which rows are which unit (`probe.py`), and how the code around holds fewer of them (`fit.py`). What
was proven on one region is offered for all of its make. Stacks are lists of blocks that hand on
what they were given: each may go.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from torch import nn

from vlprune.anatomy import Axis, Knob, Refusal, Swap, under
from vlprune.calls import Call, all_float64
from vlprune.discovery.dims import dims_of
from vlprune.discovery.experts import experts_of
from vlprune.discovery.fit import common_path, fit, fit_padded
from vlprune.discovery.probe import Coupling, couplings
from vlprune.discovery.regions import (
    Region,
    Visit,
    observe,
    real_call,
    regions_of,
    replica,
    short_call,
)
from vlprune.errors import TraceError
from vlprune.faults import devices_of
from vlprune.layout import AttentionLayout, resolve


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Units:
    """A row of units that was proven to be cuttable: an axis, names relative to its region.

    Attributes:
        region: path of the region, "" for the model itself.
        axis: with tower and depth left open.
        fallback: the same units cut from linear layers alone, all around them at full width, where
            that was proven, too: what others outside of the region count on stays.
    """

    region: str
    axis: Axis
    fallback: Axis | None = None

    @property
    def kind(self) -> str:
        """The strategy that they belong to."""
        return self.axis.kind


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Stack:
    """A list of blocks that can be skipped one by one.

    Attributes:
        path: the ModuleList or Sequential.
        indices: its blocks that hand on the shape they were given.
        argument, keyword: where they take it among the arguments: position, or name.
    """

    path: str
    indices: tuple[int, ...]
    argument: int | None
    keyword: str


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Discovery:
    """All that was found in a model; `seconds` is how long it takes to run."""

    units: tuple[Units, ...]
    stacks: tuple[Stack, ...]
    refusals: tuple[Refusal, ...]
    seconds: float


def discover(
    model: nn.Module,
    calls: Sequence[Call],
    layouts: Mapping[str, AttentionLayout],
    blocks: Collection[str] = (),
) -> Discovery:
    """Return what can be taken out of `model`.

    Args:
        model: left as it was; meta and fake tensors work.
        calls: how it is called.
        layouts: module path -> classes that its attention takes on.
        blocks: paths of modules that are known to be blocks, whether they hold units or not.
    """
    regions = regions_of(model)
    items = [path for path, _ in _list_items(model)]
    watched = list(dict.fromkeys([*(region.path for region in regions), *items]))
    begin = time.monotonic()
    try:
        first, visits = observe(model, calls, regions, watched)
    except Exception as error:  # whatever a stranger's forward raises
        said = str(error).partition("\n")[0]
        mend = "Check their number, shapes and dtypes."
        places = devices_of(model)
        if len(places) > 1:
            where = ", ".join(f"{name!r} on {device}" for device, name in places.items())
            mend = f"Its parameters are on several devices ({where}): move it to one."
        raise TraceError(
            f"{type(model).__name__} must run on the example inputs; it raised "
            f"{type(error).__name__}: {said}. {mend}"
        ) from error
    seconds = time.monotonic() - begin
    units: list[Units] = []
    refusals: list[Refusal] = []
    proven: dict[Any, tuple[list[Units], list[Refusal]]] = {}
    for region in regions:
        if region.path not in visits:
            refusals.append(
                Refusal(module=region.path, reason="the example inputs do not reach it", kind="")
            )
            continue
        if region.signature not in proven:
            inner = [_relative(r.path, region.path) for r in regions if _inside(r, region)]
            path, call = first[region.signature]
            proven[region.signature] = _prove(model, path, call, inner, layouts)
        found, refused = proven[region.signature]
        alone = not any(region.path == item for item in items)
        if alone and not any(entry.kind == "head" for entry in found):
            continue  # a stem or a head of plain layers outside of all blocks
        units += [dataclasses.replace(entry, region=region.path) for entry in found]
        refusals += [dataclasses.replace(r, module=_joined(region.path, r.module)) for r in refused]
    holders = {*blocks, *(entry.region for entry in units)}
    return Discovery(
        units=tuple(units),
        stacks=tuple(_stacks(model, visits, holders)),
        refusals=tuple(refusals),
        seconds=seconds,
    )


def _inside(inner: Region, outer: Region) -> bool:
    return (
        inner.path != outer.path and under(inner.path, outer.path)
        if outer.path
        else bool(inner.path)
    )


def _relative(path: str, region: str) -> str:
    return path[len(region) + 1 :] if region else path


def _joined(region: str, path: str) -> str:
    return ".".join(part for part in (region, path) if part)


@all_float64()
def _prove(
    model: nn.Module,
    path: str,
    call: Call,
    inner: Sequence[str],
    layouts: Mapping[str, AttentionLayout],
) -> tuple[list[Units], list[Refusal]]:
    """Probe one region; return its units and what is left whole, relative to it."""
    here = {_relative(p, path): row for p, row in layouts.items() if not path or under(p, path)}
    module = replica(model.get_submodule(path))
    own = {place: type(module.get_submodule(place)) for place, row in here.items() if row.gate}
    for place in own:
        module.get_submodule(place).__class__ = resolve(here[place].gate)
    try:
        call = short_call(module, real_call(call))
        found, obstacles = couplings(module, real_call(call), inner)
    except Exception as error:  # whatever a stranger's forward raises on a copy of its own call
        said = str(error).partition("\n")[0]
        reason = f"a copy of it must run on its own; {type(error).__name__}: {said}"
        return [], [Refusal(module="", reason=reason)]
    for place, cls in own.items():
        module.get_submodule(place).__class__ = cls
    refusals = [Refusal(module=o.consumer, reason=o.reason, kind=o.kind) for o in obstacles]
    units: list[Units] = []
    inward = {site.tensor for c in found for site in c.sites[:-1]}
    for coupling in found:
        if f"{coupling.consumer}.weight" in inward:
            reason = "what it reads stays: its own rows belong to other units"
            refusals.append(Refusal(module=coupling.consumer, reason=reason))
            continue
        refused = _refused(module, coupling, here)
        holding = _holding(coupling, here)
        lists = [Knob(module=p, attribute=name) for p in holding for name in here[p].lists]
        swaps = _swaps(coupling, here)
        holder = next(iter(holding), common_path(coupling))
        fitted = refused or fit(module, real_call(call), coupling, holder, swaps, tuple(lists))
        if isinstance(fitted, Axis):
            fallback = fit_padded(module, real_call(call), fitted)
            units.append(Units(region="", axis=fitted, fallback=fallback))
        else:
            what = "heads" if coupling.kind == "head" else "neurons"
            reason = f"{what} stay: {fitted}"
            refusals.append(Refusal(module=coupling.consumer, reason=reason, kind=coupling.kind))
        if isinstance(fitted, Axis) and coupling.attends:
            taken_on = _swaps(coupling, here, "dims")
            for answer in dims_of(module, real_call(call), coupling, fitted, taken_on):
                if isinstance(answer, Axis):
                    units.append(Units(region="", axis=answer))
                else:
                    refusals.append(answer)
    for answer in experts_of(module, real_call(call), inner):
        if isinstance(answer, Axis):
            units.append(Units(region="", axis=answer))
        else:
            refusals.append(answer)
    return units, list(dict.fromkeys(refusals))


def _holding(coupling: Coupling, layouts: Mapping[str, AttentionLayout]) -> list[str]:
    """The declared attentions that hold rows of the coupling's units."""
    return [
        path
        for path in layouts
        if any(under(site.tensor, path) or not path for site in coupling.sites[:-1])
    ]


def _swaps(
    coupling: Coupling, layouts: Mapping[str, AttentionLayout], cut: str = "cut"
) -> tuple[Swap, ...]:
    """The declared classes to take on; `cut` names the attribute of those for a cut."""
    return tuple(
        swap
        for path in _holding(coupling, layouts)
        for swap in (
            Swap(module=path, to=layouts[path].gate, when="gate"),
            Swap(module=path, to=getattr(layouts[path], cut), when="cut"),
            Swap(module=path, to=layouts[path].empty if cut == "cut" else "", when="empty"),
        )
        if swap.to
    )


def _refused(region: nn.Module, coupling: Coupling, layouts: Mapping[str, AttentionLayout]) -> str:
    for path in _holding(coupling, layouts):
        for attribute, reason in layouts[path].refuse:
            value = getattr(region.get_submodule(path), attribute, None)
            if value is not None and value is not False and not isinstance(value, nn.Identity):
                return f"{reason} ({attribute}={type(value).__name__})"
    return ""


def _list_items(model: nn.Module) -> list[tuple[str, nn.Module]]:
    return [
        (f"{path}.{name}" if path else name, item)
        for path, module in model.named_modules()
        if isinstance(module, (nn.ModuleList, nn.Sequential))
        for name, item in module.named_children()
    ]


def _stacks(model: nn.Module, visits: Mapping[str, Visit], holders: set[str]) -> list[Stack]:
    """The lists whose items hold units and hand on the shape they were given.

    Of lists inside of each other the outer one counts where all its items do so, else the inner.
    """
    found = []
    for path, module in model.named_modules():
        is_list = isinstance(module, (nn.ModuleList, nn.Sequential))
        if is_list and "expert" not in path.rpartition(".")[2]:
            stack = _stack(path, module, visits, holders)
            if stack is not None:
                found.append(stack)
    whole = [s for s in found if len(s.indices) == _length(model, s.path) > 1]
    outer = [s for s in whole if not any(_holds(t, s) for t in whole)]
    rest = [s for s in found if not any(s is t or _holds(t, s) for t in outer)]
    inner = [s for s in rest if not any(_holds(s, t) for t in found)]
    return [s for s in found if s in outer or s in inner]


def _holds(outer: Stack, inner: Stack) -> bool:
    return outer.path != inner.path and under(inner.path, outer.path)


def _length(model: nn.Module, path: str) -> int:
    return sum(1 for _ in model.get_submodule(path).children())


def _stack(path: str, module: Any, visits: Mapping[str, Visit], holders: set[str]) -> Stack | None:
    places: dict[int | str, list[int]] = {}
    for index, (name, _) in enumerate(module.named_children()):
        item = _joined(path, name)
        place = _residual_place(visits.get(item))
        holds = any(under(holder, item) for holder in holders)
        if name == str(index) and place is not None and holds:
            places.setdefault(place, []).append(index)
    if not places:
        return None
    place, indices = max(places.items(), key=lambda entry: len(entry[1]))
    by_position = isinstance(place, int)
    return Stack(
        path=path,
        indices=tuple(indices),
        argument=place if isinstance(place, int) else None,
        keyword="hidden_states" if by_position else str(place),
    )


def _residual_place(visit: Visit | None) -> int | str | None:
    """Where a module takes the tensor that it hands on in its shape; None where it does not."""
    if visit is None or not visit.outputs:
        return None
    return next((name for name, shape in visit.inputs if shape == visit.outputs[0]), None)
