"""Image-text retrieval for dual encoders: contrastive loss, recall mean.

Recall mean is the mean of R@1, R@5 and R@10, text retrieval and image retrieval, in percent. Ties
count against: constant embeddings score nothing. Images whose captions are equal are all correct
answers to each other's captions.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlprune.calls import Inputs, quiet_eval
from vlprune.registry import TASKS
from vlprune.tasks._batches import check_repeatable, first_of, no_batches, pair_of
from vlprune.tasks._models import device_of, encode_image, encode_text, logit_scale, pair_inputs

Encode = Callable[[nn.Module, Tensor, Tensor], tuple[Tensor, Tensor]]
_ROWS = 256  # of similarities at a time


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Recall:
    """Recalls in percent; text retrieval is image to text."""

    text: dict[int, float]
    image: dict[int, float]

    @property
    def mean(self) -> float:
        """The mean of all."""
        values = [*self.text.values(), *self.image.values()]
        return sum(values) / len(values)


@TASKS.register("retrieval")
class Retrieval:
    """Retrieval over pairs of images and token ids.

    Args:
        loader: batches {"image": [B, C, H, W], "text": [B, T]} or (image, text); gone through many
            times, so a list or a loader without shuffling. Two captions are equal when their
            token ids are.
        ks: the k of recall at k.
        encode: (model, image, text) to features [B, E] each, before normalisation; default: the
            model's `encode_image` and `encode_text`, or `get_image_features` and
            `get_text_features`.

    Raises:
        TypeError: if the loader can be gone through only once.
        ValueError: by any use, if the loader is empty.
    """

    name = "retrieval"

    def __init__(
        self,
        loader: Iterable[Any],
        ks: tuple[int, ...] = (1, 5, 10),
        encode: Encode | None = None,
    ):
        check_repeatable(loader, "loader")
        self._loader = loader
        self.ks = ks
        self._encode = encode or encode_pair

    def batches(self) -> Iterable[tuple[Tensor, Tensor]]:
        """Yield (image, text)."""
        for batch in self._loader:
            yield pair_of(batch, "text")

    def loss(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        """Return the symmetric InfoNCE of one batch, at the model's own temperature."""
        return self.losses(model, self.outputs(model, batch), batch[1]).mean()

    def outputs(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Return image and text features [B, E] of length 1."""
        image, text = (x.to(device_of(model)) for x in batch)
        return self._features(model, image, text)

    def targets(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        """Return the token ids [B, T]: equal ones are equal captions."""
        return batch[1]

    def values(self, outputs: tuple[Tensor, ...], targets: Tensor) -> Tensor:
        """Return the recall mean of every pair [N] in percent, both ways."""
        images, texts = (features.float() for features in outputs)
        groups = _groups(targets.to(images.device))
        both = (_hits(images, texts, groups, self.ks), _hits(texts, images, groups, self.ks))
        return 100 * torch.stack([hit.double() for hits in both for hit in hits.values()]).mean(0)

    def losses(self, model: nn.Module, outputs: tuple[Tensor, ...], targets: Tensor) -> Tensor:
        """Return the symmetric InfoNCE of every pair [B] in its batch."""
        target = torch.arange(len(outputs[0]), device=outputs[0].device)
        both = [
            F.cross_entropy(logits, target, reduction="none")
            for logits in self.logits(model, outputs)
        ]
        return torch.stack(both).mean(0)

    def logits(self, model: nn.Module, outputs: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        """Return similarities at the model's temperature: images by texts, texts by images."""
        images, texts = outputs
        logits = logit_scale(model) * images @ texts.T
        return logits, logits.T

    def measure(self, model: nn.Module) -> float:
        """Return the recall mean in percent."""
        return self.recall(model).mean

    def recall(self, model: nn.Module) -> Recall:
        """Return every recall."""
        images, texts, ids = [], [], []
        with torch.no_grad(), quiet_eval(model):
            for image, text in self.batches():
                image_features, text_features = self._features(
                    model, image.to(device_of(model)), text.to(device_of(model))
                )
                images.append(image_features)
                texts.append(text_features)
                ids.append(text)
        if not images:
            raise no_batches("Retrieval")
        image, text = torch.cat(images).float(), torch.cat(texts).float()
        groups = _groups(torch.cat(ids).to(image.device))
        return _recall(_hits(image, text, groups, self.ks), _hits(text, image, groups, self.ks))

    def example_inputs(self, model: nn.Module) -> Inputs:
        """Return one image and one text, by the keywords of transformers where it is its model."""
        image, text = first_of(self.batches(), "Retrieval")
        return pair_inputs(model, image[:1], text[:1])

    def _features(self, model: nn.Module, image: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        image_features, text_features = self._encode(model, image, text)
        return F.normalize(image_features, dim=-1), F.normalize(text_features, dim=-1)


def recall(similarity: Tensor, captions: Tensor, ks: tuple[int, ...] = (1, 5, 10)) -> Recall:
    """Return recalls of a similarity matrix.

    Args:
        similarity: [images, texts], row i belongs to column i.
        captions: token ids [texts, T]; columns with equal ids are equally correct.
        ks: the k of recall at k.
    """
    groups = _groups(captions)
    correct = groups[:, None] == groups[None, :]
    return _recall(_first(similarity, correct, ks), _first(similarity.T, correct, ks))


def _recall(text: dict[int, Tensor], image: dict[int, Tensor]) -> Recall:
    """Recalls from which images found a text, and which texts an image."""
    shares = [
        {k: 100 * float(hit.double().mean()) for k, hit in hits.items()} for hits in (text, image)
    ]
    return Recall(text=shares[0], image=shares[1])


def _groups(captions: Tensor) -> Tensor:
    """Numbers [N] that are equal where captions [N, T] are."""
    numbers: Tensor = torch.unique(captions, dim=0, return_inverse=True)[1]
    return numbers


def _hits(
    queries: Tensor, answers: Tensor, groups: Tensor, ks: tuple[int, ...]
) -> dict[int, Tensor]:
    """Which queries [N, E] find an answer [N, E] of their group among the first k: k to [N].

    Some rows of similarities at a time: in the cache, and never [N, N] in memory.
    """
    parts = [
        _first(rows @ answers.T, group[:, None] == groups[None, :], ks)
        for rows, group in zip(torch.split(queries, _ROWS), torch.split(groups, _ROWS), strict=True)
    ]
    return {k: torch.cat([part[k] for part in parts]) for k in ks}


def _first(similarity: Tensor, correct: Tensor, ks: tuple[int, ...]) -> dict[int, Tensor]:
    """Which rows have a correct column among their first k."""
    best = similarity.masked_fill(~correct, float("-inf")).amax(1, keepdim=True)
    wrong_before = ((similarity >= best) & ~correct).sum(1)  # ties count against
    hit = best.squeeze(1).isfinite()  # NaN features find nothing
    return {k: (wrong_before < k) & hit for k in ks}


def encode_pair(model: Any, image: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
    """Return features of open_clip and transformers dual encoders, before normalisation.

    Raises:
        TypeError: if the model has neither pair of methods.
    """
    return encode_image(model, image), encode_text(model, text)
