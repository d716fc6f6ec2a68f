"""Statements about two pictures, true or false: accuracy in percent.

For models that take `input_ids`, `pixel_values` [B, 2, C, H, W] and `attention_mask` and answer
with logits [B, 2], as `vlprune.models.blip_reasoning` does. Ties count against.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from vlprune.calls import Inputs
from vlprune.registry import TASKS
from vlprune.tasks._batches import check_repeatable, fields, first_of
from vlprune.tasks._examples import is_best, mean_value
from vlprune.tasks._models import device_of

Batch = tuple[Tensor, Tensor, Tensor]


@TASKS.register("reasoning")
class VisualReasoning:
    """Is a statement about two pictures true?

    Source:
        NLVR2 (Suhr et al., 2019, arXiv 1811.00491), whose form and measure these are.

    Args:
        loader: batches {"image": [B, 2, C, H, W], "text": [B, T], "label": [B]} or such tuples; a
            label is 1 where the statement is true, else 0. Gone through many times.
        pad: id of padding in texts.

    Raises:
        TypeError: if the loader can be gone through only once.
        ValueError: by any use, if the loader is empty.
    """

    name = "reasoning"

    def __init__(self, loader: Iterable[Any], pad: int = 0):
        check_repeatable(loader, "loader")
        self._loader = loader
        self.pad = pad

    def batches(self) -> Iterable[Batch]:
        """Yield (image, text, label)."""
        for batch in self._loader:
            image, text, label = fields(batch, "image", "text", "label")
            yield image, text, label

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return the cross-entropy, the mean of the batch."""
        return self.losses(model, self.outputs(model, batch), self.targets(batch)).mean()

    def outputs(self, model: nn.Module, batch: Batch) -> tuple[Tensor]:
        """Return the logits [B, 2]: false, true."""
        inputs = self._inputs(batch)
        device = device_of(model)
        return (model(**{name: tensor.to(device) for name, tensor in inputs.items()}).logits,)

    def targets(self, batch: Batch) -> Tensor:
        """Return the labels [B]."""
        return batch[2]

    def values(self, outputs: tuple[Tensor, ...], targets: Tensor) -> Tensor:
        """Return 100 where the answer is right, else 0 [N]."""
        return 100 * is_best(outputs[0], targets.to(outputs[0].device)).double()

    def losses(self, model: nn.Module, outputs: tuple[Tensor, ...], targets: Tensor) -> Tensor:
        """Return the cross-entropy of every example [B]."""
        return F.cross_entropy(outputs[0], targets.to(outputs[0].device), reduction="none")

    def logits(self, model: nn.Module, outputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Return the logits [B, 2]."""
        return outputs

    def measure(self, model: nn.Module) -> float:
        """Return the accuracy in percent."""
        return mean_value(self, model)

    def example_inputs(self, model: nn.Module) -> Inputs:
        """Return one pair of pictures and its statement, by the keywords of the model."""
        image, text, label = (x[:1] for x in first_of(self.batches(), type(self).__name__))
        return self._inputs((image, text, label))

    def _inputs(self, batch: Batch) -> dict[str, Tensor]:
        image, text, _ = batch
        mask = (text != self.pad).long()
        return {"pixel_values": image, "input_ids": text, "attention_mask": mask}
