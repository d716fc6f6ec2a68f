"""Dimensions of single heads: every head (or group that shares keys) loses its own.

One axis per head, part ("qk", "v") and attention. Heads of one layer keep different numbers, so the
code between the projections computes at its full width, zeros where dimensions are gone; only the
projections shrink. Where all heads may lose the same dimensions, `head_dim` saves more.
"""

from __future__ import annotations

from collections.abc import Iterator

from vlprune.anatomy import Axis
from vlprune.dissect import ModelView
from vlprune.registry import STRATEGIES
from vlprune.strategies._units import axes_of_kind


@STRATEGIES.register("head_dim_per_head")
def dimensions_of_every_head(view: ModelView) -> Iterator[Axis]:
    """Yield up to two axes per head."""
    return axes_of_kind(view, "head_dim_per_head")
