"""From an order of removal to a plan: remove the first units until the budget is met.

The units of all axes have one row of numbers, axis by axis in the order of the anatomy.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from vlprune.anatomy import Anatomy, Axis
from vlprune.cost import SMALLEST, absolute_budget, fits, price
from vlprune.errors import BudgetError
from vlprune.plan import Scores

Numbers: TypeAlias = NDArray[np.int64]


def removable(scores: Scores, min_units: int) -> NDArray[np.bool_]:
    """Return which units [all units] may go when every axis keeps its `min_units` best."""
    allowed = []
    for axis in scores.anatomy.axes:
        free = max(axis.units - max(min_units, axis.least), 0)
        allowed.append(ranks(scores, axis.name) < free)
    return np.concatenate(allowed)


def ranks(scores: Scores, axis: str) -> Numbers:
    """Return the rank of every unit of an axis, 0 for the least important; ties by index."""
    order = np.argsort(np.asarray(scores.values[axis]), kind="stable")
    rank = np.empty_like(order)
    rank[order] = np.arange(len(order))
    return rank


def savings(anatomy: Anatomy, resource: str) -> dict[str, list[float]]:
    """Return what removing each unit alone saves, by axis; units of a sliced axis cost the same.

    Args:
        anatomy: to price with.
        resource: "params", "macs" or "latency_ms" (the mean over the axis: its steps differ).
    """
    dense = getattr(price(anatomy, {}), resource)
    return {axis.name: _savings_of(anatomy, axis, dense, resource) for axis in anatomy.axes}


def per_saved(values: NDArray[Any], saved: Sequence[float], resource: str) -> NDArray[Any]:
    """Return what units of an axis are worth [units] for each parameter, MAC or ms they cost."""
    found: NDArray[Any] = values / np.maximum(np.asarray(saved), SMALLEST[resource])
    return found


def _savings_of(anatomy: Anatomy, axis: Axis, dense: float, resource: str) -> list[float]:
    units = range(axis.units)
    if axis.removal == "slice":
        few = units[axis.least :]
        saved = dense - getattr(price(anatomy, {axis.name: tuple(units[: axis.least])}), resource)
        return [saved / max(len(few), 1)] * axis.units
    without = ({axis.name: tuple(u for u in units if u != gone)} for gone in units)
    return [float(dense - getattr(price(anatomy, keep), resource)) for keep in without]


def keep_within(
    scores: Scores,
    worth: NDArray[Any],
    min_units: int,
    budget: Mapping[str, float],
    round_to: int = 1,
) -> dict[str, tuple[int, ...]]:
    """Return what stays when units go, least worth first, until `budget` is met.

    Args:
        scores: with the anatomy.
        worth: of every unit [all units]; ties by number.
        min_units: at least so many units stay on every axis.
        budget: see `cost.absolute_budget`.
        round_to: neurons stay in multiples of this many; so many go together.

    Raises:
        BudgetError: if all that may go is not enough.
        ValueError: for a round_to below 1.
    """
    if round_to < 1:
        raise ValueError(f"round_to must be at least 1; got {round_to}.")
    order = np.argsort(worth, kind="stable")
    order = order[removable(scores, min_units)[order]]
    groups = [[int(unit)] for unit in order]
    if round_to > 1:
        groups = _whole_widths(scores.anatomy, order, worth, round_to)
    return keep_after(scores.anatomy, groups, budget)


def _whole_widths(
    anatomy: Anatomy, order: Numbers, worth: NDArray[Any], round_to: int
) -> list[list[int]]:
    """The units of `order` in groups after each of which every width is a multiple, or whole."""
    ends = np.cumsum([0, *(axis.units for axis in anatomy.axes)])
    groups: list[list[int]] = []
    for axis, start, end in zip(anatomy.axes, ends, ends[1:], strict=False):
        own = order[(order >= start) & (order < end)].tolist()
        size = round_to if axis.kind == "ffn" else 1
        first = axis.units % size or size
        steps = range(first, len(own) + 1, size)
        groups += [own[last - size if last > first else 0 : last] for last in steps]
    means = [float(np.mean(worth[group])) for group in groups]
    return [groups[place] for place in np.argsort(means, kind="stable")]


def keep_after(
    anatomy: Anatomy, order: Sequence[Sequence[int]], budget: Mapping[str, float]
) -> dict[str, tuple[int, ...]]:
    """Return what stays when the first groups of `order` go, no more than the budget asks for.

    Args:
        anatomy: to price with.
        order: groups of units that go together, by their number among all units.
        budget: see `cost.absolute_budget`.

    Raises:
        BudgetError: if all that may go is not enough.
    """
    limits = absolute_budget(anatomy, budget)
    flat = np.fromiter((unit for group in order for unit in group), dtype=np.int64)
    ends = np.cumsum([0, *map(len, order)])
    few, many = 0, len(order)
    everything = price(anatomy, keep_without(anatomy, flat))
    if not fits(everything, limits):
        raise BudgetError(
            f"budget {dict(budget)} must be reachable; with the units that have to stay the least "
            f"is {everything}, the most {price(anatomy, {})}. Lower min_units or ask for more."
        )
    while few < many:  # cost never rises with the length of the prefix
        middle = (few + many) // 2
        if fits(price(anatomy, keep_without(anatomy, flat[: ends[middle]])), limits):
            many = middle
        else:
            few = middle + 1
    return keep_without(anatomy, flat[: ends[few]])


def keep_without(anatomy: Anatomy, removed: Numbers) -> dict[str, tuple[int, ...]]:
    """Return what stays without units that are given by their number among all units."""
    ends = np.cumsum([axis.units for axis in anatomy.axes])
    stays = np.ones(ends[-1], dtype=bool)
    stays[removed] = False
    rows = np.split(stays, ends[:-1])
    return {
        axis.name: tuple(np.flatnonzero(row).tolist())
        for axis, row in zip(anatomy.axes, rows, strict=True)
    }
