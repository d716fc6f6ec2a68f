"""Measured: how many units an axis can spare is read off a curve that was measured.

The curve of an axis says what each further unit costs when the least important ones go together:
the metric `mope` with `nested=True` measures it with the ablation engine. The split that costs
least in all within the budget takes the steps of all curves in order of fall per parameter (or
MAC, or ms) saved, which is exact where curves are convex, and these are made so. Which units of an
axis go is said by the scores.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from vlprune.cost import resource_of
from vlprune.errors import PlanError
from vlprune.plan import Scores
from vlprune.ranking import keep_within, per_saved, ranks, savings
from vlprune.registry import ALLOCATIONS


@ALLOCATIONS.register("measured")
def measured(
    scores: Scores,
    budget: Mapping[str, float],
    *,
    min_units: int = 0,
    round_to: int = 1,
    curves: Scores | None = None,
) -> dict[str, tuple[int, ...]]:
    """Return what stays, axis name to units.

    Args:
        scores: of every unit; they order the units of an axis.
        budget: see `cost.absolute_budget`; met within one unit.
        min_units: at least so many units stay on every axis.
        round_to: neurons stay in multiples of this many.
        curves: what each unit adds when units of its axis go together, for instance of
            `score(model, "mope", task, nested=True)`; default: the scores are such.

    Raises:
        BudgetError: if the budget cannot be met.
        PlanError: if an axis has no curve.
    """
    curves = scores if curves is None else curves
    resource = resource_of(budget)
    saved = savings(scores.anatomy, resource)
    worth = []
    for axis in scores.anatomy.axes:
        steps = curves.values.get(axis.name)
        if steps is None or len(steps) != axis.units:
            raise PlanError(f"axis {axis.name!r} must have a curve of {axis.units} units.")
        rising = np.sort(np.asarray(steps, dtype=float))  # the r-th to go adds the r-th least
        worth.append(per_saved(rising[ranks(scores, axis.name)], saved[axis.name], resource))
    return keep_within(scores, np.concatenate(worth), min_units, budget, round_to)
