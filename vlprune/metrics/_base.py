"""What all metrics of this folder share: model, axes, gates while entered, and the way out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Self

import torch
from torch import Tensor, nn

from vlprune.anatomy import Anatomy, Axis
from vlprune.calls import Inputs
from vlprune.consumers import parameter_of
from vlprune.dissect import dissect
from vlprune.gates import Gates
from vlprune.plan import Scores
from vlprune.registry import METRICS

DEFAULT_STRATEGIES = ("head", "ffn")


class AxisMetric:
    """A metric over the axes of a model; subclasses say what they need and how they compute.

    Args:
        model: any model that can be dissected; left as it was after the context.
        anatomy: of the model; made from it and `example_inputs` where it is not given.
        example_inputs: for the dissection; see `vlprune.dissect`.
        strategies: kinds of axes to score.
    """

    def __init__(
        self,
        model: nn.Module,
        anatomy: Anatomy | None = None,
        *,
        example_inputs: Inputs | None = None,
        strategies: tuple[str, ...] = DEFAULT_STRATEGIES,
    ):
        self.model = model
        whole = dissect(model, example_inputs) if anatomy is None else anatomy
        self.anatomy = whole.select(tuple(strategies))
        self.gates = self._make_gates()
        self.reset()

    def __enter__(self) -> Self:
        if self.gates is not None:
            self.gates.__enter__()
        return self

    def __exit__(self, *failure: object) -> None:
        if self.gates is not None:
            self.gates.__exit__(*failure)

    def reset(self) -> None:
        """Forget all that was taken in."""
        self._totals: dict[str, Tensor] = {}
        self._count = 0

    def _make_gates(self) -> Gates | None:
        """Gates to enter with the context; none by default."""
        return None

    def _settings(self) -> dict[str, Any]:
        """What the scores were made with, JSON values only."""
        return {"examples": self._count} if self._count else {}

    def _add(self, axis: Axis, values: Tensor, unit: int | None = None) -> None:
        """Add [units, ...], or the value of one unit, to the total of an axis, in float64."""
        values = values.detach().to(torch.float64)
        if axis.name not in self._totals:
            size = values.shape if unit is None else (axis.units,)
            self._totals[axis.name] = values.new_zeros(size)
        total = self._totals[axis.name]
        if unit is None:
            total += values
        else:
            total[unit] += values

    def _scores(self, values: Mapping[str, Tensor]) -> Scores:
        """Scores from [units] per axis; an axis that nothing flowed through is worth 0."""
        rows = {
            axis.name: tuple(values[axis.name].double().cpu().tolist())
            if axis.name in values
            else (0.0,) * axis.units
            for axis in self.anatomy.axes
        }
        names = [name for name, metric in METRICS.items() if metric is type(self)]
        name = names[0] if names else type(self).__name__
        return Scores(anatomy=self.anatomy, values=rows, metric=name, settings=self._settings())


def unit_weights(model: nn.Module, axis: Axis) -> list[Tensor]:
    """Return the parameters of an axis as rows [units, numbers per unit], one entry per site.

    What a unit has in a list of modules is one entry per list.
    """
    rows: list[Tensor] = [_rows_of_items(model.get_submodule(path)) for path in axis.lists]
    for site in axis.sites:
        tensor = parameter_of(model, site.tensor)
        if tensor is not None:
            indices = torch.tensor(site.indices(tuple(range(axis.units))), device=tensor.device)
            part = tensor.detach().index_select(site.dim, indices)
            rows.append(part.movedim(site.dim, 0).reshape(axis.units, -1))
    return rows


def _rows_of_items(modules: nn.Module) -> Tensor:
    """[modules, numbers of the largest]: all parameters of each module, zeros at the end."""
    flat = [torch.cat([p.detach().flatten() for p in m.parameters()]) for m in modules.children()]
    return nn.utils.rnn.pad_sequence(flat, batch_first=True)


def unit_norms(model: nn.Module, axis: Axis, p: int = 2) -> Tensor:
    """Return the p-norm [units] of all parameters of each unit of a sliced axis."""
    sums = [row.double().abs().pow(p).sum(1) for row in unit_weights(model, axis)]
    return torch.stack(sums).sum(0).pow(1 / p)
