"""Isomorphic: units are ranked among their like only, and each likeness loses the same share.

Like are units of one kind that hold as many parameters: the heads of all layers of a tower, its
neurons. So scores that mean another thing for heads than for neurons are never compared, and a
layer that matters keeps more than another.

Source: Fang et al., Isomorphic Pruning, ECCV 2024 (2407.04616), where likeness is that of subgraphs
of the dependency graph; here it is the kind of an axis and the size of its units.
"""

from __future__ import annotations

import collections
from collections.abc import Mapping

import numpy as np

from vlprune.plan import Scores
from vlprune.ranking import keep_within, savings
from vlprune.registry import ALLOCATIONS


@ALLOCATIONS.register("isomorphic")
def isomorphic(
    scores: Scores, budget: Mapping[str, float], *, min_units: int = 0, round_to: int = 1
) -> dict[str, tuple[int, ...]]:
    """Return what stays, axis name to units.

    Args:
        scores: of every unit, comparable over axes of one kind.
        budget: see `cost.absolute_budget`; met within one unit.
        min_units: at least so many units stay on every axis.
        round_to: neurons stay in multiples of this many.

    Raises:
        BudgetError: if the budget cannot be met.
    """
    axes = scores.anatomy.axes
    values = np.concatenate([np.asarray(scores.values[axis.name], dtype=float) for axis in axes])
    likeness: dict[tuple[str, float], list[int]] = collections.defaultdict(list)
    sizes = savings(scores.anatomy, "params")
    start = 0
    for axis in axes:
        size = sizes[axis.name][0] if axis.units else 0
        likeness[axis.kind, size] += range(start, start + axis.units)
        start += axis.units
    shares = np.zeros(len(values))
    for members in likeness.values():
        places = np.asarray(members)
        order = places[np.argsort(values[places], kind="stable")]
        shares[order] = (np.arange(len(order)) + 0.5) / len(order)
    return keep_within(scores, shares, min_units, budget, round_to)
