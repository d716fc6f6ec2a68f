"""Semantic segmentation: cross entropy over pixels, mean IoU.

Mean IoU is the mean, over the classes that labels or answers show, of |both| / |either|, in
percent, from one confusion matrix over all pixels of all batches. A pixel whose best score is
shared or NaN has no answer: constant scores find nothing.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlprune.calls import Inputs, quiet_eval
from vlprune.registry import TASKS
from vlprune.samples import Samples
from vlprune.tasks._batches import check_labels, check_repeatable, fields, first_of, no_batches
from vlprune.tasks._models import device_of, predictions_of, wide

_IMAGES = 64  # at a time, where all are given


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Confusion:
    """How often pixels of every class got every answer.

    Attributes:
        counts: [..., C, C + 1], a row per label, a column per answer; the last: no answer.
    """

    counts: Tensor

    @property
    def iou(self) -> Tensor:
        """The IoU of every class in percent [..., C], NaN where it is in no label or answer."""
        given = self.counts[..., :-1].double()
        both = given.diagonal(dim1=-2, dim2=-1)
        return 100 * both / (self.counts.double().sum(-1) + given.sum(-2) - both)

    @property
    def mean_iou(self) -> float:
        """The mean IoU in percent of all classes that there are."""
        return float(self.iou.nanmean())

    @property
    def pixel_accuracy(self) -> float:
        """The share of pixels whose answer is right, in percent."""
        right = self.counts.diagonal(dim1=-2, dim2=-1).sum()
        return 100 * float(right) / float(self.counts.sum())


@TASKS.register("segmentation")
class Segmentation:
    """Segmentation of images, for models that answer scores [B, C, h, w].

    Scores of another size than the labels' are resized to it (bilinear). As a task that values
    every example: the mean IoU of every image alone, over the classes that are in it. The mean of
    these is another number than the measure, which counts all pixels together.

    Args:
        loader: batches {"image": [B, 3, H, W], "label": [B, H, W]} or (image, label), labels int64;
            gone through many times, so a list or a loader without shuffling.
        ignore: label of pixels that do not count, for instance 255.

    Raises:
        TypeError: if the loader can be gone through only once.
        ValueError: by any use, if the loader is empty, or a label is none of the model's classes.
    """

    name = "segmentation"

    def __init__(self, loader: Iterable[Any], ignore: int | None = None):
        check_repeatable(loader, "loader")
        self._loader = loader
        self.ignore = ignore

    def batches(self) -> Iterable[tuple[Tensor, Tensor]]:
        """Yield (image, label)."""
        for batch in self._loader:
            image, label = fields(batch, "image", "label")
            yield image, label

    def loss(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        """Return the mean cross entropy of the images of a batch."""
        return self.losses(model, self.outputs(model, batch), batch[1]).mean()

    def outputs(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> tuple[Tensor]:
        """Return the scores [B, C, h, w]."""
        return (predictions_of(model, batch[0].to(device_of(model)), "Segmentation"),)

    def targets(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        """Return the labels [B, H, W]."""
        return batch[1]

    def values(self, outputs: tuple[Tensor, ...], targets: Tensor) -> Tensor:
        """Return the mean IoU of every image [N] in percent; 0 where all its pixels are ignored."""
        (scores,) = outputs
        parts = [
            Confusion(counts=self._counts(some, labels)).iou.nanmean(-1)
            for some, labels in zip(
                torch.split(scores, _IMAGES), torch.split(targets, _IMAGES), strict=True
            )
        ]
        return torch.cat(parts).nan_to_num(0.0)

    def losses(self, model: nn.Module, outputs: tuple[Tensor, ...], targets: Tensor) -> Tensor:
        """Return the cross entropy of every image [B], the mean over its pixels that count."""
        (scores,) = outputs
        labels = check_labels(targets.to(scores.device), scores.shape[1], self.ignore)
        each = F.cross_entropy(
            _resized(scores, labels), labels, ignore_index=-1, reduction="none"
        ).flatten(1)
        return each.sum(1) / (labels >= 0).flatten(1).sum(1).clamp(min=1)

    def logits(self, model: nn.Module, outputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Return the scores with classes last [B, h * w, C]."""
        return tuple(scores.flatten(2).transpose(1, 2) for scores in outputs)

    def measure(self, model: nn.Module) -> float:
        """Return the mean IoU in percent."""
        return self.confusion(model).mean_iou

    def confusion(self, model: nn.Module) -> Confusion:
        """Return the confusion matrix of all batches."""
        return Confusion(counts=self.confusions(model).counts.sum(0))

    def samples(self, model: nn.Module) -> Samples:
        """Return the confusion matrix of every image, and the mean IoU of their mean."""
        counts = self.confusions(model).counts.cpu()
        shape = counts.shape[1:]
        return Samples(
            rows=counts.flatten(1).double(),
            of_means=lambda means: _mean_iou(means.reshape(*means.shape[:-1], *shape)),
        )

    def confusions(self, model: nn.Module) -> Confusion:
        """Return the confusion matrix of every image [N, C, C + 1]."""
        with torch.no_grad(), quiet_eval(model):
            counts = [
                self._counts(*self.outputs(model, batch), batch[1]) for batch in self.batches()
            ]
        if not counts:
            raise no_batches("Segmentation")
        return Confusion(counts=torch.cat(counts))

    def example_inputs(self, model: nn.Module) -> Inputs:
        """Return one image."""
        return (first_of(self.batches(), "Segmentation")[0][:1],)

    def _counts(self, scores: Tensor, labels: Tensor) -> Tensor:
        """How often each label of each image got each answer [B, C, C + 1]."""
        size, classes = scores.shape[:2]
        labels = check_labels(labels.to(scores.device), classes, self.ignore)
        scores = _resized(scores, labels)
        best = scores.amax(1, keepdim=True)
        alone = (scores == best).sum(1) == 1  # one class has the best score, and it is no NaN
        answers = scores.argmax(1).where(alone, torch.full_like(labels, classes))
        image = torch.arange(size, device=scores.device)[:, None, None].expand_as(labels)
        cell = (image * classes + labels) * (classes + 1) + answers
        counts = torch.bincount(cell[labels >= 0], minlength=size * classes * (classes + 1))
        return counts.view(size, classes, classes + 1)


def _mean_iou(counts: Tensor) -> Tensor:
    return Confusion(counts=counts).iou.nanmean(-1)


def _resized(scores: Tensor, labels: Tensor) -> Tensor:
    """Scores [B, C, h, w] as large as labels [B, H, W], in float32 or better."""
    scores = wide(scores)
    if scores.shape[2:] == labels.shape[1:]:
        return scores
    return F.interpolate(scores, labels.shape[1:], mode="bilinear", align_corners=False)
