"""Knapsack: keep what is worth most in all, within every limit at once (integer programme).

Where the ranking of "global" serves one limit, this one serves several: parameters,
multiply-accumulates and milliseconds, a share of parameters for single towers, widths that are
multiples of a number, axes that stay whole. Units are priced one by one from the anatomy, which is
exact for heads and neurons (in milliseconds by the step of the latency table that each is); where
prices depend on each other (a layer and its heads) limits are tightened until the exact price fits,
and what is left of the budget is filled up.

Source: Shen et al., Structural Pruning via Latency-Saliency Knapsack, NeurIPS 2022 (2210.06659);
solved by `scipy.optimize.milp` (HiGHS).
"""

from __future__ import annotations

import bisect
import collections
import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import scipy.optimize
import scipy.sparse
from numpy.typing import NDArray

from vlprune.anatomy import Anatomy
from vlprune.cost import absolute_budget, fits, price
from vlprune.errors import BudgetError
from vlprune.plan import Scores
from vlprune.ranking import savings
from vlprune.registry import ALLOCATIONS

_GAP = 1e-4  # of the best worth: where the search may end
_SECONDS = 60.0  # and when
_ROUNDS = 12  # tightenings of limits


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class _Block:
    """Units that go together: as many as a width is a multiple of."""

    axis: str
    units: tuple[int, ...]
    worth: float
    params: float
    macs: float
    latency_ms: float = 0.0


@ALLOCATIONS.register("knapsack")
def knapsack(
    scores: Scores,
    budget: Mapping[str, float],
    *,
    min_units: int = 0,
    round_to: int = 1,
    protect: tuple[str, ...] = (),
    towers: Mapping[str, float] | None = None,
) -> dict[str, tuple[int, ...]]:
    """Return what stays, axis name to units.

    Args:
        scores: of every unit, comparable over axes. Negative ones are worth nothing.
        budget: one or more limits, see `cost.absolute_budget`; the one that binds is met within one
            block of units.
        min_units: at least so many units stay on every axis.
        round_to: neurons stay in multiples of this many (what the last block lacks goes with it).
        protect: axes that stay whole, by name or by the start of one.
        towers: tower to the share of its units' parameters that may stay at most.

    Raises:
        BudgetError: if the budget cannot be met.
        ValueError: for a round_to below 1, an unknown tower or a protected axis that is not there.
    """
    anatomy = scores.anatomy
    _check(anatomy, round_to, protect, towers or {})
    limits = absolute_budget(anatomy, budget)
    resources = ("params", "macs") + (("latency_ms",) if anatomy.latency else ())
    prices = {name: savings(anatomy, name) for name in resources}
    blocks = list(_blocks(scores, prices, min_units, round_to, protect))
    least = _keep(anatomy, blocks, np.zeros(len(blocks), dtype=bool))
    floor, dense = price(anatomy, least), price(anatomy, {})
    if not fits(floor, limits):
        raise BudgetError(
            f"budget {dict(budget)} must be reachable; with the units that have to stay the least "
            f"is {floor}, the most {dense}. Lower min_units, protect less or ask for more."
        )
    room = {name: limit - getattr(floor, name) for name, limit in limits.items()}
    bounds = {
        tower: share * sum(sum(prices["params"][name]) for name in _of(anatomy, tower))
        - sum(prices["params"][name][u] for name in _of(anatomy, tower) for u in least[name])
        for tower, share in (towers or {}).items()
    }
    chosen = np.zeros(len(blocks), dtype=bool)
    for _ in range(_ROUNDS):
        chosen = _best_first(blocks, _solve(anatomy, blocks, room, bounds), anatomy)
        spent = price(anatomy, _keep(anatomy, blocks, chosen))
        over = {name: getattr(spent, name) - limit for name, limit in limits.items()}
        if all(excess <= 0 for excess in over.values()):
            break
        room = {name: size - max(over[name], 0) for name, size in room.items()}
    else:
        chosen[:] = False
    return _filled(anatomy, blocks, chosen, limits, bounds)


