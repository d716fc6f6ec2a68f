"""Axes from units that were proven on a region: names made absolute, towers and depths set."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Iterator, Sequence

from vlprune.anatomy import Axis, Site, under
from vlprune.discovery.discover import Units
from vlprune.discovery.skip import fault_of
from vlprune.dissect import ModelView
from vlprune.plan import PlanRow


def axes_of_kind(view: ModelView, kind: str) -> Iterator[Axis]:
    """Yield an axis for every row of units of this kind that holds in the whole model."""
    axes = list(_axes(view, kind))
    if not _fault(view, _samples(axes)):
        yield from axes
        return
    for axis in axes:  # something outside of a region counts on its units: find out where
        reason = _fault(view, [axis])
        if reason:
            view.refuse(axis.gate.modules[0], f"units stay: {reason}", kind)
        else:
            yield axis


def _samples(axes: Sequence[Axis]) -> list[Axis]:
    """The first and the last axis of every make: what was proven on one region is alike in all."""
    makes: dict[tuple[str, ...], list[Axis]] = collections.defaultdict(list)
    for axis in axes:
        shape = tuple(f"{s.dim} {s.offset} {s.block}" for s in axis.sites)
        makes[axis.tower, axis.path.rpartition(".")[2], str(axis.units), *shape].append(axis)
    ends = [axis for make in makes.values() for axis in (make[0], make[-1])]
    return list({axis.name: axis for axis in ends}.values())


def _fault(view: ModelView, axes: Sequence[Axis]) -> str:
    rows = [PlanRow(axis=a, keep=tuple(range(1, a.units))) for a in axes if a.units > 1]
    return fault_of(view.model, view.calls, rows) if rows else ""


def _axes(view: ModelView, kind: str) -> Iterator[Axis]:
    """The proven units as axes with absolute names; what is tied elsewhere is refused."""
    names: set[str] = set()
    for units in view.discovery.units:
        if units.kind != kind:
            continue
        axis = _absolute(view, units)
        tied = _tied(view, axis, units.region)
        if tied:
            view.refuse(axis.gate.modules[0], tied, kind)
            continue
        if axis.name in names:  # two rows in one module: the layer that consumes them tells
            name = f"{axis.gate.modules[0]}:{axis.name.rpartition(':')[2]}"
            axis = dataclasses.replace(axis, name=name)
        names.add(axis.name)
        yield axis


def _absolute(view: ModelView, units: Units) -> Axis:
    """The axis with all names from the model's root, its tower and depth."""

    def at(path: str) -> str:
        return ".".join(part for part in (units.region, path) if part)

    def site_at(site: Site) -> Site:
        first, *_ = view.tensor_names(at(site.tensor))
        return dataclasses.replace(site, tensor=first)

    axis = units.axis
    gate = dataclasses.replace(
        axis.gate,
        modules=tuple(map(at, axis.gate.modules)),
        norms=tuple(map(at, axis.gate.norms)),
        sites=tuple(map(site_at, axis.gate.sites)),
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
    )


def _tied(view: ModelView, axis: Axis, region: str) -> str:
    """Why the units cannot go: a tensor of theirs is held by a module elsewhere, too."""
    for site in axis.sites:
        others = [n for n in view.tensor_names(site.tensor) if not under(n, region)]
        if others and region:
            return f"units stay: {site.tensor} is tied to {others[0]}"
    return ""
