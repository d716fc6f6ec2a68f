"""The pictures that scenes are made of: 4,000 greyscale items of Fashion-MNIST, in ten classes.

`examples/make_scenes_items.py` made `items.npz`; train and test items come from the train and test
files of the source and stay apart. Licence: `LICENSE-fashion-mnist.txt`.
"""

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

Split = Literal["train", "test"]

ITEM_SIZE = 28
ITEMS_FILE = Path(__file__).parent / "items.npz"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Items:
    """The items of one split; the arrays are read-only.

    Attributes:
        images: Pixels `[items, 28, 28]`, 0 (background) to 255.
        labels: Places in `CLASS_NAMES`, `[items]`.
    """

    images: NDArray[np.uint8]
    labels: NDArray[np.uint8]


@cache
def load_items(split: Split) -> Items:
    """The items of a split, read once.

    Raises:
        ValueError: There is no such split.
    """
    if split not in get_args(Split):
        raise ValueError(
            f"split must be one of {', '.join(map(repr, get_args(Split)))}; got {split!r}."
        )
    with np.load(ITEMS_FILE, allow_pickle=False) as file:
        images, labels = file[f"{split}_images"], file[f"{split}_labels"]
    images.flags.writeable = labels.flags.writeable = False
    return Items(images=images, labels=labels)
