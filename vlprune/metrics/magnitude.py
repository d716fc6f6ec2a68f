"""Weight magnitude: the norm of all weights that go with a unit.

Cost: one pass over the weights, no data. Source: Han et al. 2015 (1506.02626) for weights, Li et
al. 2017 (1608.08710) for structures; here over the whole coupled group, as torch-pruning does.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from vlprune.anatomy import Axis, under
from vlprune.contracts import Needs
from vlprune.metrics._base import AxisMetric, unit_norms
from vlprune.plan import Scores
from vlprune.registry import METRICS


@METRICS.register("magnitude")
class Magnitude(AxisMetric):
    """(sum of |w|^p)^(1/p) over every weight and bias of the unit.

    Args:
        p: 1 or 2, the norm.

    Raises:
        ValueError: for another `p`.
    """

    needs: ClassVar[Needs] = "nothing"

    def __init__(self, model: nn.Module, *args: Any, p: int = 2, **kwargs: Any):
        if p not in (1, 2):
            raise ValueError(f"p must be 1 or 2; got {p!r} in Magnitude.")
        super().__init__(model, *args, **kwargs)
        self.p = p

    def update(self, measure: Callable[[], float] | None = None) -> None:
        """Take in nothing: the weights are read by `compute`."""

    def compute(self) -> Scores:
        """Return the scores."""
        return self._scores({axis.name: self._norms(axis) for axis in self.anatomy.axes})

    def _norms(self, axis: Axis) -> Tensor:
        if axis.removal == "slice":
            return unit_norms(self.model, axis, self.p)
        return torch.stack([self._scope_norm(scopes) for scopes in axis.scopes])

    def _scope_norm(self, scopes: tuple[str, ...]) -> Tensor:
        parts = [
            parameter.detach().double().abs().pow(self.p).sum()
            for name, parameter in self.model.named_parameters()
            if any(under(name, scope) for scope in scopes)
        ]
        return sum(parts, start=torch.zeros((), dtype=torch.float64)).pow(1 / self.p)

    def _settings(self) -> dict[str, Any]:
        return {"p": self.p}
