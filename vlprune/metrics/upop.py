"""UPop: masks that shrink to 0 while the model is trained, in one ranking of all towers.

Signed gradients of all masks are added up over the search. Every `interval` steps units are ranked
by that sum, standardised within each structure (attention, FFN, layers): a mask that gradient
descent would have driven down most goes first. As many units as the schedule asks for are masked,
with the value 1 - s, all others with 1, where s = sqrt((1 - cos(pi t / T)) / 2) rises from 0 to 1:
at the end masks are 0 or 1 and the searched model is the cut one.

Units are dimensions of heads, one mask for queries, keys, values and all heads of a layer, and
neurons; with other `strategies` whole heads, halves or layers, too. `units="cost"` ranks them by
the gradient per parameter (or MAC) that each saves, and ends on the budget; `units="paper"` ranks
by z-scores within each structure and takes the paper's `ratio`, too, a share of units that are
weighted by kind. Cost: one number per unit, no pass over data of its own.

Source: Shi et al., UPop, ICML 2023 (2301.13741), algorithm 1. Differences: gradients are summed by
this class, not by leaving them in `.grad`, so autocast, accumulation and several processes change
nothing; the l1 terms are left out, since they add the same number to all masks of a structure.
"""

from __future__ import annotations

import collections
import dataclasses
import itertools
import math
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from vlprune.anatomy import Anatomy, Axis
from vlprune.calls import Inputs
from vlprune.cost import SMALLEST, absolute_budget, dense_cost, on_the_way, resource_of
from vlprune.dissect import dissect
from vlprune.gates import zeros_and_ones
from vlprune.metrics._learned import LearnedMasks
from vlprune.plan import Scores
from vlprune.ranking import keep_after, keep_without, savings
from vlprune.registry import METRICS

Units = Literal["cost", "paper"]
Rank = Literal["zscore", "saving"]


@dataclasses.dataclass(frozen=True, slots=True)
class _Mask:
    """One row of masks, and the axes that it multiplies, each by a power of it."""

    kind: str
    powers: dict[str, int]
    units: int

    @property
    def name(self) -> str:
        return next(iter(self.powers))


