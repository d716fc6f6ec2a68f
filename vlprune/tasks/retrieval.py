"""Image-text retrieval for dual encoders: contrastive loss, recall mean.

Recall mean is the mean of R@1, R@5 and R@10, text retrieval and image retrieval, in percent. Ties
count against: constant embeddings score nothing. Images whose captions are equal are all correct
answers to each other's captions. A model that also looks at picture and text together (BLIP's
matching head) can be asked to rank the first few again: `matching`, in `_matching.py`.
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
from vlprune.samples import Samples
from vlprune.tasks import _matching
from vlprune.tasks._batches import check_repeatable, fields, first_of, no_batches
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
            `get_text_features`, or what BLIP's projections make of its first tokens.
        matching: for `BlipForImageTextRetrieval`: the loss gains the matching head's, on every pair
            and its two hardest negatives in the batch, and the `top` most similar candidates are
            ranked again by that head. The recall of an example then depends on the head's view of
            others, so mope calls `measure` for every unit; with `measure="kl"` or "loss" it does
            not, and is far faster.
        top: how many are ranked again; at least the largest of `ks`.

    Raises:
        TypeError: if the loader can be gone through only once.
        ValueError: if `top` is too small; by any use, if the loader is empty.
    """

    name = "retrieval"

    def __init__(
        self,
        loader: Iterable[Any],
        ks: tuple[int, ...] = (1, 5, 10),
        encode: Encode | None = None,
        matching: bool = False,
        top: int = 16,
    ):
        check_repeatable(loader, "loader")
        if matching and top < max(ks):
            raise ValueError(
                f"top must be at least the largest k of recall at k; got {top} with ks {ks}."
            )
        self._loader = loader
        self.ks = ks
        self.matching = matching
        self.top = top
        self._encode = encode or encode_pair

    @property
    def values_examples(self) -> bool:
        """Whether outputs give the recall of an example: not where a head ranks them again."""
        return not self.matching

    @property
    def mixes_examples(self) -> bool:
        """Whether outputs depend on the rest of the batch: the head sees its hardest negatives."""
        return self.matching

    def batches(self) -> Iterable[tuple[Tensor, Tensor]]:
        """Yield (image, text)."""
        for batch in self._loader:
            image, text = fields(batch, "image", "text")
            yield image, text

    def loss(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        """Return the symmetric InfoNCE of one batch, at the model's own temperature."""
        return self.losses(model, self.outputs(model, batch), batch[1]).mean()

    def outputs(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
        """Return image and text features [B, E] of length 1; with matching also logits [B, 3, 2].

        Those are the matching head's: no and yes, for the pair, for its image with the hardest
        wrong text, for its text with the hardest wrong image.
        """
        image, text = (x.to(device_of(model)) for x in batch)
        if not self.matching:
            return self._features(model, image, text)
        states = _matching.image_states(model, image)
        images, texts = _normalised(_matching.features(model, states, text))
        hard = _matching.hard_negatives(images @ texts.T, _groups(text))
        return images, texts, _matching.triples(model, states, text, *hard)

    def targets(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        """Return the token ids [B, T]: equal ones are equal captions."""
        return batch[1]

    def values(self, outputs: tuple[Tensor, ...], targets: Tensor) -> Tensor:
        """Return the recall mean of every pair [N] in percent, both ways."""
        images, texts = (features.float() for features in outputs[:2])
        groups = _groups(targets.to(images.device))
        both = (_hits(images, texts, groups, self.ks), _hits(texts, images, groups, self.ks))
        return _pair_values(*both)

    def losses(self, model: nn.Module, outputs: tuple[Tensor, ...], targets: Tensor) -> Tensor:
        """Return the symmetric InfoNCE of every pair [B] in its batch; plus that of matching."""
        target = torch.arange(len(outputs[0]), device=outputs[0].device)
        rows, columns, *matches = self.logits(model, outputs)
        both = [F.cross_entropy(logits, target, reduction="none") for logits in (rows, columns)]
        loss = torch.stack(both).mean(0)
        return loss + _matching.losses(matches) if matches else loss

    def logits(self, model: nn.Module, outputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Return similarities at the model's temperature: images by texts, texts by images.

        With matching also the head's three [B, 2].
        """
        images, texts, *matches = outputs
        logits = logit_scale(model) * images @ texts.T
        return logits, logits.T, *(part for triple in matches for part in triple.unbind(1))

    def measure(self, model: nn.Module) -> float:
        """Return the recall mean in percent."""
        return self.recall(model).mean

    def recall(self, model: nn.Module) -> Recall:
        """Return every recall."""
        return _recall(*self._found(model))

    def samples(self, model: nn.Module) -> Samples:
        """Return the recall mean of every pair in percent, both ways."""
        return Samples(rows=_pair_values(*self._found(model)).cpu()[:, None])

    def _found(self, model: nn.Module) -> tuple[dict[int, Tensor], dict[int, Tensor]]:
        """Which images found their text, and texts their image: k to [N]."""
        images, texts, ids, states = [], [], [], []
        with torch.no_grad(), quiet_eval(model):
            for image, text in self.batches():
                image, text = image.to(device_of(model)), text.to(device_of(model))
                if self.matching:
                    states.append(_matching.image_states(model, image))
                    found = _normalised(_matching.features(model, states[-1], text))
                else:
                    found = self._features(model, image, text)
                images.append(found[0])
                texts.append(found[1])
                ids.append(text)
            if not images:
                raise no_batches("Retrieval")
            image, text = torch.cat(images).float(), torch.cat(texts).float()
            captions = torch.cat(ids)
            if self.matching:
                both = _matching.ranked_again(
                    model, torch.cat(states), captions, image @ text.T, self.top
                )
                equal = _equal(captions)
                return _first(both[0], equal, self.ks), _first(both[1], equal, self.ks)
        groups = _groups(captions)
        return _hits(image, text, groups, self.ks), _hits(text, image, groups, self.ks)

    def example_inputs(self, model: nn.Module) -> Inputs:
        """Return one image and one text, by the keywords of transformers where it is its model."""
        image, text = (x[:1] for x in first_of(self.batches(), "Retrieval"))
        if _matching.is_blip(model):
            return _matching.example_inputs(model, image, text)
        return pair_inputs(model, image, text)

    def _features(self, model: nn.Module, image: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        return _normalised(self._encode(model, image, text))


def _normalised(both: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Features of length 1."""
    images, texts = both
    return F.normalize(images, dim=-1), F.normalize(texts, dim=-1)


def recall(similarity: Tensor, captions: Tensor, ks: tuple[int, ...] = (1, 5, 10)) -> Recall:
    """Return recalls of a similarity matrix.

    Args:
        similarity: [images, texts], row i belongs to column i.
        captions: token ids [texts, T]; columns with equal ids are equally correct.
        ks: the k of recall at k.
    """
    correct = _equal(captions)
    return _recall(_first(similarity, correct, ks), _first(similarity.T, correct, ks))


def _recall(text: dict[int, Tensor], image: dict[int, Tensor]) -> Recall:
    """Recalls from which images found a text, and which texts an image."""
    shares = [
        {k: 100 * float(hit.double().mean()) for k, hit in hits.items()} for hits in (text, image)
    ]
    return Recall(text=shares[0], image=shares[1])


def _pair_values(text: dict[int, Tensor], image: dict[int, Tensor]) -> Tensor:
    """The recall mean of every pair [N] in percent."""
    hits = [hit.double() for found in (text, image) for hit in found.values()]
    return 100 * torch.stack(hits).mean(0)


def _groups(captions: Tensor) -> Tensor:
    """Numbers [N] that are equal where captions [N, T] are."""
    numbers: Tensor = torch.unique(captions, dim=0, return_inverse=True)[1]
    return numbers


def _equal(captions: Tensor) -> Tensor:
    """Which captions [N, T] are equal [N, N]."""
    groups = _groups(captions)
    return groups[:, None] == groups[None, :]


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
        TypeError: if the model has neither pair of methods, nor is BLIP.
    """
    if _matching.is_blip(model):
        return _matching.features(model, _matching.image_states(model, image), text)
    return encode_image(model, image), encode_text(model, text)
