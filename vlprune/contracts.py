"""What a plug-in must offer, as Protocols: Metric, Strategy, Allocation, Task.

A family is data (`layout.Family`). The smallest plug-ins that fulfil these are the best examples:
`metrics/random.py`, `strategies/head.py`, `allocation/uniform.py`, `tasks/callables.py`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from types import TracebackType
from typing import Any, ClassVar, Literal, Protocol, Self, runtime_checkable

from torch import Tensor, nn

from vlprune.anatomy import Anatomy, Axis
from vlprune.calls import Inputs
from vlprune.dissect import ModelView
from vlprune.plan import Scores

Needs = Literal["nothing", "forward", "backward", "steps", "outputs", "measure", "task"]


class Metric(Protocol):
    """What a unit is worth. A context: gates and taps are on while it is entered.

    Attributes:
        needs: what precedes every `update`: "nothing" (the weights are enough, no update),
            a "forward", a forward and "backward", for "steps" the same with a call of `step` after
            it, `steps` times (one pass where that is None); or what `update` is given: with
            "outputs" those of a forward with gradients, with "measure" a function without arguments
            that says how well the model does now (higher is better), with "task" the task itself.
    """

    needs: ClassVar[Needs]

    def __init__(self, model: nn.Module, anatomy: Anatomy | None = None, **settings: Any): ...
    def __enter__(self) -> Self: ...
    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None: ...
    def update(self, measure: Any = None) -> None:
        """Take in one batch, or for "measure" and "task" all units; see `needs`."""

    def compute(self) -> Scores:
        """Return the scores of all that was taken in."""

    def reset(self) -> None:
        """Forget all that was taken in."""


class Strategy(Protocol):
    """Which structure goes: finds the axes of its kind in a model."""

    def __call__(self, view: ModelView) -> Iterable[Axis]: ...


class Allocation(Protocol):
    """How a budget is spread over axes: says which units stay."""

    def __call__(
        self, scores: Scores, budget: Mapping[str, float], *, min_units: int = 0, **options: Any
    ) -> dict[str, tuple[int, ...]]: ...


@runtime_checkable
class Task(Protocol):
    """Batches, a loss, and a measure (higher is better) of how well a model does its job."""

    name: str

    def batches(self) -> Iterable[Any]:
        """Yield the batches, in the same order every time."""

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        """Return the mean loss of one batch, a scalar with a gradient."""

    def measure(self, model: nn.Module) -> float:
        """Return how well `model` does on all batches; higher is better."""

    def example_inputs(self, model: nn.Module) -> Inputs | None:
        """Return the inputs of one example as `model` takes them, None where unknown."""
