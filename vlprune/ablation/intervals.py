"""How sure a mean fall is: paired bootstrap intervals over examples."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

import torch
from torch import Tensor

K = TypeVar("K")
RESAMPLES = 1000


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
        generator = torch.Generator().manual_seed(seed)
        drawn = torch.randint(size, (RESAMPLES, size), generator=generator)
        weights = torch.zeros(RESAMPLES, size, dtype=torch.float64)
        weights.scatter_add_(1, drawn, torch.ones_like(drawn, dtype=torch.float64))
        means = weights @ torch.stack([falls[key].double() for key in keys]).T / size
        tail = (1 - level) / 2
        low, high = means.quantile(torch.tensor([tail, 1 - tail], dtype=torch.float64), dim=0)
        found |= {key: (float(a), float(b)) for key, a, b in zip(keys, low, high, strict=True)}
    return found
