"""Reconstruction: what is still missing of a unit when the others have learnt to stand in for it.

The units of an axis go one after the other, always the one whose loss the rest can make up for best
by a least-squares change of their consumer's weights and bias (optimal brain surgeon). A unit is
worth the error that is left then, as outputs feel it: rows and directions of the consumer's answer
count by the squared gradient of random directions of the outputs. So scores of all axes are of one
kind, and a plan by them suits `repair`, which makes the change. Without labels.
A layer or half is worth what the best constant in its place would leave; query dimensions the mean
square of their features; experts how often they are chosen.
Cost: a forward and two backwards over the data, and one inverse per axis.

Source: optimal brain surgeon (Hassibi and Stork, 1993) on structures as in OSSCAR (2403.12983) and
ZipLM (2302.04089); the weights of rows and directions are those of K-FAC (1503.05671), of outputs.
"""

from __future__ import annotations

import collections
import contextlib
from collections.abc import Iterator
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from vlprune.anatomy import Anatomy, Axis
from vlprune.calls import removing, tensors_of
from vlprune.consumers import Additions, Consumer, Key, consumers_of, output_gradients
from vlprune.contracts import Needs
from vlprune.gates import Gates
from vlprune.metrics._base import AxisMetric
from vlprune.moments import Moments
from vlprune.plan import PlanRow, Scores
from vlprune.registry import METRICS

_PROBES = 2  # random directions of the outputs
_TIE = 1e-9  # relative: units that went later are worth more
_STEPS = 128  # in so many steps at most are the neurons of an FFN removed


@METRICS.register("reconstruction")
class Reconstruction(AxisMetric):
    """The error that is left when a unit is gone and the rest was solved again.

    `update` after each forward with gradients, given its outputs.

    Args:
        ridge: added to the features' covariance, in units of their mean variance.
        sensitivity: let rows and directions count by what outputs feel of them; else all alike.
    """

    needs: ClassVar[Needs] = "outputs"

    def __init__(
        self,
        model: nn.Module,
        anatomy: Anatomy | None = None,
        *,
        ridge: float = 1e-2,
        sensitivity: bool = True,
        **kwargs: Any,
    ):
        self._consumers: dict[str, Consumer] = {}  # while entered
        super().__init__(model, anatomy, **kwargs)
        self.ridge = ridge
        self.sensitivity = sensitivity

    def reset(self) -> None:
        """Forget all that was taken in."""
        super().reset()
        self._moments: dict[str, Moments] = collections.defaultdict(Moments)  # of module answers
        self._directions: dict[str, Tensor] = {}  # how much outputs feel of them [D, D]
        self._seen: dict[Key, Tensor] = {}  # of one batch [n, features]
        self._calls: collections.Counter[str] = collections.Counter()

    def __enter__(self) -> Self:
        super().__enter__()
        whole = [PlanRow(axis=a, keep=tuple(range(a.units))) for a in self.anatomy.axes]
        self._consumers = consumers_of(self.model, whole)
        skipped = [a for a in self.anatomy.axes if a.gate.kind in ("skip", "output")]
        paths = dict.fromkeys([*self._consumers, *(p for a in skipped for p in a.gate.modules)])
        self._hooks = contextlib.ExitStack()
        self._hooks.enter_context(self._listening())
        self._additions = self._hooks.enter_context(Additions(self.model, paths))
        return self

    def __exit__(self, *failure: object) -> None:
        self._hooks.close()
        super().__exit__(*failure)

    def update(self, measure: Any = None) -> None:
        """Take in one batch, by backward passes from its outputs; their graph is left.

        Args:
            measure: outputs of the last forward: tensors, nested as may be, examples first.

        Raises:
            RuntimeError: if they have no gradient.
        """
        outputs = [t for t in tensors_of(measure) if t.requires_grad]
        if not outputs:
            raise RuntimeError(
                "Reconstruction.update must be given outputs of a forward with gradients, run "
                "inside the `with` block; got none."
            )
        self._take(outputs)
        self._count += len(next(iter(self._additions.zeros.values()), outputs))
        self._seen, self._calls = {}, collections.Counter()
        self._additions.clear()

    def compute(self) -> Scores:
        """Return the error that each unit leaves, per example."""
        values = {}
        for axis in self.anatomy.axes:
            if axis.gate.kind in ("skip", "output"):
                values[axis.name] = torch.stack([self._spread(p) for p in axis.gate.modules])
            elif self._consumers_of(axis):
                values[axis.name] = self._errors(axis)
            elif axis.name in self._totals:
                values[axis.name] = self._totals[axis.name]
        return self._scores({name: row / self._count for name, row in values.items()})

    def _make_gates(self) -> Gates:
        return Gates(self.model, self.anatomy.axes, tap=self._tap)

    def _settings(self) -> dict[str, Any]:
        return {**super()._settings(), "ridge": self.ridge, "sensitivity": self.sensitivity}

    # -- what is taken in --------------------------------------------------------------------------

    def _tap(self, axis: Axis, unit: int | None, x: Tensor, out: Tensor | None) -> None:
        if unit is not None and out is not None:
            added = out if axis.gate.kind == "output" else out - x
            self._see(axis.gate.modules[unit], added.detach().flatten(0, -2))
        elif unit is None and not self._consumers_of(axis):
            self._add(axis, x.detach().float().pow(2).flatten(0, -3).sum((0, -1)))

    @contextlib.contextmanager
    def _listening(self) -> Iterator[None]:
        """See what consumers are given."""

        def hook(consumer: Consumer) -> Any:
            return lambda module, args: self._see(consumer.path, consumer.rows(args[0]))

        handles = [c.module.register_forward_pre_hook(hook(c)) for c in self._consumers.values()]
        with removing(handles):
            yield

    def _see(self, path: str, rows: Tensor) -> None:
        self._seen[path, self._calls[path]] = rows
        self._calls[path] += 1

    def _take(self, outputs: list[Tensor]) -> None:
        """What flowed in one batch, weighted by what outputs feel of it."""
        counts: dict[Key, Tensor] = {}
        probes = _PROBES if self.sensitivity else 0
        for gradients in output_gradients(outputs, self._additions.zeros, probes):
            for key, gradient in gradients.items():
                consumer = self._consumers.get(key[0])
                rows = gradient.flatten(0, -2) if consumer is None else consumer.rows(gradient)
                rows = rows.float()
                square = rows.pow(2).sum(-1) / _PROBES
                counts[key] = counts[key] + square if key in counts else square
                both = (rows.T @ rows).double()
                known = self._directions.get(key[0])
                self._directions[key[0]] = both if known is None else known + both
        for key, rows in self._seen.items():
            self._moments[key[0]].add(rows, rows[:, :0], counts.get(key))

    # -- what follows ------------------------------------------------------------------------------

    def _consumers_of(self, axis: Axis) -> list[Consumer]:
        found = axis.gate.modules if axis.gate.kind == "input" else ()
        return [self._consumers[path] for path in found if path in self._consumers]

    def _root(self, path: str, size: int) -> Tensor:
        """Square root L [D, D] of how outputs feel directions of an answer; L L^T has trace 1."""
        if path not in self._directions:
            return torch.eye(size, dtype=torch.float64)
        both = self._directions[path]
        values, vectors = torch.linalg.eigh(both / both.diagonal().sum().clamp_min(1e-300))
        root: Tensor = vectors * values.clamp_min(0).sqrt()
        return root

    def _spread(self, path: str) -> Tensor:
        """What the best constant in place of what a module adds would leave, over all rows."""
        if path not in self._moments:
            return torch.zeros((), dtype=torch.float64)
        moments = self._moments[path]
        covariance = moments.covariance()
        root = self._root(path, len(covariance)).to(covariance.device)
        return (root.T @ covariance @ root).trace().cpu() * moments.total

    def _errors(self, axis: Axis) -> Tensor:
        """Errors [units] over all rows, units removed one after the other."""
        gate = axis.gate
        features = torch.arange(gate.repeats * axis.units * gate.block)
        index = features.reshape(gate.repeats, axis.units, gate.block).transpose(0, 1).flatten(1)
        parts = []
        for consumer in self._consumers_of(axis):
            moments = self._moments.get(consumer.path)
            if moments is None or not moments.total:
                continue
            constant = None if consumer.bias is not None else consumer.weight.new_zeros(0)
            covariance, *_ = moments.about(constant)
            size = self.ridge * covariance.diagonal().mean().clamp_min(1e-30)
            inverse = torch.linalg.inv(
                covariance + size * torch.eye(len(covariance)).to(covariance)
            )
            weight = consumer.weight.double()
            root = self._root(consumer.path, len(weight)).to(weight.device)
            parts.append((inverse, root.T @ weight * moments.total**0.5))
        if not parts:
            return torch.zeros(axis.units, dtype=torch.float64)
        return _left_by_each(parts, index.to(parts[0][0].device))


