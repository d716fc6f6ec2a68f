"""Image classification: cross entropy, top-1 accuracy; supervised, or zero-shot by dual encoders.

Accuracy is the share of images whose class alone has the best score, in percent. Ties count
against, and NaN finds nothing. Zero-shot, a class is the mean of what is written of it (Radford et
al., 2021, arXiv 2103.00020, section 3.1.4).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlprune.calls import Inputs, quiet_eval
from vlprune.registry import TASKS
from vlprune.tasks._batches import check_labels, check_repeatable, fields, first_of, no_batches
from vlprune.tasks._examples import is_best
from vlprune.tasks._models import (
    device_of,
    encode_image,
    encode_text,
    logit_scale,
    pair_inputs,
    predictions_of,
    wide,
)


@TASKS.register("classification")
class Classification:
    """Classification of images, for models that answer scores [B, C], or zero-shot for CLIPs.

    With `prompts`, the score of a class is logit scale * cosine of the image's features and the
    class's: the mean of its texts' features of length 1. All texts run with every batch.

    Args:
        loader: batches {"image": [B, 3, H, W], "label": [B]} or (image, label), labels int64; gone
            through many times, so a list or a loader without shuffling.
        prompts: token ids [C, prompts, T] of what is written of every class; None: supervised.

    Raises:
        TypeError: if the loader can be gone through only once.
        ValueError: if the prompts are of another shape; by any use, if the loader is empty, or a
            label is none of the model's classes.
    """

    name = "classification"

    def __init__(self, loader: Iterable[Any], prompts: Tensor | None = None):
        check_repeatable(loader, "loader")
        if prompts is not None and prompts.dim() != 3:
            raise ValueError(
                f"prompts must be token ids [classes, prompts, T]; got shape "
                f"{tuple(prompts.shape)}. For one prompt a class give prompts[:, None]."
            )
        self._loader = loader
        self.prompts = prompts

    def batches(self) -> Iterable[tuple[Tensor, Tensor]]:
        """Yield (image, label)."""
        for batch in self._loader:
            image, label = fields(batch, "image", "label")
            yield image, label

    def loss(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        """Return the mean cross entropy of one batch."""
        return self.losses(model, self.outputs(model, batch), batch[1]).mean()

    def outputs(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> tuple[Tensor]:
        """Return the scores [B, C] before the softmax."""
        return (self._scores(model, batch[0], self.class_features(model)),)

    def targets(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        """Return the labels [B]."""
        return batch[1]

    def values(self, outputs: tuple[Tensor, ...], targets: Tensor) -> Tensor:
        """Return 100 for every image [N] whose class alone has the best score, 0 for others."""
        (scores,) = outputs
        labels = check_labels(targets.to(scores.device), scores.shape[1])
        return 100 * is_best(scores, labels).double()

    def losses(self, model: nn.Module, outputs: tuple[Tensor, ...], targets: Tensor) -> Tensor:
        """Return the cross entropy of every image [B]."""
        (scores,) = outputs
        labels = check_labels(targets.to(scores.device), scores.shape[1])
        return F.cross_entropy(wide(scores), labels, reduction="none")

    def logits(self, model: nn.Module, outputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Return the scores [B, C]."""
        return outputs

    def measure(self, model: nn.Module) -> float:
        """Return the accuracy in percent."""
        hits = []
        with torch.no_grad(), quiet_eval(model):
            classes = self.class_features(model)
            for image, label in self.batches():
                hits.append(self.values((self._scores(model, image, classes),), label))
        if not hits:
            raise no_batches("Classification")
        return float(torch.cat(hits).mean())

    def class_features(self, model: nn.Module) -> Tensor | None:
        """Return the features of every class [C, E], of length 1; None where there are no prompts.

        Raises:
            TypeError: if the model encodes no texts.
        """
        if self.prompts is None:
            return None
        texts = self.prompts.flatten(0, 1).to(device_of(model))
        features = F.normalize(encode_text(model, texts), dim=-1)  # [C * prompts, E]
        by_class = features.reshape(*self.prompts.shape[:2], -1)
        return F.normalize(by_class.mean(1), dim=-1)

    def example_inputs(self, model: nn.Module) -> Inputs:
        """Return one image, with one text where there are prompts: both towers are to run."""
        image = first_of(self.batches(), "Classification")[0][:1]
        if self.prompts is None:
            return (image,)
        return pair_inputs(model, image, self.prompts[0, :1])

    def _scores(self, model: nn.Module, image: Tensor, classes: Tensor | None) -> Tensor:
        image = image.to(device_of(model))
        if classes is None:
            return predictions_of(model, image, "Classification")
        features = F.normalize(encode_image(model, image), dim=-1)
        return logit_scale(model) * features @ classes.T
