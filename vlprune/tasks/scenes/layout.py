"""Draws where items go in a batch of scenes, and paints them there; arrays in, arrays out.

A scene is a 3x3 grid of 32-pixel cells with 2 to 4 items in distinct cells. Draws come from a hash
of (seed, split, index), not from a stream: any scene is drawn alone, at once, and alike everywhere.
"""

from dataclasses import dataclass
from typing import cast, get_args

import numpy as np
from numpy.typing import NDArray

from vlprune.tasks.scenes.items import ITEM_SIZE, Items, Split

GRID = 3
CELL_SIZE = 32
IMAGE_SIZE = GRID * CELL_SIZE
MIN_OBJECTS, MAX_OBJECTS = 2, 4
MAX_OFFSET = CELL_SIZE - ITEM_SIZE

_NUM_CELLS = GRID * GRID
_NUM_DRAWS = 1 + _NUM_CELLS + 3 * MAX_OBJECTS


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Layout:
    """What stands where in B scenes, each with room for K = 4 objects in reading order.

    Attributes:
        present: Whether the object is there, `[B, K]`; the first two always are.
        cell: `3 * row + col`, `[B, K]`.
        item: Index into the items of the split, `[B, K]`.
        top: Pixels above the item within its cell, 0 to 4, `[B, K]`.
        left: Pixels left of the item within its cell, 0 to 4, `[B, K]`.
    """

    present: NDArray[np.bool_]
    cell: NDArray[np.int64]
    item: NDArray[np.int64]
    top: NDArray[np.int64]
    left: NDArray[np.int64]


def draw_layout(items: Items, split: Split, seed: int, indices: NDArray[np.int64]) -> Layout:
    """The layouts of the scenes at `indices` `[B]`; each depends on its own index only."""
    words = _random_words(get_args(Split).index(split), seed, indices)
    count = MIN_OBJECTS + _below(words[:, 0], MAX_OBJECTS - MIN_OBJECTS + 1)
    slot = np.arange(MAX_OBJECTS)
    present = slot < count[:, None]
    # The order of nine random words is a random order of the cells; its first four are the draw.
    cell = np.argsort(words[:, 1 : 1 + _NUM_CELLS], axis=1)[:, :MAX_OBJECTS]
    # Absent objects sort behind all others, so that the present ones stand in reading order.
    order = np.argsort(np.where(present, cell, _NUM_CELLS + slot), axis=1)
    item, top, left = np.split(words[:, 1 + _NUM_CELLS :], 3, axis=1)
    return Layout(
        present=present,
        cell=np.take_along_axis(cell, order, axis=1),
        item=_below(item, len(items.labels)),
        top=_below(top, MAX_OFFSET + 1),
        left=_below(left, MAX_OFFSET + 1),
    )


def paint(layout: Layout, pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Pictures `[B, 96, 96]` with `pixels` `[objects, 28, 28]` of the present objects in place."""
    scene, slot = np.nonzero(layout.present)
    cell = layout.cell[scene, slot]
    across = np.arange(ITEM_SIZE)
    rows = layout.top[scene, slot][:, None] + across
    cols = layout.left[scene, slot][:, None] + across
    num_scenes = len(layout.present)
    canvas = np.zeros((num_scenes, _NUM_CELLS, CELL_SIZE, CELL_SIZE), dtype=np.uint8)
    canvas[scene[:, None, None], cell[:, None, None], rows[:, :, None], cols[:, None, :]] = pixels
    # [B, row * col, y, x] -> [B, row * y, col * x]
    grid = canvas.reshape(num_scenes, GRID, GRID, CELL_SIZE, CELL_SIZE)
    return grid.transpose(0, 1, 3, 2, 4).reshape(num_scenes, IMAGE_SIZE, IMAGE_SIZE)


def _random_words(stream: int, seed: int, indices: NDArray[np.int64]) -> NDArray[np.uint64]:
    """Independent random words `[B, draws]`, a function of (stream, seed, index) alone."""
    key = _mix(_mix(np.array([seed], dtype=np.uint64)) ^ np.uint64(stream))
    counter = indices.astype(np.uint64)[:, None] * np.uint64(_NUM_DRAWS)
    return _mix(_mix(counter + np.arange(_NUM_DRAWS).astype(np.uint64)) ^ key)


def _mix(words: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """One step of SplitMix64 (Steele, Lea and Flood, 2014, OOPSLA, figure 17)."""
    words = words + np.uint64(0x9E3779B97F4A7C15)
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return words ^ (words >> np.uint64(31))


def _below(words: NDArray[np.uint64], bound: int) -> NDArray[np.int64]:
    """Random words as numbers in [0, bound); the bias is below bound / 2**64."""
    return cast("NDArray[np.int64]", (words % np.uint64(bound)).astype(np.int64))
