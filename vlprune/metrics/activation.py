"""Activation: the norm of what a unit adds to its layer's output, from forward passes alone.

For a head or a neuron the sum over its features of |x_j|_2 * |W_:j|_2, with x_j the feature over
all tokens and W the consumer's weight; for a layer or half the Frobenius norm of what it adds; for
query dimensions, which no matrix consumes, the norm of the features; for an expert how many tokens
were sent to it.
Cost: one forward pass over the data, one number per feature.

Source: Sun et al., Wanda, ICLR 2024 (2306.11695), eq. 1, summed over columns as in FLAP's Wanda-sp
(2312.11983). We take the L2 norm of the column where Wanda-sp takes the mean of |W|, so that the
score of a neuron is exactly the norm of its contribution. Padding tokens are counted.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor

from vlprune.anatomy import Axis
from vlprune.consumers import parameter_of
from vlprune.contracts import Needs
from vlprune.gates import Gates
from vlprune.metrics._base import AxisMetric
from vlprune.plan import Scores
from vlprune.registry import METRICS


@METRICS.register("activation")
class Activation(AxisMetric):
    """Wanda-style: input norm times weight norm of the consumer. `update` after each forward."""

    needs: ClassVar[Needs] = "forward"

    def update(self, measure: Callable[[], float] | None = None) -> None:
        """Count one batch; its statistics were taken while it ran."""
        self._count += 1

    def compute(self) -> Scores:
        """Return the scores of all forwards since the last `reset`."""
        return self._scores(
            {a.name: self._norms(a) for a in self.anatomy.axes if a.name in self._totals}
        )

    def _make_gates(self) -> Gates:
        return Gates(self.model, self.anatomy.axes, tap=self._tap)

    def _tap(self, axis: Axis, unit: int | None, x: Tensor, out: Tensor | None) -> None:
        if unit is None:
            self._add(axis, x.detach().float().pow(2).flatten(0, -3).sum(0))
            return
        added = x if out is None else out if axis.gate.kind == "output" else out - x
        self._add(axis, added.detach().float().pow(2).sum(), unit)

    def _norms(self, axis: Axis) -> Tensor:
        squares = self._totals[axis.name]
        if axis.gate.kind == "product":
            return squares.sum(1).sqrt()
        if axis.gate.kind == "router":
            return squares.sum(1)
        if axis.gate.kind != "input":
            return squares.sqrt()
        weight = parameter_of(self.model, f"{axis.gate.modules[0]}.weight")
        assert weight is not None
        others = [d for d in range(weight.dim()) if d != 1]
        columns = torch.linalg.vector_norm(weight.detach().double(), dim=others)
        columns = columns.reshape(axis.gate.repeats, axis.units, axis.gate.block).transpose(0, 1)
        features: Tensor = squares.sqrt() * columns.flatten(1)  # [units, features of a unit]
        return features.sum(1)

    def _settings(self) -> dict[str, int]:
        return {"batches": self._count}
