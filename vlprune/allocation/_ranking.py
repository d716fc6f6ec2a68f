"""From an order of removal to a plan: remove the first units until the budget is met."""

from __future__ import annotations

import collections
from collections.abc import Mapping, Sequence

from vlprune.anatomy import Anatomy
from vlprune.cost import absolute_budget, fits, price
from vlprune.errors import BudgetError
from vlprune.plan import Scores

Unit = tuple[str, int]


def removable(scores: Scores, min_units: int) -> set[Unit]:
    """Return the units that may go when every axis keeps its `min_units` best."""
    units: set[Unit] = set()
    for axis in scores.anatomy.axes:
        ascending = ranked(scores, axis.name)
        free = max(axis.units - max(min_units, axis.least), 0)
        units.update((axis.name, unit) for unit in ascending[:free])
    return units


def ranked(scores: Scores, axis: str) -> list[int]:
    """Return the units of an axis from the least to the most important; ties by index."""
    values = scores.values[axis]
    return sorted(range(len(values)), key=values.__getitem__)


def keep_within(
    scores: Scores, order: Sequence[Unit], budget: Mapping[str, float]
) -> dict[str, tuple[int, ...]]:
    """Return what stays when the shortest prefix of `order` that meets `budget` is removed.

    Raises:
        BudgetError: if all of `order` is not enough.
    """
    anatomy = scores.anatomy
    limits = absolute_budget(anatomy, budget)
    few, many = 0, len(order)
    everything = price(anatomy, _keep(anatomy, order))
    if not fits(everything, limits):
        dense = price(anatomy, {})
        raise BudgetError(
            f"budget {dict(budget)} must be reachable; with the units that have to stay the least "
            f"is {everything.params:,} params and {everything.macs:,} macs, the most "
            f"{dense.params:,} and {dense.macs:,}. Lower min_units or ask for more."
        )
    while few < many:  # cost never rises with the length of the prefix
        middle = (few + many) // 2
        if fits(price(anatomy, _keep(anatomy, order[:middle])), limits):
            many = middle
        else:
            few = middle + 1
    return _keep(anatomy, order[:few])


def _keep(anatomy: Anatomy, removed: Sequence[Unit]) -> dict[str, tuple[int, ...]]:
    gone: dict[str, set[int]] = collections.defaultdict(set)
    for axis, unit in removed:
        gone[axis].add(unit)
    return {
        axis.name: tuple(unit for unit in range(axis.units) if unit not in gone[axis.name])
        for axis in anatomy.axes
    }
