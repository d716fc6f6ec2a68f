"""FFN neurons: rows of the first matrix (and of a gate) and columns of the second.

Hidden channels of convolutional blocks are neurons too.
"""

from __future__ import annotations

from collections.abc import Iterator

from vlprune.anatomy import Axis
from vlprune.dissect import ModelView
from vlprune.registry import STRATEGIES
from vlprune.strategies._units import axes_of_kind


@STRATEGIES.register("ffn")
def neurons(view: ModelView) -> Iterator[Axis]:
    """Yield one axis per feed-forward network."""
    return axes_of_kind(view, "ffn")
