"""Axes from units that were proven on a region: names made absolute, towers and depths set."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

from vlprune.anatomy import Axis, Site, under
from vlprune.discovery.discover import Units
from vlprune.discovery.skip import fault_of
from vlprune.dissect import ModelView
from vlprune.plan import PlanRow


def axes_of_kind(view: ModelView, kind: str) -> Iterator[Axis]:
    """Yield an axis for every row of units of this kind that holds in the whole model."""
    pairs = list(_axes(view, kind))
    if _all_hold(view) or not _fault(view, _samples([axis for axis, _ in pairs])):
        yield from (axis for axis, _ in pairs)
        return
    kept: list[Axis] = []
    for axis, fallback in pairs:  # something outside of a region counts on its units: find where
        reason = _fault(view, [*_samples(kept), axis])
        if not reason:
            kept.append(axis)
        elif fallback is not None and not _fault(view, [*_samples(kept), fallback]):
            kept.append(fallback)
        else:
            view.refuse(axis.gate.modules[0], f"units stay: {reason}", kind)
    yield from kept


def _all_hold(view: ModelView) -> bool:
    """Say whether units of all kinds can go together: one trial where all is well."""
    if view.units_hold is None:
        view.units_hold = _try_all(view)
    return view.units_hold


def _try_all(view: ModelView) -> bool:
    quiet = ModelView(view.model, view.calls)  # what it refuses is refused kind by kind
    quiet.discovery = view.discovery
    kinds = {units.kind for units in view.discovery.units}
    axes = [axis for kind in sorted(kinds) for axis, _ in _axes(quiet, kind)]
    return not _fault(quiet, _samples(axes))


def _samples(axes: Sequence[Axis]) -> list[Axis]:
    """The first and the last axis of every make: what was proven on one region is alike in all."""
    makes: dict[tuple[str, ...], list[Axis]] = collections.defaultdict(list)
    for axis in axes:
        shape = tuple(f"{s.dim} {s.offset} {s.block}" for s in axis.sites)
        makes[axis.tower, axis.path.rpartition(".")[2], str(axis.units), *shape].append(axis)
    ends = [axis for make in makes.values() for axis in (make[0], make[-1])]
    return list({axis.name: axis for axis in ends}.values())


def _fault(view: ModelView, axes: Sequence[Axis]) -> str:
    rows = [PlanRow(axis=a, keep=_uneven(a, i)) for i, a in enumerate(axes) if a.units > 1]
    return fault_of(view.model, view.calls, rows) if rows else ""


def _uneven(axis: Axis, number: int) -> tuple[int, ...]:
    """What to keep in a trial: another number of units on one axis than on the next."""
    most = max(min(1 + number % max(axis.units // 2, 1), axis.units - axis.least), 0)
    gone = {(number + i) % axis.units for i in range(most)}
    return tuple(unit for unit in range(axis.units) if unit not in gone)


def _axes(view: ModelView, kind: str) -> Iterator[tuple[Axis, Axis | None]]:
    """The proven units and their fallbacks, names absolute; those of tied modules are one axis."""
    together: dict[Any, list[Units]] = collections.defaultdict(list)
    for units in view.discovery.units:
        if units.kind == kind:
            sites = _absolute(view, units.region, units.axis).sites
            together[frozenset((s.tensor, s.dim, s.offset) for s in sites)].append(units)
    names: set[str] = set()
    for members in together.values():
        axis = _merged([_absolute(view, units.region, units.axis) for units in members])
        tied = _tied(view, axis, [units.region for units in members])
        if tied:
            view.refuse(axis.gate.modules[0], tied, kind)
            continue
        if axis.name in names:  # two rows in one module: the layer that consumes them tells
            name = f"{axis.gate.modules[0]}:{axis.name.rpartition(':')[2]}"
            axis = dataclasses.replace(axis, name=name)
        names.add(axis.name)
        padded = [_absolute(view, u.region, u.fallback) for u in members if u.fallback is not None]
        fallback = _merged(padded) if len(padded) == len(members) else None
        yield axis, fallback and dataclasses.replace(fallback, name=axis.name)


def _merged(axes: Sequence[Axis]) -> Axis:
    """One axis for modules that hold the same tensors, each with its gate, knobs and swaps."""
    first, *others = axes
    if not others:
        return first
    gates = [axis.gate for axis in axes]
    scopes = tuple(path for axis in axes for row in axis.scopes for path in row)
    gate = dataclasses.replace(
        first.gate,
        modules=tuple(path for gate in gates for path in gate.modules),
        norms=tuple(path for gate in gates for path in gate.norms),
        sites=tuple(dict.fromkeys(site for gate in gates for site in gate.sites)),
        within=tuple(path for gate in gates for path in gate.within),
    )
    return dataclasses.replace(
        first,
        gate=gate,
        knobs=tuple(knob for axis in axes for knob in axis.knobs),
        swaps=tuple(swap for axis in axes for swap in axis.swaps),
        scopes=(scopes,) if scopes else (),
        lists=tuple(dict.fromkeys(path for axis in axes for path in axis.lists)),
        least=max(axis.least for axis in axes),
    )


def _absolute(view: ModelView, region: str, axis: Axis) -> Axis:
    """The axis of a region with all names from the model's root, its tower and depth."""

    def at(path: str) -> str:
        return ".".join(part for part in (region, path) if part)

    def site_at(site: Site) -> Site:
        first, *_ = view.tensor_names(at(site.tensor))
        return dataclasses.replace(site, tensor=first)

    gate = dataclasses.replace(
        axis.gate,
        modules=tuple(map(at, axis.gate.modules)),
        norms=tuple(map(at, axis.gate.norms)),
        sites=tuple(map(site_at, axis.gate.sites)),
        within=tuple(map(at, axis.gate.within)),
    )
    path = at(axis.path)
    return dataclasses.replace(
        axis,
        name=f"{path}:{axis.name.rpartition(':')[2]}",
        tower=view.tower(path),
        depth=view.depth(path),
        gate=gate,
        sites=tuple(dict.fromkeys(map(site_at, axis.sites))),
        knobs=tuple(dataclasses.replace(k, module=at(k.module)) for k in axis.knobs),
        swaps=tuple(dataclasses.replace(s, module=at(s.module)) for s in axis.swaps),
        scopes=tuple(tuple(map(at, scope)) for scope in axis.scopes),
        lists=tuple(map(at, axis.lists)),
    )


def _tied(view: ModelView, axis: Axis, regions: Sequence[str]) -> str:
    """Why the units cannot go: a tensor of theirs is held by a module elsewhere, too."""
    if "" in regions:
        return ""
    for site in axis.sites:
        names = view.tensor_names(site.tensor)
        others = [n for n in names if not any(under(n, region) for region in regions)]
        if others:
            return f"units stay: {site.tensor} is tied to {others[0]}"
    return ""
