"""Scenes as a data set: pictures with captions, composed on demand from (split, seed, index).

Nothing is stored but the items: a million scenes cost no memory, and the i-th scene does not depend
on how many there are. Other tasks (questions, segmentation) read `Scenes.scene`.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from vlprune.tasks.scenes.batching import Batch, batches_of
from vlprune.tasks.scenes.captions import CLASS_NAMES, PLACES, caption
from vlprune.tasks.scenes.items import Split, load_items
from vlprune.tasks.scenes.layout import GRID, Layout, draw_layout, paint
from vlprune.tasks.scenes.tokenizer import Tokenizer

IMAGE_MEAN, IMAGE_STD = 0.073, 0.218
"""Of the pixels (0 to 1) of 10,000 train scenes; a picture is normalised with them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PlacedObject:
    """One item in a scene.

    Attributes:
        class_name: One of `CLASS_NAMES`.
        row: Row of its cell, 0 (top) to 2.
        col: Column of its cell, 0 (left) to 2.
        item: Index into the items of the split.
        top: Pixels above it within its 32-pixel cell, 0 to 4; the item is 28 high and wide.
        left: Pixels left of it within its cell, 0 to 4.
    """

    class_name: str
    row: int
    col: int
    item: int
    top: int
    left: int

    @property
    def place(self) -> str:
        """The words for its cell, one of `PLACES`."""
        return PLACES[GRID * self.row + self.col]


@dataclass(frozen=True, slots=True, kw_only=True)
class Scene:
    """Two to four objects in distinct cells, in reading order."""

    objects: tuple[PlacedObject, ...]

    @property
    def caption(self) -> str:
        """What is where: "a bag top left, an ankle boot bottom right"."""
        return caption((placed.class_name, placed.place) for placed in self.objects)


class Scenes(Dataset[tuple[Tensor, Tensor]]):
    """`count` scenes of a split, fully determined by (split, count, seed).

    Args:
        split: Which items are used, "train" or "test".
        count: How many scenes.
        seed: Which scenes; equal seeds and indices give equal scenes, whatever the count.
        tokenizer: Of the captions; default: that of `scenes-clip`.

    Raises:
        ValueError: There is no such split, or `count` or `seed` is negative.
    """

    def __init__(
        self,
        split: Split = "train",
        count: int = 1000,
        seed: int = 0,
        tokenizer: Tokenizer | None = None,
    ) -> None:
        for name, value in (("count", count), ("seed", seed)):
            if value < 0:
                raise ValueError(f"{name} of Scenes must be 0 or more; got {value}.")
        self.split = split
        self.count = count
        self.seed = seed
        self.items = load_items(split)
        self.tokenizer = tokenizer or Tokenizer()

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """Image `[3, 96, 96]`, float32, and tokens `[32]`, int64."""
        images, tokens = self.batch([index])
        return images[0], tokens[0]

    def batch(self, indices: Iterable[int]) -> tuple[Tensor, Tensor]:
        """Images `[B, 3, 96, 96]`, float32, and tokens `[B, 32]`, int64."""
        layout = self.layout(indices)
        texts = [scene.caption for scene in self.scenes_of(layout)]
        return self.pictures(layout), self.tokenizer.tokenize(texts)

    def pictures(self, layout: Layout) -> Tensor:
        """Images `[B, 3, 96, 96]`, float32, of a layout."""
        return normalise(paint(layout, self.items.images[layout.item[layout.present]]))

    def scene(self, index: int) -> Scene:
        """What stands where in one scene."""
        return self.scenes_of(self.layout([index]))[0]

    def caption(self, index: int) -> str:
        """The caption of one scene."""
        return self.scene(index).caption

    @cached_property
    def captions(self) -> tuple[str, ...]:
        """The captions of all scenes."""
        return tuple(scene.caption for scene in self.scenes_of(self.layout(range(self.count))))

    def layout(self, indices: Iterable[int]) -> Layout:
        """The scenes at `indices` as arrays; negative indices count from the end.

        Raises:
            IndexError: An index is out of range.
        """
        wanted = np.fromiter(indices, dtype=np.int64)
        outside = wanted[(wanted < -self.count) | (wanted >= self.count)]
        if outside.size:
            raise IndexError(
                f"an index must lie in [0, {self.count}); got {outside[0]}. "
                f"Ask for more scenes: Scenes({self.split!r}, count=...)."
            )
        return draw_layout(self.items, self.split, self.seed, wanted % max(self.count, 1))

    def scenes_of(self, layout: Layout) -> list[Scene]:
        """A layout's rows as scenes."""
        labels = self.items.labels[layout.item]
        fields = np.stack([labels, layout.cell, layout.item, layout.top, layout.left], axis=-1)
        return [
            Scene(objects=tuple(_placed(*row) for row in rows[:num_objects]))
            for rows, num_objects in zip(
                fields.tolist(), layout.present.sum(axis=1).tolist(), strict=True
            )
        ]


def normalise(pictures: NDArray[np.uint8]) -> Tensor:
    """Images `[B, 3, H, W]`, float32, of pictures `[B, H, W]`: three like channels."""
    grey = (torch.from_numpy(pictures).float() / 255 - IMAGE_MEAN) / IMAGE_STD
    return grey.unsqueeze(1).repeat(1, 3, 1, 1)


def loader(
    split: Split,
    count: int,
    seed: int,
    batch_size: int,
    tokenizer: Tokenizer | None = None,
    *,
    stream: bool = False,
) -> Sequence[Batch]:
    """Batches {"image": [B, 3, 96, 96], "text": [B, 32]} in order; the last may be smaller.

    A list, or a stream that makes each batch when it is asked for, see `batching.py`.
    """
    scenes = Scenes(split, count, seed, tokenizer)

    def make(indices: range) -> Batch:
        images, tokens = scenes.batch(indices)
        return {"image": images, "text": tokens}

    return batches_of(make, count, batch_size, stream=stream)


def _placed(label: int, cell: int, item: int, top: int, left: int) -> PlacedObject:
    row, col = divmod(cell, GRID)
    return PlacedObject(
        class_name=CLASS_NAMES[label], row=row, col=col, item=item, top=top, left=left
    )