@METRICS.register("upop")
class UPop(LearnedMasks):
    """Progressive masks by accumulated signed gradients.

    Args:
        model: trained by its owner; see `LearnedMasks`.
        anatomy: of it.
        budget: what is to be left in the end, see `vlprune.plan`; met within one unit.
        ratio: instead of a budget: the share of units that go, weighted by `weights`.
        steps: of the search; None only gathers scores.
        interval: steps between two decisions; the last step always decides.
        units: "cost" or "paper", see above. "paper" takes dimensions of heads for heads.
        rank: "zscore": by the gradient, standardised within each structure. "saving": by the
            gradient per parameter (or MAC) saved, comparable over structures as it is. Default:
            "saving" for "cost", "zscore" for "paper".
        weights: for `ratio`: what a unit of each kind counts. The paper's code has 36 to 1 for all
            models of BLIP and CLIP, 12.007 to 1 for DeiT-S.
        min_units: at least so many units stay on every axis.
        example_inputs: for the dissection.
        strategies: kinds of axes that may lose units; default: dimensions of heads (heads, where a
            model has none that can go) and neurons.

    Raises:
        ValueError: if there are steps without a budget or ratio, or both.
    """

    def __init__(
        self,
        model: nn.Module,
        anatomy: Anatomy | None = None,
        *,
        budget: Mapping[str, float] | None = None,
        ratio: float | None = None,
        steps: int | None = None,
        interval: int = 50,
        units: Units = "cost",
        rank: Rank | None = None,
        weights: Mapping[str, float] | None = None,
        min_units: int = 1,
        example_inputs: Inputs | None = None,
        strategies: tuple[str, ...] | None = None,
    ):
        if steps is not None and (budget is None) == (ratio is None):
            raise ValueError("UPop must be given a budget or a ratio to search for, not both.")
        if anatomy is None:
            anatomy = dissect(model, example_inputs)
        if strategies is None:
            strategies = ("head_dim" if "head_dim" in anatomy.kinds else "head", "ffn")
        elif units == "paper":
            strategies = tuple("head_dim" if kind == "head" else kind for kind in strategies)
        self.ratio, self.interval, self.min_units = ratio, interval, min_units
        self.units = units
        self.rank: Rank = rank or ("saving" if units == "cost" else "zscore")
        self.weights = {"head_dim": 36.0, "ffn": 1.0} if weights is None else dict(weights)
        super().__init__(
            model,
            anatomy,
            budget=budget,
            steps=steps,
            example_inputs=example_inputs,
            strategies=strategies,
        )
        if self.budget is not None:
            absolute_budget(self.anatomy, self.budget)

    def reset(self) -> None:
        """Begin again, with all masks open."""
        super().reset()
        axes = self.anatomy.axes
        self._masks = _tied(axes)
        self._values = {m.name: torch.ones(m.units, dtype=torch.float64) for m in self._masks}
        self._sums = {m.name: torch.zeros(m.units, dtype=torch.float64) for m in self._masks}
        self._kept = {axis.name: tuple(range(axis.units)) for axis in axes}
        for axis in axes:
            self._set(axis.name, torch.ones(axis.units))

    def compute(self) -> Scores:
        """Return minus the sum of gradients per step: what the loss gains by keeping a unit."""
        steps = max(self.steps_done, 1)
        rows = {n: -self._sums[m.name] / steps for m in self._masks for n in m.powers}
        return self._scores(rows)

    def state_dict(self) -> dict[str, Any]:
        """Return all that a search needs to go on bit-equal."""
        kept = {name: list(units) for name, units in self._kept.items()}
        sums, values = dict(self._sums), dict(self._values)
        return {**super().state_dict(), "sums": sums, "values": values, "kept": kept}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take it from there."""
        super().load_state_dict(state)
        self._sums = {name: row.clone() for name, row in state["sums"].items()}
        self._values = {name: row.clone() for name, row in state["values"].items()}
        self._kept = {name: tuple(units) for name, units in state["kept"].items()}

    def _settings(self) -> dict[str, Any]:
        return {
            "steps": self.steps_done,
            "interval": self.interval,
            "units": self.units,
            "rank": self.rank,
            **({} if self.ratio is None else {"ratio": self.ratio}),
        }

    def _take(self, gradients: dict[str, Tensor]) -> None:
        for mask in self._masks:
            value = self._values[mask.name]
            for axis, power in mask.powers.items():
                if axis in gradients:
                    gradient = gradients[axis].double().cpu()
                    self._sums[mask.name] += power * value ** (power - 1) * gradient

    def _move(self) -> None:
        assert self.steps is not None
        if self.steps_done % self.interval and self.steps_done < self.steps:
            return
        share = shrinkage(self.steps_done, self.steps)
        self._kept = self._stay(share)
        for mask in self._masks:
            stay = zeros_and_ones(self._kept[mask.name], self._values[mask.name])
            value = stay + (1 - stay) * (1 - share)
            self._values[mask.name] = value
            for axis, power in mask.powers.items():
                self._set(axis, value**power)

    def _keep(self) -> dict[str, tuple[int, ...]]:
        return self._kept

    # -- who goes ----------------------------------------------------------------------------------

    def _stay(self, share: float) -> dict[str, tuple[int, ...]]:
        """What is not masked when `share` of all that shall go is."""
        groups, kinds = self._order()
        if self.ratio is not None:
            weights = np.array([self.weights.get(kind, 1.0) for kind in kinds])
            total = sum(self.weights.get(mask.kind, 1.0) * mask.units for mask in self._masks)
            reached = np.concatenate([[0.0], np.cumsum(weights)])
            count = int(np.abs(reached - share * self.ratio * total).argmin())
            flat = [unit for group in groups[:count] for unit in group]
            return keep_without(self.anatomy, np.array(flat, dtype=np.int64))
        assert self.budget is not None
        dense = dense_cost(self.anatomy)
        limits = {
            key: on_the_way(getattr(dense, key), limit, share)
            for key, limit in absolute_budget(self.anatomy, self.budget).items()
        }
        return keep_after(self.anatomy, groups, limits)

    def _order(self) -> tuple[list[list[int]], list[str]]:
        """Units that go together, by their number among all, in order; and their kinds."""
        axes = self.anatomy.axes
        ends = itertools.accumulate((axis.units for axis in axes), initial=0)
        starts = {axis.name: start for axis, start in zip(axes, ends, strict=False)}
        worths = self._worths()
        groups: list[list[int]] = []
        worth: list[float] = []
        kinds: list[str] = []
        for mask in self._masks:
            row = worths[mask.name]
            least = max(self.min_units, *(self.anatomy.axis(n).least for n in mask.powers))
            free = np.argsort(row, kind="stable")[: max(mask.units - least, 0)]
            groups += [[starts[name] + int(unit) for name in mask.powers] for unit in free]
            worth += row[free].tolist()
            kinds += [mask.kind] * len(free)
        order = np.argsort(np.asarray(worth), kind="stable")
        return [groups[place] for place in order], [kinds[place] for place in order]

    def _worths(self) -> dict[str, NDArray[Any]]:
        """What every unit is worth, comparable over all masks."""
        if self.rank == "saving":
            resource = resource_of(self.budget or {})
            saved = savings(self.anatomy, resource)
            sizes = {m.name: sum(np.asarray(saved[n]) for n in m.powers) for m in self._masks}
            return {
                m.name: -self._sums[m.name].numpy() / np.maximum(sizes[m.name], SMALLEST[resource])
                for m in self._masks
            }
        together: dict[str, list[str]] = collections.defaultdict(list)
        for mask in self._masks:
            together[mask.kind].append(mask.name)
        found: dict[str, NDArray[Any]] = {}
        for names in together.values():
            every = np.concatenate([self._sums[name].numpy() for name in names])
            spread = max(float(every.std()), 1e-30)
            found |= {n: -(self._sums[n].numpy() - every.mean()) / spread for n in names}
        return found


def shrinkage(step: int, steps: int) -> float:
    """Return sqrt((1 - cos(pi step / steps)) / 2): how far masks have shrunk, 0 to 1."""
    return 1.0 if step >= steps else math.sqrt((1 - math.cos(math.pi * step / steps)) / 2)


def _tied(axes: tuple[Axis, ...]) -> list[_Mask]:
    """Dimensions of one attention go together in queries, keys and values, others alone.

    The paper's mask multiplies queries and keys alike, so their product by its square.
    """
    masks: dict[Any, _Mask] = {}
    for axis in axes:
        is_pair = axis.kind == "head_dim"
        key = (axis.path, axis.units) if is_pair else (axis.name, 0)
        power = 2 if is_pair and axis.name.endswith(".qk") else 1
        known = masks.get(key)
        masks[key] = _Mask(
            axis.kind, {**(known.powers if known else {}), axis.name: power}, axis.units
        )
    return list(masks.values())
