"""A task from two callables: the shortest way to score a model on one's own loss and data."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from vlprune.calls import Inputs, quiet_eval
from vlprune.registry import TASKS
from vlprune.tasks._batches import check_repeatable


@TASKS.register("callables")
class CallableTask:
    """A task from `loss(model, batch)` and, where it is better, `measure(model)`.

    Args:
        batches: a list or loader that can be gone through many times.
        loss: model and batch to a scalar, the mean over the batch.
        measure: model to a float, higher is better; default: minus the mean loss. With one of
            one's own, mope calls it once for every removal; without, it is spared most of that.
        outputs: model and batch to predictions [B, choices], for the measures "kl" and "cosine".
        example_inputs: inputs of one example, for dissecting and checking the model.
        name: for reports.

    Raises:
        TypeError: if `batches` can be gone through only once.
    """

    def __init__(
        self,
        batches: Iterable[Any],
        loss: Callable[[nn.Module, Any], Tensor],
        measure: Callable[[nn.Module], float] | None = None,
        outputs: Callable[[nn.Module, Any], Tensor] | None = None,
        example_inputs: Inputs | None = None,
        name: str = "callables",
    ):
        check_repeatable(batches, "batches")
        self.name = name
        self._batches = batches
        self._loss = loss
        self._measure = measure
        self._outputs = outputs
        self._example_inputs = example_inputs

    def batches(self) -> Iterable[Any]:
        """Yield the batches."""
        return self._batches

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        """Return the mean loss of one batch."""
        return self._loss(model, batch)

    def measure(self, model: nn.Module) -> float:
        """Return the measure, or minus the mean loss over batches."""
        with torch.no_grad(), quiet_eval(model):
            if self._measure is not None:
                return float(self._measure(model))
            losses = [self._loss(model, batch) for batch in self._batches]
        if not losses:
            raise ValueError("batches must hold at least one batch; got none in CallableTask.")
        return -float(torch.stack(losses).mean())

    @property
    def values_examples(self) -> bool:
        """Whether the measure is a mean over batches, which `outputs` and `values` then give."""
        return self._measure is None

    def outputs(self, model: nn.Module, batch: Any) -> tuple[Tensor, ...]:
        """Return the loss of the batch [1], and predictions where there are any."""
        loss = self._loss(model, batch).reshape(1)
        return (loss,) if self._outputs is None else (loss, self._outputs(model, batch))

    def targets(self, batch: Any) -> Tensor:
        """Return nothing [0]: what a loss needs stays with the batch."""
        return torch.empty(0)

    def values(self, outputs: tuple[Tensor, ...], targets: Tensor) -> Tensor:
        """Return minus the loss of every batch [batches]."""
        return -outputs[0]

    def losses(self, model: nn.Module, outputs: tuple[Tensor, ...], targets: Tensor) -> Tensor:
        """Return the loss of the batch [1]."""
        return outputs[0]

    def logits(self, model: nn.Module, outputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Return the predictions [B, choices].

        Raises:
            TypeError: if no `outputs` were given.
        """
        if len(outputs) < 2:
            raise TypeError("measure 'kl' needs predictions; give CallableTask(outputs=...).")
        return outputs[1:]

    def example_inputs(self, model: nn.Module) -> Inputs | None:
        """Return the inputs of one example, None where they were not given."""
        return self._example_inputs
