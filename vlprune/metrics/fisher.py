"""Diagonal Fisher: the mean over examples of the squared gate gradient.

To second order the loss rises by half of it when a unit of a trained model is removed. Cost: one
forward and backward over the data.

Source: Kwon et al., NeurIPS 2022 (2204.09656), eq. 4, with the square per example where their code
squares per batch.
"""

from __future__ import annotations

from torch import Tensor

from vlprune.metrics._gradient import GateGradientMetric
from vlprune.registry import METRICS


@METRICS.register("fisher")
class Fisher(GateGradientMetric):
    """Mean over examples of the squared gate gradient."""

    def _value(self, gradient: Tensor) -> Tensor:
        return gradient.square()
