"""What several plans, one after another, did to each axis, in the names and numbers of today.

A model that was cut twice carries two plans. The second names axes as they were called after the
first: layers that were deleted moved the numbers of those behind them.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Sequence

from vlprune.anatomy import Axis
from vlprune.plan import Plan


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Fate:
    """What became of one axis.

    Attributes:
        name: of the axis in the cut model.
        axis: as the first plan that decided on it has it.
        keep: its units that are left, in the numbers of that first plan.
        tensors: where its units lie now: (tensor, dimension, indices a unit takes up).
        parts: of an axis of parts that are bypassed: where each unit lies now, None where its layer
            is gone.
    """

    name: str
    axis: Axis
    keep: tuple[int, ...]
    tensors: tuple[tuple[str, int, int], ...]
    parts: tuple[str | None, ...] = ()

    @property
    def depth(self) -> int:
        """The number of its layer in the cut model, 0 where it names none."""
        numbers = [int(step) for step in self.name.partition(":")[0].split(".") if step.isdigit()]
        return numbers[-1] if self.axis.removal == "slice" and numbers else self.axis.depth


def fates_of(plans: Sequence[Plan]) -> dict[str, Fate]:
    """Return name in the cut model to what became of each axis that is left."""
    fates: dict[str, Fate] = {}
    for plan in plans:
        for row in plan.rows:
            past = fates.get(row.axis.name)
            before = range(row.axis.units) if past is None else past.keep
            fates[row.axis.name] = Fate(
                name=row.axis.name,
                axis=row.axis if past is None else past.axis,
                keep=tuple(before[unit] for unit in row.keep),
                tensors=_places(row.axis) if past is None else past.tensors,
                parts=_parts(row.axis) if past is None else past.parts,
            )
        moved = (_after(fate, plan) for fate in fates.values())
        fates = {fate.name: fate for fate in moved if fate is not None}
    return fates


def _places(axis: Axis) -> tuple[tuple[str, int, int], ...]:
    """(tensor, dimension, indices a unit takes up there), each tensor's dimension once."""
    sizes: dict[tuple[str, int], int] = {}
    for site in axis.sites:
        sizes[site.tensor, site.dim] = sizes.get((site.tensor, site.dim), 0) + site.size
    return tuple((tensor, dim, size) for (tensor, dim), size in sizes.items())


def _parts(axis: Axis) -> tuple[str, ...]:
    """The module of every unit that is bypassed."""
    return tuple(scopes[0] for scopes in axis.scopes) if axis.removal == "bypass" else ()


def _after(fate: Fate, plan: Plan) -> Fate | None:
    """The fate in the names after a plan; None where it went with a layer or with half of one."""
    found = names_after([fate.name], plan)
    if not found:
        return None
    tensors = [(names_after([tensor], plan), dim, size) for tensor, dim, size in fate.tensors]
    left = tuple((names[0], dim, size) for names, dim, size in tensors if names)
    parts = tuple(
        None if p is None else next(iter(names_after([p], plan)), None) for p in fate.parts
    )
    return dataclasses.replace(fate, name=found[0], tensors=left, parts=parts)


def names_after(names: Iterable[str], plan: Plan) -> tuple[str, ...]:
    """Return what tensors or axes are called after a plan; those that went with a part are gone."""
    parts = [
        scope
        for row in plan.rows
        if row.axis.removal == "bypass"
        for unit in row.removed
        for scope in row.axis.scopes[unit]
    ]
    left = [name for name in names if not any(_is_in(name, part) for part in parts)]
    return _renumbered(left, plan)


def _is_in(name: str, part: str) -> bool:
    return name.startswith((f"{part}.", f"{part}:"))


def _renumbered(names: Iterable[str], plan: Plan) -> tuple[str, ...]:
    """What names are when the layers are gone that a plan deletes."""
    now = list(names)
    for row in plan.rows:
        if row.axis.removal == "delete" and row.removed:
            gone = {row.axis.layer(unit) for unit in row.removed}
            moved = (_moved(name, row.axis.path + ".", gone) for name in now)
            now = [name for name in moved if name is not None]
    return tuple(now)


def _moved(name: str, stack: str, gone: set[int]) -> str | None:
    """A name when layers of a stack are gone; None where it is in one of them."""
    place = re.match(r"(\d+)(?=[.:]|$)", name.removeprefix(stack))
    if not name.startswith(stack) or place is None:
        return name
    layer, rest = int(place[1]), name.removeprefix(stack + place[1])
    return None if layer in gone else f"{stack}{layer - sum(g < layer for g in gone)}{rest}"
