"""Scenes with labels: the class of the first item, the class of every pixel's cell, one place.

Three readings of one data set: classification (10 classes; the first item in reading order counts,
so that what and where are both needed), segmentation (11 classes; an empty cell is 0), and
zero-shot classification by the words of captions (9 places; an item alone).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from vlprune.tasks.scenes.batching import Batch, batches_of
from vlprune.tasks.scenes.captions import CLASS_NAMES, PLACES, caption
from vlprune.tasks.scenes.data import Scenes
from vlprune.tasks.scenes.items import Items, Split
from vlprune.tasks.scenes.layout import CELL_SIZE, GRID, Layout
from vlprune.tasks.scenes.tokenizer import Tokenizer

SEGMENT_NAMES = ("empty", *CLASS_NAMES)
"""In the order of the labels of segmentation."""


def first_classes(layout: Layout, items: Items) -> Tensor:
    """The class of every scene's first item in reading order, int64 [B], 0 to 9."""
    return torch.from_numpy(items.labels[layout.item[:, 0]].astype(np.int64))


def cell_classes(layout: Layout, items: Items) -> Tensor:
    """The class of every pixel's cell, int64 [B, 96, 96]: 0 where it is empty, else class + 1."""
    scene, slot = np.nonzero(layout.present)
    cells = np.zeros((len(layout.present), GRID * GRID), dtype=np.int64)
    cells[scene, layout.cell[scene, slot]] = items.labels[layout.item[scene, slot]] + 1
    grid = torch.from_numpy(cells.reshape(-1, GRID, GRID))  # [B, row * col] -> [B, row, col]
    return grid.repeat_interleave(CELL_SIZE, dim=1).repeat_interleave(CELL_SIZE, dim=2)


def first_places(layout: Layout, items: Items) -> Tensor:
    """The cell of every scene's first item, int64 [B], 0 to 8, in the order of `PLACES`."""
    return torch.from_numpy(layout.cell[:, 0].copy())


def first_item_alone(layout: Layout) -> Layout:
    """The same scenes with nothing but their first items."""
    present = np.zeros_like(layout.present)
    present[:, 0] = True
    return dataclasses.replace(layout, present=present)


def classification_loader(
    split: Split, count: int, seed: int, batch_size: int, *, stream: bool = False
) -> Sequence[Batch]:
    """Batches {"image": [B, 3, 96, 96], "label": [B]}: the class of the first item."""
    make = _labelled(split, count, seed, first_classes)
    return batches_of(make, count, batch_size, stream=stream)


def segmentation_loader(
    split: Split, count: int, seed: int, batch_size: int, *, stream: bool = False
) -> Sequence[Batch]:
    """Batches {"image": [B, 3, 96, 96], "label": [B, 96, 96]}: the class of every pixel's cell."""
    make = _labelled(split, count, seed, cell_classes)
    return batches_of(make, count, batch_size, stream=stream)


def place_loader(
    split: Split, count: int, seed: int, batch_size: int, *, stream: bool = False
) -> Sequence[Batch]:
    """Batches {"image": [B, 3, 96, 96], "label": [B]}: first items alone, and where they stand."""
    make = _labelled(split, count, seed, first_places, first_item_alone)
    return batches_of(make, count, batch_size, stream=stream)


def place_prompts() -> Tensor:
    """Token ids [9 places, 10 prompts, 32]: what is written of a place, an item of every class."""
    tokenize = Tokenizer().tokenize
    return torch.stack(
        [tokenize([caption([(name, place)]) for name in CLASS_NAMES]) for place in PLACES]
    )


def _labelled(
    split: Split,
    count: int,
    seed: int,
    label: Callable[[Layout, Items], Tensor],
    change: Callable[[Layout], Layout] = lambda layout: layout,
) -> Callable[[range], Batch]:
    """What makes a batch of these scenes."""
    scenes = Scenes(split, count, seed)

    def make(indices: range) -> Batch:
        layout = change(scenes.layout(indices))
        return {"image": scenes.pictures(layout), "label": label(layout, scenes.items)}

    return make
