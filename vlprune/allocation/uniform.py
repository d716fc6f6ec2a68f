"""Uniform: every axis loses the same share of its units, the least important first.

The common default, and the baseline: it says nothing about which layer can spare more.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from vlprune.plan import Scores
from vlprune.ranking import keep_within, ranks
from vlprune.registry import ALLOCATIONS


@ALLOCATIONS.register("uniform")
def uniform(
    scores: Scores, budget: Mapping[str, float], *, min_units: int = 0, round_to: int = 1
) -> dict[str, tuple[int, ...]]:
    """Return what stays, axis name to units.

    Args:
        scores: of every unit.
        budget: see `cost.absolute_budget`; met within one unit.
        min_units: at least so many units stay on every axis.
        round_to: neurons stay in multiples of this many.

    Raises:
        BudgetError: if the budget cannot be met.
    """
    shares = [(ranks(scores, axis.name) + 0.5) / axis.units for axis in scores.anatomy.axes]
    return keep_within(scores, np.concatenate(shares), min_units, budget, round_to)
