"""Attention heads: rows of the query, key and value projections and columns of the output one.

The outer width stays. Where heads share keys and values, the unit is a group of heads.
"""

from __future__ import annotations

from collections.abc import Iterator

from vlprune.anatomy import Axis
from vlprune.dissect import ModelView
from vlprune.registry import STRATEGIES
from vlprune.strategies._units import axes_of_kind


@STRATEGIES.register("head")
def heads(view: ModelView) -> Iterator[Axis]:
    """Yield one axis per attention."""
    return axes_of_kind(view, "head")