def _check(
    anatomy: Anatomy, round_to: int, protect: tuple[str, ...], towers: Mapping[str, float]
) -> None:
    if round_to < 1:
        raise ValueError(f"round_to must be at least 1; got {round_to} in knapsack.")
    known = sorted({axis.tower for axis in anatomy.axes})
    for tower in towers:
        if tower not in known:
            raise ValueError(f"towers must be of {', '.join(known)}; got {tower!r} in knapsack.")
    for name in protect:
        if not any(axis.name.startswith(name) for axis in anatomy.axes):
            raise ValueError(f"protect must name axes; none starts with {name!r} in knapsack.")


def _of(anatomy: Anatomy, tower: str) -> list[str]:
    return [axis.name for axis in anatomy.axes if axis.tower == tower]


def _blocks(
    scores: Scores,
    prices: Mapping[str, Mapping[str, list[float]]],
    min_units: int,
    round_to: int,
    protect: tuple[str, ...],
) -> Iterator[_Block]:
    """What may go, block by block; the best units of an axis that have to stay are in none."""
    top = max((abs(v) for row in scores.values.values() for v in row), default=0.0) or 1.0
    for axis in scores.anatomy.axes:
        if axis.name.startswith(protect):
            continue
        values = np.asarray(scores.values[axis.name], dtype=float)
        order = np.argsort(-values, kind="stable")  # best first
        size = round_to if axis.kind == "ffn" else 1
        stay = max(min_units, axis.least)
        stay = -(-stay // size) * size  # up to whole blocks
        for start in range(stay, axis.units, size):
            units = tuple(int(unit) for unit in order[start : start + size])
            found = {name: sum(row[axis.name][u] for u in units) for name, row in prices.items()}
            table = scores.anatomy.latency
            if table is not None and axis.removal == "slice":  # no two steps of a curve are alike
                times = table.by_axis[axis.name]
                found["latency_ms"] = times.at(start + len(units)) - times.at(start)
            yield _Block(
                axis=axis.name,
                units=units,
                worth=sum(max(values[unit] / top, 1e-9) for unit in units),
                **found,
            )


def _best_first(
    blocks: list[_Block], chosen: NDArray[np.bool_], anatomy: Anatomy
) -> NDArray[np.bool_]:
    """As many blocks of every sliced axis as were chosen, the best: a later step may be cheaper."""
    sliced = {axis.name for axis in anatomy.axes if axis.removal == "slice"}
    counts = collections.Counter(b.axis for b, is_in in zip(blocks, chosen, strict=True) if is_in)
    found = chosen.copy()
    for place, block in enumerate(blocks):
        if block.axis in sliced:
            found[place] = counts[block.axis] > 0
            counts[block.axis] -= 1
    return found


def _solve(
    anatomy: Anatomy,
    blocks: list[_Block],
    room: Mapping[str, float],
    bounds: Mapping[str, float],
) -> NDArray[np.bool_]:
    """Which blocks stay: the most worth within `room` and the `bounds` of towers."""
    if not blocks:
        return np.zeros(0, dtype=bool)
    tower = {axis.name: axis.tower for axis in anatomy.axes}
    rows = [[getattr(block, name) for block in blocks] for name in room]
    rows += [[b.params if tower[b.axis] == name else 0 for b in blocks] for name in bounds]
    matrix = np.asarray(rows, dtype=float)
    sizes = np.asarray([*room.values(), *bounds.values()], dtype=float).clip(min=0)
    scale = matrix.max(axis=1, initial=1.0)
    order = _in_order(anatomy, blocks) if "latency_ms" in room else []
    worth = [-block.worth for block in blocks] + [0.0] * len(order)
    constraints = [
        scipy.optimize.LinearConstraint(
            scipy.sparse.hstack(
                [scipy.sparse.csr_array(matrix / scale[:, None])]
                + [scipy.sparse.csr_array((len(matrix), len(order)))] * bool(order)
            ),
            ub=sizes / scale,
        )
    ]
    if order:
        constraints.append(scipy.optimize.LinearConstraint(_ordered(order, len(blocks)), ub=0.0))
    found = scipy.optimize.milp(
        np.asarray(worth),
        constraints=constraints,
        integrality=np.ones(len(worth)),
        bounds=scipy.optimize.Bounds(0, 1),
        options={"mip_rel_gap": _GAP, "time_limit": _SECONDS},
    )
    if found.x is None:
        raise BudgetError(f"the integer programme must be solvable; HiGHS says: {found.message}")
    chosen: NDArray[np.bool_] = found.x[: len(blocks)] > 0.5
    return chosen


def _in_order(anatomy: Anatomy, blocks: list[_Block]) -> list[tuple[list[int], list[int]]]:
    """Runs of blocks of one price of which the second may stay only where all of the first do.

    A later step of an axis that is cheaper than one before it cannot be had alone.
    """
    sliced = {axis.name for axis in anatomy.axes if axis.removal == "slice"}
    members: dict[str, list[int]] = collections.defaultdict(list)
    for place, block in enumerate(blocks):
        if block.axis in sliced:
            members[block.axis].append(place)
    found = []
    for places in members.values():
        runs: list[list[int]] = []
        prices: list[float] = []
        for place in places:
            price = blocks[place].latency_ms / len(blocks[place].units)
            if runs and math.isclose(price, prices[-1], rel_tol=1e-6):
                runs[-1].append(place)
            else:
                prices.append(price)
                runs.append([place])
        cheaper = [n for n in range(1, len(runs)) if prices[n] < max(prices[:n])]
        found += [(runs[n - 1], runs[n]) for n in cheaper]
    return found


def _ordered(order: list[tuple[list[int], list[int]]], num_blocks: int) -> Any:
    """The matrix of: a switch needs all of its first run, and the second run its switch."""
    entries: list[tuple[float, int, int]] = []
    for n, (first, second) in enumerate(order):
        switch = num_blocks + n
        entries += [(-1.0, 2 * n, place) for place in first]
        entries += [(len(first), 2 * n, switch), (-len(second), 2 * n + 1, switch)]
        entries += [(1.0, 2 * n + 1, place) for place in second]
    values, rows, columns = zip(*entries, strict=True)
    shape = (2 * len(order), num_blocks + len(order))
    return scipy.sparse.coo_array((values, (rows, columns)), shape=shape)


def _filled(
    anatomy: Anatomy,
    blocks: list[_Block],
    chosen: NDArray[np.bool_],
    limits: Mapping[str, float],
    bounds: Mapping[str, float],
) -> dict[str, tuple[int, ...]]:
    """The choice with all further blocks that fit by the exact price, axis by axis."""
    axes = {axis.name: axis for axis in anatomy.axes}
    rest: dict[str, list[int]] = collections.defaultdict(list)
    room = dict(bounds)
    for index, block in enumerate(blocks):
        tower = axes[block.axis].tower
        if not chosen[index]:
            rest[block.axis].append(index)
        elif tower in room:
            room[tower] -= block.params

    def fit(more: list[int]) -> bool:
        added = chosen.copy()
        added[more] = True
        tower = axes[blocks[more[0]].axis].tower
        within = sum(blocks[i].params for i in more) <= room.get(tower, float("inf"))
        return within and fits(price(anatomy, _keep(anatomy, blocks, added)), limits)

    for name, members in sorted(rest.items(), key=lambda row: -blocks[row[1][0]].worth):
        if axes[name].removal == "slice":  # of one price: the more, the dearer
            count = bisect.bisect(range(1, len(members) + 1), 0, key=lambda n: not fit(members[:n]))
            more = members[:count]
        else:
            more = []
            for index in members:
                more = [*more, index] if fit([*more, index]) else more
        chosen[more] = True
        if axes[name].tower in room:
            room[axes[name].tower] -= sum(blocks[i].params for i in more)
    return _keep(anatomy, blocks, chosen)


def _keep(
    anatomy: Anatomy, blocks: list[_Block], chosen: NDArray[np.bool_]
) -> dict[str, tuple[int, ...]]:
    gone: dict[str, set[int]] = {axis.name: set() for axis in anatomy.axes}
    for block, stays in zip(blocks, chosen, strict=True):
        if not stays:
            gone[block.axis].update(block.units)
    return {
        axis.name: tuple(unit for unit in range(axis.units) if unit not in gone[axis.name])
        for axis in anatomy.axes
    }
