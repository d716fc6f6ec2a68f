"""How sure a mean fall is: paired bootstrap intervals over examples."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

import torch
from torch import Tensor

from vlprune.samples import resampling_counts

K = TypeVar("K")


def bootstrap(
    falls: Mapping[K, Tensor], *, level: float = 0.95, seed: int = 0
) -> dict[K, tuple[float, float]]:
    """Return a percentile interval of the mean of every row of falls [n].

    Rows of one length are resampled alike, so that they stay comparable.

    Source: Efron, Bootstrap methods: another look at the jackknife, 1979.
    """
    found: dict[K, tuple[float, float]] = {}
    for size in {len(row) for row in falls.values()}:
        keys = [key for key, row in falls.items() if len(row) == size]
        rows = torch.stack([falls[key].double() for key in keys])
        means = resampling_counts(size, seed) @ rows.T / size
        tail = (1 - level) / 2
        low, high = means.quantile(torch.tensor([tail, 1 - tail], dtype=torch.float64), dim=0)
        found |= {key: (float(a), float(b)) for key, a, b in zip(keys, low, high, strict=True)}
    return found
