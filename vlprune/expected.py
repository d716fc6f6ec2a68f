"""The expected cost of a model whose units stay by chance, each on its own: exact, with a gradient.

Rows and columns that are kept are sums over units, and the size of a tensor is their product, so
the expectation of all that `cost.price` computes is the same arithmetic over probabilities.
"""

from __future__ import annotations

import collections
import dataclasses
import math
from collections.abc import Collection, Mapping
from typing import Any, TypeAlias

import torch
from torch import Tensor

from vlprune.anatomy import Anatomy, Axis, Operation, under
from vlprune.cost import routed_tensors

Number: TypeAlias = Tensor | float


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class _Cut:
    """One axis in one dimension of a tensor.

    Attributes:
        axis: its name.
        units: the unit of every row; rows of none have the number after the last.
        counts: how many rows each unit has, and those of none [units + 1].
    """

    axis: str
    units: Tensor
    counts: Tensor


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
        known: dict[Any, _Cut] = {}  # many tensors are cut alike: summed up once
        for axis in anatomy.axes:
            for name, dim, units in _places(axis, self._sizes):
                key = axis.name, tuple(units)
                if key not in known:
                    counts = [0.0] * (axis.units + 1)
                    for unit in units:
                        counts[unit] += 1
                    known[key] = _Cut(
                        axis.name,
                        torch.tensor(units, device=device),
                        torch.tensor(counts, dtype=torch.float64, device=device),
                    )
                self._cuts[name].setdefault(dim, []).append(known[key])
        scopes = [(axis, unit, path) for axis in anatomy.axes for unit, path in _scopes(axis)]
        names = {tensor.name for tensor in anatomy.tensors} | {o.module for o in anatomy.operations}
        self._inside: dict[str, list[tuple[str, int]]] = {
            name: list({(axis.name, u): None for axis, u, path in scopes if under(name, path)})
            for name in names
        }
        self._routed = {name: axis.name for name, axis in routed_tensors(anatomy).items()}

    def __call__(
        self, stay: Mapping[str, Tensor], resources: Collection[str] = ("params", "macs")
    ) -> dict[str, Tensor]:
        """Return "params" and "macs" of the whole model, scalars in float64.

        Args:
            stay: axis name to the probability [units] that each unit stays.
            resources: which of the two.
        """
        stay = {name: row.double() for name, row in stay.items()}
        sizes = _Sizes(self._sizes, self._cuts, self._inside, stay)
        zero = next(iter(stay.values())).new_zeros(())
        found = {}
        if "params" in resources:
            parameters = [tensor.name for tensor in self.anatomy.tensors if tensor.is_parameter]
            found["params"] = zero + sum(sizes.of(name) for name in parameters)
        if "macs" in resources:
            found["macs"] = zero + sum(self._macs(one, sizes) for one in self.anatomy.operations)
        return found

    def _macs(self, operation: Operation, sizes: _Sizes) -> Number:
        share: Number = operation.macs * sizes.kept(operation.module)
        for name in operation.tensors:
            share = share * sizes.of(name) / max(math.prod(self._sizes[name]), 1)
            if name in self._routed and self._routed[name] in sizes.stay:
                share = share / sizes.mean(self._routed[name]).clamp_min(1e-30)
        for name in operation.axes:
            if name in sizes.stay:
                share = share * sizes.mean(name)
        return share


class _Sizes:
    """Expected numbers of tensors for one set of probabilities; each sum is made once.

    What does not depend on a probability is a plain number.
    """

    def __init__(
        self,
        shapes: Mapping[str, tuple[int, ...]],
        cuts: Mapping[str, Mapping[int, list[_Cut]]],
        inside: Mapping[str, list[tuple[str, int]]],
        stay: Mapping[str, Tensor],
    ):
        self.stay = stay
        self._shapes, self._cuts, self._inside = shapes, cuts, inside
        self._rows = {name: torch.cat([row, row.new_ones(1)]) for name, row in stay.items()}
        self._sums: dict[int, Tensor] = {}
        self._means: dict[str, Tensor] = {}
        self._found: dict[str, Number] = {}

    def of(self, name: str) -> Number:
        """Numbers of a tensor that are left."""
        if name not in self._found:
            size = self.kept(name)
            cuts = self._cuts.get(name, {})
            for dim, whole in enumerate(self._shapes[name]):
                here = [cut for cut in cuts.get(dim, ()) if cut.axis in self.stay]
                size = size * (self._left(here) if here else whole)
            self._found[name] = size
        return self._found[name]

    def kept(self, name: str) -> Number:
        """The probability that a tensor or module is there at all."""
        pairs = [pair for pair in self._inside.get(name, ()) if pair[0] in self.stay]
        if not pairs:
            return 1.0
        return torch.stack([self.stay[axis][unit] for axis, unit in pairs]).prod()

    def mean(self, axis: str) -> Tensor:
        """The mean probability of an axis."""
        if axis not in self._means:
            self._means[axis] = self.stay[axis].mean()
        return self._means[axis]

    def _left(self, cuts: list[_Cut]) -> Tensor:
        """Rows that are left in a dimension that these axes cut, each on its own."""
        if len(cuts) > 1:
            rows = [self._rows[cut.axis][cut.units] for cut in cuts]
            return math.prod(rows[1:], start=rows[0]).sum()
        (cut,) = cuts
        if id(cut) not in self._sums:
            self._sums[id(cut)] = self._rows[cut.axis] @ cut.counts
        return self._sums[id(cut)]


def _scopes(axis: Axis) -> list[tuple[int, str]]:
    """(unit, path) of what vanishes with a unit: layers, halves, experts in lists."""
    listed = [(unit, f"{path}.{unit}") for path in axis.lists for unit in range(axis.units)]
    if axis.removal == "slice":
        return listed
    return [(unit, path) for unit, paths in enumerate(axis.scopes) for path in paths] + listed


def _places(axis: Axis, sizes: Mapping[str, tuple[int, ...]]) -> list[tuple[str, int, list[int]]]:
    """(tensor, dimension, unit of every row there) of an axis."""
    found: dict[tuple[str, int], list[int]] = {}
    for site in axis.sites:
        key = site.tensor, site.dim
        if key not in found:
            found[key] = [axis.units] * sizes[site.tensor][site.dim]
        for unit in range(axis.units):
            for row in site.indices((unit,)):
                found[key][row] = unit
    return [(name, dim, units) for (name, dim), units in found.items()]
