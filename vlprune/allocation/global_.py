"""Global: one ranking over all axes of all towers, by score per parameter (or MAC, or ms) saved.

Only sensible for scores that mean the same everywhere (loss-based ones: taylor, fisher, mope).
Magnitudes do not: their norms per parameter differ by kind, so one kind goes first.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from vlprune.cost import resource_of
from vlprune.plan import Scores
from vlprune.ranking import keep_within, per_saved, savings
from vlprune.registry import ALLOCATIONS


@ALLOCATIONS.register("global")
def global_ranking(
    scores: Scores, budget: Mapping[str, float], *, min_units: int = 0, round_to: int = 1
) -> dict[str, tuple[int, ...]]:
    """Return what stays, axis name to units.

    Args:
        scores: of every unit, comparable over axes.
        budget: see `cost.absolute_budget`; met within one unit.
        min_units: at least so many units stay on every axis.
        round_to: neurons stay in multiples of this many.

    Raises:
        BudgetError: if the budget cannot be met.
    """
    resource = resource_of(budget)
    saved = savings(scores.anatomy, resource)
    worth = [
        per_saved(np.asarray(scores.values[axis.name]), saved[axis.name], resource)
        for axis in scores.anatomy.axes
    ]
    return keep_within(scores, np.concatenate(worth), min_units, budget, round_to)
