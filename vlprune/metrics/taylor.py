"""First-order Taylor: how much the loss would change, to first order, were the unit removed.

Mean over examples of |dL/dg| at gate g = 1. Cost: one forward and backward over the data.

Source: Molchanov et al., ICLR 2017 (1611.06440), eq. 7, with the absolute value per example, and
Michel et al. 2019 (1905.10650) for heads. Not the weight form |sum w dL/dw| of torch-pruning.
"""

from __future__ import annotations

from torch import Tensor

from vlprune.metrics._gradient import GateGradientMetric
from vlprune.registry import METRICS


@METRICS.register("taylor")
class Taylor(GateGradientMetric):
    """Mean over examples of the absolute gate gradient."""

    def _value(self, gradient: Tensor) -> Tensor:
        return gradient.abs()
