"""Widths that libraries write as a share of another width."""

from __future__ import annotations

import math
from typing import Any


def exact_ratio(units: int, width: int) -> float:
    """Return a ratio of which `int(width * ratio)` is `units`, `units / width` where that is."""
    ratio = units / width
    while int(width * ratio) < units:
        ratio = math.nextafter(ratio, math.inf)
    return ratio


def first_rows(blocks: Any, path: str) -> int | None:
    """Return how many rows the linear layer at `path` has in the first block that has it."""
    for block in blocks:
        layer = block
        for step in path.split("."):
            layer = getattr(layer, step, None)
        if layer is not None:
            return int(layer.weight.shape[0])
    return None
