"""What an ablation is judged by: a number for every example, higher is better.

"task" is the task's own measure. The others are continuous, so that an effect of one head shows on
a hundred examples: "loss" (minus the task's loss), "kl" (minus the Kullback-Leibler divergence of
the ablated from the dense predictions) and "cosine" (minus 1 - cosine between dense and ablated
outputs). The last two need no labels.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Outputs = tuple[Tensor, ...]
Kept = tuple[Tensor | None, ...]


class ExampleTask(Protocol):
    """A task that says how well a model does on every example, from what it gives for it.

    It offers all that a `contracts.Task` does, and what a batch of B examples gives as tensors
    [B, ...], so that these can be kept, compared and measured later. An attribute `mixes_examples`
    that is true says that outputs of an example depend on which others are in its batch.
    """

    def batches(self) -> Iterable[Any]:
        """Yield the batches, in the same order every time."""

    def outputs(self, model: nn.Module, batch: Any) -> Outputs:
        """Return what `model` gives for a batch: tensors [B, ...]."""

    def targets(self, batch: Any) -> Tensor:
        """Return what `values` and `losses` need of a batch, small: [B, ...]."""

    def values(self, outputs: Outputs, targets: Tensor) -> Tensor:
        """Return the measure of every example [N], of all outputs [N, ...]; the mean counts."""

    def losses(self, model: nn.Module, outputs: Outputs, targets: Tensor) -> Tensor:
        """Return the loss of every example [B] of one batch."""

    def logits(self, model: nn.Module, outputs: Outputs) -> tuple[Tensor, ...]:
        """Return predictions [B, ..., choices] of one batch, before the softmax."""


class Measure:
    """What is kept of a batch, and how examples are valued by what was kept of all.

    Args:
        task: gives outputs, targets and losses.
        model: the dense one, for what losses need of it (a temperature).
    """

    def __init__(self, task: ExampleTask, model: nn.Module):
        self.task = task
        self.model = model

    def keep(self, outputs: Outputs, dense: Outputs, targets: Tensor) -> Kept:
        """Return what to keep of a batch, by default a value for every example [B]."""
        return (self.value(outputs, dense, targets).double().cpu(),)

    def value(self, outputs: Outputs, dense: Outputs, targets: Tensor) -> Tensor:
        """Return the value of every example of a batch [B]."""
        raise NotImplementedError

    def values(
        self, kept: Sequence[Kept], dense: Sequence[Kept], targets: Sequence[Tensor]
    ) -> Tensor:
        """Return the value of every example [N] from what was kept of all batches."""
        return torch.cat([value for (value,) in kept if value is not None])


class TaskMeasure(Measure):
    """The task's own measure; it may compare examples of all batches, so outputs are kept."""

    def keep(self, outputs: Outputs, dense: Outputs, targets: Tensor) -> Kept:
        """Return the outputs that differ from the dense ones."""
        pairs = zip(outputs, dense, strict=True)
        return tuple(None if a is b or torch.equal(a, b) else a.cpu() for a, b in pairs)

    def values(
        self, kept: Sequence[Kept], dense: Sequence[Kept], targets: Sequence[Tensor]
    ) -> Tensor:
        """Return the measure of every example [N]."""
        whole = [
            tuple(b if a is None else a for a, b in zip(one, other, strict=True))
            for one, other in zip(kept, dense, strict=True)
        ]
        outputs = tuple(torch.cat(parts) for parts in zip(*whole, strict=True))
        return self.task.values(outputs, torch.cat(list(targets))).double()


class LossMeasure(Measure):
    """Minus the task's loss; for retrieval the contrastive loss in the batch."""

    def value(self, outputs: Outputs, dense: Outputs, targets: Tensor) -> Tensor:
        """Return minus the losses [B]."""
        return -self.task.losses(self.model, outputs, targets)


class KLMeasure(Measure):
    """Minus KL(dense || ablated) of predictions; for retrieval of both rows of similarities."""

    def value(self, outputs: Outputs, dense: Outputs, targets: Tensor) -> Tensor:
        """Return minus the divergences [B]."""
        pairs = zip(
            self.task.logits(self.model, outputs), self.task.logits(self.model, dense), strict=True
        )
        parts = []
        for logits, before in pairs:
            expected = before.double().log_softmax(-1)
            each = (expected.exp() * (expected - logits.double().log_softmax(-1))).sum(-1)
            parts.append(each.reshape(len(each), -1).mean(-1))  # [B, ...] -> [B]
        return -torch.stack(parts).mean(0)


class CosineMeasure(Measure):
    """Minus 1 - cosine between dense and ablated outputs, each flattened per example."""

    def value(self, outputs: Outputs, dense: Outputs, targets: Tensor) -> Tensor:
        """Return minus the distances [B]."""
        parts = [
            F.cosine_similarity(a.flatten(1).double(), b.flatten(1).double(), dim=-1) - 1
            for a, b in zip(outputs, dense, strict=True)
            if a.dim() > 1
        ]
        if not parts:
            raise TypeError("measure 'cosine' needs outputs [B, features]; this task gives none.")
        return torch.stack(parts).mean(0)


MEASURES: dict[str, type[Measure]] = {
    "task": TaskMeasure,
    "loss": LossMeasure,
    "kl": KLMeasure,
    "cosine": CosineMeasure,
}


def is_example_task(task: Any, measure: str = "task") -> bool:
    """Say whether a task offers what a measure needs.

    For "task", the attribute `values_examples` may say that outputs do not give the task's measure.
    """
    names = ("batches", "outputs", "targets", "values", "losses", "logits")
    offered = all(callable(getattr(task, name, None)) for name in names)
    return offered and (measure != "task" or bool(getattr(task, "values_examples", True)))
