"""Experts of a mixture: a row of the router and all that the expert holds.

A removed expert is never chosen; tokens that were sent to it go to the next best. As many experts
run for a token as before: memory shrinks, the multiply-accumulates but for the router's do not.
"""

from __future__ import annotations

from collections.abc import Iterator

from vlprune.anatomy import Axis
from vlprune.dissect import ModelView
from vlprune.registry import STRATEGIES
from vlprune.strategies._units import axes_of_kind


@STRATEGIES.register("expert")
def experts(view: ModelView) -> Iterator[Axis]:
    """Yield one axis per router."""
    return axes_of_kind(view, "expert")
