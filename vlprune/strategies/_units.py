"""Axes from units that were proven on a region: names made absolute, towers and depths set."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Iterator, Sequence

from vlprune.anatomy import Axis, Gate, Site, under
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
        tied = _tied(view, units)
        if tied:
            view.refuse(_at(units, units.coupling.consumer), tied, kind)
            continue
        axis = _axis(view, units)
        if axis.name in names:  # two rows in one module: the layer that consumes them tells
            axis = dataclasses.replace(axis, name=f"{axis.gate.modules[0]}:{kind}")
        names.add(axis.name)
        yield axis


def _at(units: Units, path: str) -> str:
    return ".".join(part for part in (units.region, path) if part)


def _axis(view: ModelView, units: Units) -> Axis:
    coupling, path = units.coupling, _at(units, units.path)
    return Axis(
        name=f"{path}:{units.kind}",
        kind=units.kind,
        tower=view.tower(path),
        depth=view.depth(path),
        units=coupling.units,
        removal="slice",
        gate=Gate(
            kind="input",
            modules=(_at(units, coupling.consumer),),
            block=coupling.block,
            dim=coupling.dim,
            norms=tuple(_at(units, norm) for norm in coupling.norms),
        ),
        sites=tuple(dict.fromkeys(_site(view, units, site) for site in coupling.sites)),
        knobs=tuple(dataclasses.replace(k, module=_at(units, k.module)) for k in units.fit.knobs),
        swaps=tuple(dataclasses.replace(s, module=_at(units, s.module)) for s in units.fit.swaps),
        scopes=((path,),) if units.kind == "head" else (),
        least=units.fit.least,
    )


def _site(view: ModelView, units: Units, site: Site) -> Site:
    first, *_ = view.tensor_names(_at(units, site.tensor))
    return dataclasses.replace(site, tensor=first)


def _tied(view: ModelView, units: Units) -> str:
    """Why the units cannot go: a tensor of theirs is held by a module elsewhere, too."""
    for site in units.coupling.sites:
        name = _at(units, site.tensor)
        others = [n for n in view.tensor_names(name) if not under(n, units.region)]
        if others and units.region:
            return f"units stay: {name} is tied to {others[0]}"
    return ""
