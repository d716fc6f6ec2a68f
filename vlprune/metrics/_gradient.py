"""What the gradient metrics share: a gate of ones per example, read after every backward."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import ClassVar

from torch import Tensor

from vlprune.contracts import Needs
from vlprune.gates import Gates
from vlprune.metrics._base import AxisMetric
from vlprune.plan import Scores


class GateGradientMetric(AxisMetric):
    """The mean over examples of a function of each example's own gate gradient.

    The loss is taken to be a mean over the batch, so gradients are multiplied by its size.
    `update` after each backward; several losses before it would be added up.
    """

    needs: ClassVar[Needs] = "backward"

    def update(self, measure: Callable[[], float] | None = None) -> None:
        """Take in the gate gradients of the last backward.

        Raises:
            RuntimeError: if there was no backward since the last call.
        """
        assert self.gates is not None
        gradients = self.gates.sample_gradients()
        if not gradients:
            raise RuntimeError(
                f"{type(self).__name__}.update must follow loss.backward(); got no gate gradient. "
                "Run forward and backward inside the `with` block, without torch.no_grad."
            )
        self._count += max(gradient.shape[0] for *_, gradient in gradients)
        axes = {axis.name: axis for axis in self.anatomy.axes}
        for name, unit, gradient in gradients:
            values = self._value(gradient.double() * gradient.shape[0]).sum(0)
            self._add(axes[name], values if unit is None else values.squeeze(0), unit)

    def compute(self) -> Scores:
        """Return the mean per example."""
        return self._scores({name: total / self._count for name, total in self._totals.items()})

    def _make_gates(self) -> Gates:
        return Gates(self.model, self.anatomy.axes, per_sample=True)

    @abstractmethod
    def _value(self, gradient: Tensor) -> Tensor:
        """[examples, units] gradients of each example's loss to what is averaged."""
