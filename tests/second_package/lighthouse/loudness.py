"""Loudness: the largest weight that goes with a unit. A metric of another package, in one file."""

import torch

from vlprune.metrics._base import AxisMetric


class Loudness(AxisMetric):
    """Largest absolute weight of a unit, over all tensors that it has rows of."""

    needs = "nothing"

    def update(self, measure=None):
        """Take in nothing: the weights are read by `compute`."""

    def compute(self):
        """Return one number per unit of every axis, higher = keep."""
        return self._scores({axis.name: self._loudest(axis) for axis in self.anatomy.axes})

    def _loudest(self, axis):
        parts = []
        for site in axis.sites:
            rows = self.model.get_parameter(site.tensor).detach().movedim(site.dim, 0)
            rows = rows[site.offset : site.offset + axis.units * site.block]
            parts.append(rows.reshape(axis.units, -1).abs().amax(1))
        return torch.stack(parts).amax(0)
