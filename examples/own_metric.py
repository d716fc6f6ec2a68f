"""A metric of one's own: one class and a registry line; then it is a name like all others.

Scores a unit by the largest of its weights, and plans with it beside `magnitude`.
"""

import torch

import vlprune
from vlprune.metrics._base import AxisMetric, unit_weights
from vlprune.registry import METRICS


@METRICS.register("peak")
class Peak(AxisMetric):
    """The largest absolute weight that goes with a unit. Cost: one pass over the weights."""

    needs = "nothing"  # "forward", "backward", "outputs", ... for metrics that see data

    def update(self, measure=None):
        """Take in nothing: the weights are read by `compute`."""

    def compute(self):
        """Return one number per unit of every axis, higher = keep."""
        return self._scores({axis.name: self._peaks(axis) for axis in self.anatomy.axes})

    def _peaks(self, axis):
        rows = unit_weights(self.model, axis)  # [units, numbers per unit] for every site
        return torch.stack([row.detach().abs().amax(dim=1) for row in rows]).amax(dim=0)


# For real weights: vlprune.create_model("timm:deit_small_patch16_224", pretrained=True)
model = vlprune.create_model("scenes-deit")
plans = {
    name: vlprune.plan(vlprune.score(model, name), {"params": 0.6}, "isomorphic")
    for name in ("peak", "magnitude")
}
small = vlprune.prune(model, plans["peak"])
print(plans["peak"])
kept = [{(n, u) for n, units in p.keep.items() for u in units} for p in plans.values()]
print(f"kept by both: {len(kept[0] & kept[1]) / len(kept[0]):.0%} of the units of peak")
