"""Dimensions of heads: the same ones of queries and keys, and separately of values, in all heads.

UPop's vectors (2301.13741). An axis "...:head_dim.qk" holds the dimensions that queries and keys
share, "...:head_dim.v" those of values and the output projection; under rotary embeddings the units
of the former are pairs. The softmax scale stays the original one.
"""

from __future__ import annotations

from collections.abc import Iterator

from vlprune.anatomy import Axis
from vlprune.dissect import ModelView
from vlprune.registry import STRATEGIES
from vlprune.strategies._units import axes_of_kind


@STRATEGIES.register("head_dim")
def dimensions(view: ModelView) -> Iterator[Axis]:
    """Yield up to two axes per attention."""
    return axes_of_kind(view, "head_dim")
