"""Second moments of features and targets, and the least squares that they answer.

Numbers of rows never show: batches are added up, and from the sums follow the best linear map, its
error on rows that it was not fitted to, and what leaving features out costs. Products are taken in
float32 of features shifted by their first mean (which spares cancellation), sums kept in float64.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Linear:
    """An affine map of features.

    Attributes:
        weight: [D, F].
        bias: [D].
    """

    weight: Tensor
    bias: Tensor


class Moments:
    """Weighted sums over rows of features x [F] and targets t [D].

    Attributes:
        total: sum of the weights of all rows.
    """

    def __init__(self) -> None:
        self.total = 0.0
        self._shifts: tuple[Tensor, Tensor] | None = None

    def add(self, x: Tensor, target: Tensor, weight: Tensor | None = None) -> None:
        """Add rows.

        Args:
            x: features [n, F].
            target: [n, D].
            weight: how much each row counts [n]; default: 1 each.
        """
        if not len(x):
            return
        x, target = x.float(), target.float()
        weight = x.new_ones(len(x)) if weight is None else weight.float()
        if self._shifts is None:
            self._shifts = (x.mean(0), target.mean(0))
            features, size = x.shape[1], target.shape[1]
            zeros = x.new_zeros
            self._x = zeros(features, dtype=torch.float64)
            self._t = zeros(size, dtype=torch.float64)
            self._xx = zeros(features, features, dtype=torch.float64)
            self._xt = zeros(features, size, dtype=torch.float64)
            self._tt = zeros(size, dtype=torch.float64)
        x, target = x - self._shifts[0], target - self._shifts[1]
        weighted = x * weight[:, None]
        self.total += float(weight.sum())
        self._x += weighted.sum(0)
        self._t += (target * weight[:, None]).sum(0)
        self._xx += weighted.T @ x
        self._xt += weighted.T @ target
        self._tt += (target * target * weight[:, None]).sum(0)

    def __add__(self, other: Moments) -> Moments:
        """Moments of the rows of both."""
        both = Moments()
        if self._shifts is None or other._shifts is None:
            return other if self._shifts is None else self
        both._shifts = self._shifts
        n, a, b = (
            other.total,
            (other._shifts[0] - self._shifts[0]).double(),
            (other._shifts[1] - self._shifts[1]).double(),
        )
        both.total = self.total + n
        both._x = self._x + other._x + n * a
        both._t = self._t + other._t + n * b
        x, t = other._x, other._t
        both._xx = self._xx + other._xx
        both._xx += torch.outer(a, x) + torch.outer(x, a) + n * torch.outer(a, a)
        both._xt = self._xt + other._xt
        both._xt += torch.outer(a, t) + torch.outer(x, b) + n * torch.outer(a, b)
        both._tt = self._tt + other._tt + 2 * b * t + n * b * b
        return both

    def means(self) -> tuple[Tensor, Tensor]:
        """Return the means of features [F] and targets [D], float64."""
        assert self._shifts is not None
        x, t = self._shifts
        return x + self._x / self.total, t + self._t / self.total

    def covariance(self) -> Tensor:
        """Return the covariance of the features [F, F], float64."""
        return self.about(None)[0]

    def about(self, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Return moments of features and targets about their means, or about 0 and `bias`.

        Args:
            bias: None where the map has a bias to fit; else the constant that it has [D].

        Returns:
            mean products [F, F] and [F, D], mean squares of the targets [D], float64.
        """
        assert self._shifts is not None
        n = self.total
        x, t = self._x / n, self._t / n
        xx, xt, tt = self._xx / n, self._xt / n, self._tt / n
        if bias is None:
            return xx - torch.outer(x, x), xt - torch.outer(x, t), tt - t * t
        a, b = self._shifts[0].double(), self._shifts[1].double() - bias.double()
        xx = xx + torch.outer(a, x) + torch.outer(x, a) + torch.outer(a, a)
        xt = xt + torch.outer(a, t) + torch.outer(x, b) + torch.outer(a, b)
        return xx, xt, tt + 2 * b * t + b * b

    def fit(self, prior: Tensor, ridge: float, bias: Tensor | None = None) -> Linear:
        """Return the map with the least squared error plus `ridge` times its distance to `prior`.

        Args:
            prior: weights [D, F].
            ridge: in units of the mean variance of a feature.
            bias: a constant to leave as it is [D]; None fits it, too.
        """
        xx, xt, _ = self.about(bias)
        start = prior.double()
        size = (ridge * xx.diagonal().mean()).clamp_min(1e-30)
        system = xx + size * torch.eye(len(xx), dtype=xx.dtype, device=xx.device)
        change = torch.linalg.solve(system, xt - xx @ start.T)
        weight = start + change.T
        if bias is None:
            mean_x, mean_t = self.means()
            return Linear(weight=weight, bias=mean_t - weight @ mean_x)
        return Linear(weight=weight, bias=bias.double())

    def error(self, found: Linear) -> float:
        """Return the mean squared error of a map, summed over targets."""
        xx, xt, tt = self.about(found.bias)
        weight = found.weight.double()
        return float(tt.sum() - 2 * (weight.T * xt).sum() + ((weight @ xx) * weight).sum())

    def spread(self) -> float:
        """Return the variance of the targets, summed."""
        return float(self.about(None)[2].sum())
