"""MoPE, module-wise pruning error: how much a measure falls when one module is gone.

Heads and layers one by one; FFN neurons in groups of like importance, sorted by a cheap metric
first ("rewiring"), each neuron getting its share of the group's fall. Negative scores (removal
helps) are kept. Cost: one measure per head, layer and group, plus one.

Source: Lin et al., MoPE-CLIP, CVPR 2024 (2403.07839), section 3. The order inside a group, which
the measure does not tell, follows the cheap metric.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from vlprune.anatomy import Axis
from vlprune.contracts import Needs
from vlprune.gates import Gates
from vlprune.metrics._base import AxisMetric, unit_norms
from vlprune.plan import Scores
from vlprune.registry import METRICS

_TIE = 1e-6  # of the spread of the groups: orders the neurons inside one


@METRICS.register("mope")
class Mope(AxisMetric):
    """The fall of a measure when a unit is removed, measured, put back.

    Args:
        num_groups: groups that the neurons of one FFN are cut into, at most one per neuron.
        rewire: scores that sort the neurons; default: the norm of their weights.
        progress: called with (done, total) after every measure.
    """

    needs: ClassVar[Needs] = "measure"
    takes_scores: ClassVar[tuple[str, ...]] = ("rewire",)

    def __init__(
        self,
        model: nn.Module,
        *args: Any,
        num_groups: int = 8,
        rewire: Scores | None = None,
        progress: Callable[[int, int], None] | None = None,
        **kwargs: Any,
    ):
        if num_groups < 1:
            raise ValueError(f"num_groups must be at least 1; got {num_groups} in Mope.")
        super().__init__(model, *args, **kwargs)
        self.num_groups = num_groups
        self._rewire = rewire
        self._progress = progress

    def update(self, measure: Callable[[], float] | None = None) -> None:
        """Remove every unit in turn and call `measure`; several updates are averaged.

        Raises:
            TypeError: if no measure is given.
        """
        if measure is None:
            raise TypeError("Mope.update must be given a measure, a function without arguments.")
        assert self.gates is not None
        groups = [(axis, units) for axis in self.anatomy.axes for units in self._groups(axis)]
        dense = measure()
        falls: dict[str, Tensor] = {
            axis.name: torch.zeros(axis.units, dtype=torch.float64) for axis in self.anatomy.axes
        }
        for done, (axis, units) in enumerate(groups, start=1):
            everything = tuple(range(axis.units))
            gone = set(units)
            self.gates.keep({axis.name: tuple(u for u in everything if u not in gone)})
            try:
                fall = dense - measure()
            finally:
                self.gates.keep({axis.name: everything})
            falls[axis.name][list(units)] = fall / len(units)
            if self._progress:
                self._progress(done, len(groups))
        for axis in self.anatomy.axes:
            self._add(axis, falls[axis.name])
        self._count += 1

    def compute(self) -> Scores:
        """Return the mean fall, neurons of one group in the order of the cheap metric."""
        means = {name: total / self._count for name, total in self._totals.items()}
        for axis in self.anatomy.axes:
            if axis.kind == "ffn" and axis.name in means:
                means[axis.name] = means[axis.name] + self._ties(axis, means[axis.name])
        return self._scores(means)

    def _make_gates(self) -> Gates:
        return Gates(self.model, self.anatomy.axes)

    def _order(self, axis: Axis) -> Tensor:
        """Units from the least to the most important by the cheap metric."""
        if self._rewire is None:
            values = unit_norms(self.model, axis).cpu()
        else:
            values = torch.tensor(self._rewire.values[axis.name])
        return values.argsort(stable=True)

    def _groups(self, axis: Axis) -> Iterator[tuple[int, ...]]:
        if axis.kind != "ffn":
            yield from ((unit,) for unit in range(axis.units))
            return
        parts = self._order(axis).tensor_split(min(self.num_groups, axis.units))
        yield from (tuple(part.tolist()) for part in parts)

    def _ties(self, axis: Axis, means: Tensor) -> Tensor:
        place = torch.empty(axis.units, dtype=torch.float64)
        place[self._order(axis)] = torch.linspace(0, 1, axis.units, dtype=torch.float64)
        spread = float(means.max() - means.min())
        return place * _TIE * (spread or 1.0)

    def _settings(self) -> dict[str, Any]:
        rewire = self._rewire.metric if self._rewire else "weight norm"
        return {"updates": self._count, "num_groups": self.num_groups, "rewire": rewire}
