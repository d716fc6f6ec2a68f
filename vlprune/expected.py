"""The expected cost of a model whose units stay by chance, each on its own: exact, with a gradient.

Rows and columns that are kept are sums over units, and the size of a tensor is their product, so
the expectation of all that `cost.price` computes is the same arithmetic over probabilities.
"""

from __future__ import annotations

import collections
import dataclasses
import math
from collections.abc import Mapping

import torch
from torch import Tensor

from vlprune.anatomy import Anatomy, Axis, under


@dataclasses.dataclass(frozen=True, slots=True)
class _Cut:
    """One axis in one dimension of a tensor: the unit of every row; rows of none have units U."""

    axis: str
    units: Tensor


class ExpectedCost:
    """What a model costs in the mean, by the probability that each unit stays.

    Units are taken to stay or go independently of each other.

    Args:
        anatomy: to price with.
        device: of the probabilities.
    """

    def __init__(self, anatomy: Anatomy, device: torch.device | str = "cpu"):
        self.anatomy = anatomy
        self._sizes = {tensor.name: tensor.shape for tensor in anatomy.tensors}
        self._cuts: dict[str, dict[int, list[_Cut]]] = collections.defaultdict(dict)
        for axis in anatomy.axes:
            for name, dim, units in _places(axis, self._sizes):
                cut = _Cut(axis.name, units.to(device))
                self._cuts[name].setdefault(dim, []).append(cut)
        scopes = [(axis, unit, path) for axis in anatomy.axes for unit, path in _scopes(axis)]
        scopes += [(a, u, f"{path}.{u}") for a in anatomy.axes for path in a.lists for u in _of(a)]
        names = {tensor.name for tensor in anatomy.tensors} | {o.module for o in anatomy.operations}
        self._inside: dict[str, list[tuple[str, int]]] = {
            name: list({(axis.name, u): None for axis, u, path in scopes if under(name, path)})
            for name in names
        }
        self._routed = {
            site.tensor: axis.name
            for axis in anatomy.axes
            if axis.gate.kind == "router"
            for site in axis.sites
            if site not in axis.gate.sites
        }

    def __call__(self, stay: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return "params" and "macs" of the whole model, scalars in float64.

        Args:
            stay: axis name to the probability [units] that each unit stays.
        """
        stay = {name: row.double() for name, row in stay.items()}
        sizes = {name: self._size(name, stay) for name in self._sizes}
        some = next(iter(stay.values()))
        params, macs = some.new_zeros(()), some.new_zeros(())
        for tensor in self.anatomy.tensors:
            if tensor.is_parameter:
                params = params + sizes[tensor.name]
        for operation in self.anatomy.operations:
            share = some.new_ones(()) * operation.macs * self._kept(operation.module, stay)
            for name in operation.tensors:
                share = share * sizes[name] / max(math.prod(self._sizes[name]), 1)
                if name in self._routed and self._routed[name] in stay:
                    share = share / stay[self._routed[name]].mean().clamp_min(1e-30)
            for name in operation.axes:
                if name in stay:
                    share = share * stay[name].mean()
            macs = macs + share
        return {"params": params, "macs": macs}

    def _size(self, name: str, stay: Mapping[str, Tensor]) -> Tensor:
        """Numbers of a tensor that are left."""
        size = self._kept(name, stay)
        cuts = self._cuts.get(name, {})
        for dim, whole in enumerate(self._sizes[name]):
            rows = [
                torch.cat([stay[c.axis], size.new_ones(1)])[c.units]
                for c in cuts.get(dim, ())
                if c.axis in stay
            ]
            size = size * (math.prod(rows[1:], start=rows[0]).sum() if rows else whole)
        return size

    def _kept(self, name: str, stay: Mapping[str, Tensor]) -> Tensor:
        """The probability that a tensor or module is there at all."""
        some = next(iter(stay.values()))
        factors = [stay[axis][unit] for axis, unit in self._inside.get(name, ()) if axis in stay]
        return torch.stack(factors).prod() if factors else some.new_ones(())


def _of(axis: Axis) -> range:
    return range(axis.units)


def _scopes(axis: Axis) -> list[tuple[int, str]]:
    """(unit, path) of what vanishes with a unit."""
    if axis.removal == "slice":
        return []
    return [(unit, path) for unit, paths in enumerate(axis.scopes) for path in paths]


def _places(axis: Axis, sizes: Mapping[str, tuple[int, ...]]) -> list[tuple[str, int, Tensor]]:
    """(tensor, dimension, unit of every row there) of an axis."""
    found: dict[tuple[str, int], Tensor] = {}
    for site in axis.sites:
        key = site.tensor, site.dim
        if key not in found:
            found[key] = torch.full((sizes[site.tensor][site.dim],), axis.units)
        for unit in range(axis.units):
            found[key][list(site.indices((unit,)))] = unit
    return [(name, dim, units) for (name, dim), units in found.items()]
