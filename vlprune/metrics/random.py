"""Random scores: the floor that every metric must beat.

Cost: nothing. Needs no data.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import nn

from vlprune.contracts import Needs
from vlprune.metrics._base import AxisMetric
from vlprune.plan import Scores
from vlprune.registry import METRICS


@METRICS.register("random")
class Random(AxisMetric):
    """Uniform numbers in [0, 1), drawn from a seed.

    Args:
        seed: of the generator; equal seeds give equal scores.
    """

    needs: ClassVar[Needs] = "nothing"

    def __init__(self, model: nn.Module, *args: Any, seed: int = 0, **kwargs: Any):
        super().__init__(model, *args, **kwargs)
        self.seed = seed

    def update(self, measure: Callable[[], float] | None = None) -> None:
        """Take in nothing."""

    def compute(self) -> Scores:
        """Return the scores."""
        generator = torch.Generator().manual_seed(self.seed)
        return self._scores(
            {a.name: torch.rand(a.units, generator=generator) for a in self.anatomy.axes}
        )

    def _settings(self) -> dict[str, Any]:
        return {"seed": self.seed}
