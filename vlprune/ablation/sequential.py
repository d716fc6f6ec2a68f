"""Stopping early: a unit is measured until it is clear on which side of the cut it lies.

After every look (1, 2, 4, ... batches) the units are ranked by fall per cost, as a global plan
would, and the place of the cut is where the budget is met. A unit stops when its falls differ from
those of the units around the cut, example by example, by more than chance: a paired t-test at level
error_rate / (k * (k + 1)) at the k-th look, which adds up to error_rate over all looks. Means are
taken to be normal; that the cut itself moves a little with the data is not accounted for.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping

import torch
from torch import Tensor

from vlprune.ablation.removals import Removal
from vlprune.anatomy import Anatomy
from vlprune.cost import SMALLEST, absolute_budget, fits, price, resource_of

_FEWEST = 8  # examples before anything is said
_AROUND = 2  # removals on either side of the cut that stand for it


class Adaptive:
    """Says which removals are settled for a plan of one budget; a `Stopper` of the engine.

    Args:
        anatomy: of the axes that are measured.
        budget: see `cost.absolute_budget`.
        error_rate: of one removal stopping on the wrong side, over all looks.

    Attributes:
        undecided: removals that no look has settled.
    """

    def __init__(self, anatomy: Anatomy, budget: Mapping[str, float], error_rate: float = 0.05):
        if not 0 < error_rate < 1:
            raise ValueError(f"error_rate must be between 0 and 1; got {error_rate}.")
        self._anatomy = anatomy
        self._limits = absolute_budget(anatomy, budget)
        self._resource = resource_of(budget)
        self._error_rate = error_rate
        self._dense = price(anatomy, {})
        self._costs: dict[Removal, float] = {}
        self._looks = 0
        self._settled: set[Removal] = set()
        self.undecided: list[Removal] = []

    def decided(self, falls: Mapping[Removal, Tensor]) -> set[Removal]:
        """Return the removals that are settled by now."""
        self._looks += 1
        level = self._error_rate / (self._looks * (self._looks + 1))
        rows = {removal: row.double() / self._cost(removal) for removal, row in falls.items()}
        order = sorted(rows, key=lambda removal: float(rows[removal].mean()))
        cut = self._place_of_cut(order)
        open_ = [removal for removal in order if removal not in self._settled]
        nearest = sorted(open_, key=lambda removal: abs(order.index(removal) + 0.5 - cut))
        around = set(nearest[: 2 * _AROUND])
        if around:
            size = min(len(rows[removal]) for removal in around)
            middle = torch.stack([rows[removal][:size] for removal in around]).mean(0)
            for removal in open_:
                if removal not in around and _differ(rows[removal], middle, level):
                    self._settled.add(removal)
        self.undecided = [removal for removal in order if removal not in self._settled]
        return self._settled

    def _cost(self, removal: Removal) -> float:
        if removal not in self._costs:
            axis = self._anatomy.axis(removal.axis)
            without = getattr(price(self._anatomy, removal.rest(axis)), self._resource)
            saved = getattr(self._dense, self._resource) - without
            self._costs[removal] = max(saved, SMALLEST[self._resource])
        return self._costs[removal]

    def _place_of_cut(self, order: list[Removal]) -> int:
        """How many removals, least worth first, meet the budget."""
        few, many = 0, len(order)
        while few < many:
            middle = (few + many) // 2
            if fits(price(self._anatomy, self._keep(order[:middle])), self._limits):
                many = middle
            else:
                few = middle + 1
        return few

    def _keep(self, removed: list[Removal]) -> dict[str, tuple[int, ...]]:
        gone: dict[str, set[int]] = {}
        for removal in removed:
            gone.setdefault(removal.axis, set()).update(removal.units)
        return {
            name: tuple(u for u in range(self._anatomy.axis(name).units) if u not in units)
            for name, units in gone.items()
        }


def _differ(row: Tensor, other: Tensor, level: float) -> bool:
    """Say whether two rows differ in their means over the same examples, by a paired t-test."""
    size = min(len(row), len(other))
    if size < _FEWEST:
        return False
    difference = row[:size] - other[:size]
    spread = float(difference.std()) / size**0.5
    z = statistics.NormalDist().inv_cdf(1 - level / 2)
    t = z + (z**3 + z) / (4 * (size - 1))  # Student's quantile to first order
    return bool(abs(float(difference.mean())) > t * spread)