def _left_by_each(parts: list[tuple[Tensor, Tensor]], index: Tensor) -> Tensor:
    """Errors that units leave, removed in the order of the least.

    Args:
        parts: per consumer the inverse covariance [F, F] and the weights [D, F]; used up.
        index: the features of every unit [U, f].

    Returns:
        [U], rising in the order of removal.
    """
    units = len(index)
    at_once = max(units // _STEPS, 1) if index.shape[1] == 1 else 1
    alive = torch.arange(units, device=index.device)
    errors = torch.zeros(units, dtype=torch.float64, device=index.device)
    highest = errors.new_zeros(())
    while len(alive):
        costs = sum(_cost(inverse, weight, index) for inverse, weight in parts)
        assert isinstance(costs, Tensor)
        order = costs.argsort()[:at_once]
        for place in order.tolist():
            highest = torch.maximum(highest * (1 + _TIE), costs[place])
            errors[alive[place]] = highest
        gone = index[order].flatten()
        for inverse, weight in parts:
            share = torch.linalg.solve(inverse[gone][:, gone], inverse[gone])
            weight.addmm_(weight[:, gone], share, alpha=-1)
            inverse.addmm_(inverse[:, gone], share, alpha=-1)
        stays = torch.ones(len(alive), dtype=torch.bool, device=alive.device)
        stays[order] = False
        alive, index = alive[stays], index[stays]
        if 2 * index.numel() < len(parts[0][0]):
            parts, index = _packed(parts, index)
    return errors


def _packed(
    parts: list[tuple[Tensor, Tensor]], index: Tensor
) -> tuple[list[tuple[Tensor, Tensor]], Tensor]:
    """The features that are left, one after another, so that what follows works on less."""
    left = index.flatten().sort().values
    places = torch.zeros(len(parts[0][0]), dtype=index.dtype, device=index.device)
    places[left] = torch.arange(len(left), device=index.device)
    packed = [(inverse[left][:, left], weight[:, left]) for inverse, weight in parts]
    return packed, places[index]


def _cost(inverse: Tensor, weight: Tensor, index: Tensor) -> Tensor:
    """What each of the units [U, f] leaves when it goes next [U]."""
    blocks = inverse[index[:, :, None], index[:, None, :]]  # [U, f, f]
    columns = weight[:, index].permute(1, 2, 0)  # [U, f, D]
    costs: Tensor = (columns * torch.linalg.solve(blocks, columns)).sum((1, 2))
    return costs
