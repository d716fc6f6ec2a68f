"""MoPE, module-wise pruning error: how much a measure falls when one module is gone.

Heads and layers one by one; FFN neurons in groups of like importance, sorted by a cheap metric
first ("rewiring"), each neuron getting its share of the group's fall. Negative scores (removal
helps) are kept. Every score has a paired bootstrap interval. Cost: for every head, layer and group
the forward from its layer on, see `vlprune/ablation/`.

Alone, a unit is often spared by the others; gone together they are missed. `nested` measures what
goes together: the least important unit or group of an axis, then that with the next one, and so on;
the score of each is what it adds.

Source: Lin et al., MoPE-CLIP, CVPR 2024 (2403.07839), section 3. The order inside a group, which
the measure does not tell, follows the cheap metric. `nested` is ours.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from vlprune.ablation.engine import Effects, Engine, State
from vlprune.ablation.intervals import bootstrap
from vlprune.ablation.removals import Removal, groups_of
from vlprune.ablation.sequential import Adaptive
from vlprune.anatomy import Anatomy, Axis
from vlprune.contracts import Needs
from vlprune.gates import Gates
from vlprune.measures import is_example_task
from vlprune.metrics._base import AxisMetric, unit_norms
from vlprune.plan import Scores
from vlprune.registry import METRICS

_TIE = 1e-6  # of the spread of the groups: orders the neurons inside one


@METRICS.register("mope")
class Mope(AxisMetric):
    """The fall of a measure when a unit is removed, measured, put back.

    `update` takes a task, and measures with all that `ablation.engine` spares; or a function
    without arguments, which it calls once for every removal. Not a context that must be entered.

    Args:
        num_groups: groups that the neurons of one FFN are cut into, at most one per neuron.
        rewire: scores that sort the neurons; default: the norm of their weights. "contiguous"
            takes them as they lie, which says little of single neurons.
        measure: "task", "loss", "kl" or "cosine", see `measures.py`.
        nested: measure units of an axis together, in order of importance. Costs as many removals
            again for heads and layers, whose order is measured first. Scores rise in that order:
            neighbours that do not are pooled (isotonic regression).
        adaptive: stop measuring a unit where it is clear whether a plan of this budget keeps it,
            for instance {"params": 0.5}; needs batches enough to stop between.
        error_rate: of one unit stopping on the wrong side.
        store, shard, copies, memory: of `ablation.engine.Engine`.
        progress: called with (done, total) after every measure.
        watch: called with the engine's State and a function that gives the scores so far.
    """

    needs: ClassVar[Needs] = "task"
    takes_scores: ClassVar[tuple[str, ...]] = ("rewire",)

    def __init__(
        self,
        model: nn.Module,
        anatomy: Anatomy | None = None,
        *,
        num_groups: int = 8,
        rewire: Scores | Literal["contiguous"] | None = None,
        measure: str = "task",
        nested: bool = False,
        adaptive: Mapping[str, float] | None = None,
        error_rate: float = 0.05,
        store: str | Path | None = None,
        shard: tuple[int, int] = (0, 1),
        copies: int | Literal["auto"] = 1,
        memory: int = 2 * 2**30,
        progress: Callable[[int, int], None] | None = None,
        watch: Callable[[State, Callable[[], Scores]], None] | None = None,
        **kwargs: Any,
    ):
        if num_groups < 1:
            raise ValueError(f"num_groups must be at least 1; got {num_groups} in Mope.")
        if nested and adaptive is not None:
            raise ValueError("adaptive must stop units one by one; got nested=True beside it.")
        if nested and shard != (0, 1):
            raise ValueError("nested needs the falls of all units; give no shard, or use torchrun.")
        super().__init__(model, anatomy, **kwargs)
        self.num_groups = num_groups
        self.measure = measure
        self.nested = nested
        self.undecided: tuple[Removal, ...] = ()
        self._axes = {axis.name: axis for axis in self.anatomy.axes}
        self._rewire = rewire
        self._adaptive = adaptive
        self._error_rate = error_rate
        self._engine = {"store": store, "shard": shard, "copies": copies, "memory": memory}
        self._progress = progress
        self._watch = watch
        if rewire == "contiguous" and any(axis.kind == "ffn" for axis in self.anatomy.axes):
            warnings.warn(
                "groups of neurons as they lie say little about single neurons; sort them first, "
                "for instance rewire='taylor'.",
                stacklevel=2,
            )

    def reset(self) -> None:
        """Forget all that was measured."""
        super().reset()
        self.effects: Effects | None = None

    def update(self, measure: Any = None) -> None:
        """Remove every unit in turn and measure; updates by a function are averaged.

        Args:
            measure: a task, or a function without arguments that says how well the model does.

        Raises:
            TypeError: if it is neither, or if `measure` is another than "task" and the task gives
                no outputs, losses and logits.
        """
        if is_example_task(measure, self.measure):
            self._run(measure)
        elif self.measure != "task":
            raise TypeError(
                f"measure must be 'task' where the task does not say what an example gives; got "
                f"{self.measure!r} with {type(measure).__name__} in Mope. Give an example task, "
                "see vlprune/measures.py."
            )
        elif callable(getattr(measure, "measure", None)):
            self._loop(lambda: float(measure.measure(self.model)))
        elif callable(measure):
            self._loop(measure)
        else:
            raise TypeError("Mope.update must be given a task or a function without arguments.")
        self._count += 1

    def removals(self) -> list[Removal]:
        """Return what is taken out, each on its own."""
        return [
            Removal(axis.name, units) for axis in self.anatomy.axes for units in self._groups(axis)
        ]

    def scores_of(self, effects: Effects) -> Scores:
        """Return scores of what is known so far; units that were not measured are worth most."""
        falls = {removal: float(values.mean()) for removal, values in effects.falls.items()}
        most = max(falls.values(), default=0.0)
        means = {
            axis.name: torch.full((axis.units,), most, dtype=torch.float64)
            for axis in self.anatomy.axes
        }
        for removal, fall in falls.items():
            means[removal.axis][list(removal.units)] = fall / len(removal.units)
        return self._tied_scores(means)

    def compute(self) -> Scores:
        """Return the mean fall, neurons of one group in the order of the cheap metric."""
        if self.effects is None:
            return self._tied_scores({n: t / self._count for n, t in self._totals.items()})
        return self.scores_of(self.effects)

    def _run(self, task: Any) -> None:
        """Measure with the engine."""
        if self.nested:
            self._run_nested(task)
            return
        stopper = None
        if self._adaptive is not None:
            stopper = Adaptive(self.anatomy, self._adaptive, self._error_rate)
        removals = self.removals()
        self.effects = self._measured(task, removals, stopper)
        self.undecided = () if stopper is None else tuple(stopper.undecided)
        missing = sum(removal not in self.effects.falls for removal in removals)
        if missing:
            warnings.warn(
                f"{missing} removals are left to other shards; until they are in the store their "
                "units are scored as worth most. Score again without shard when all are through.",
                stacklevel=2,
            )

    def _run_nested(self, task: Any) -> None:
        """Measure units alone for their order where no cheap metric gives it, then together."""
        removals = self.removals()
        sorted_ones = [r for r in removals if self._axes[r.axis].kind == "ffn"]
        singles = [r for r in removals if self._axes[r.axis].kind != "ffn"]
        alone = self._measured(task, singles)
        singles.sort(key=lambda r: float(alone.falls[r].mean()))
        order: dict[str, list[Removal]] = {axis.name: [] for axis in self.anatomy.axes}
        for removal in (*sorted_ones, *singles):
            order[removal.axis].append(removal)
        unions = {name: list(_unions(groups)) for name, groups in order.items()}
        together = self._measured(task, [union for row in unions.values() for union in row])
        falls: dict[Removal, Tensor] = {}
        for name, groups in order.items():
            before = torch.zeros_like(together.dense)
            rows = []
            for group, union in zip(groups, unions[name], strict=True):
                rows.append((group, together.falls[union] - before))
                before = together.falls[union]
            falls |= _rising(rows)
        self.effects = dataclasses.replace(
            together,
            falls=falls,
            evaluations=alone.evaluations + together.evaluations,
            possible=alone.possible + together.possible,
        )

    def _measured(
        self, task: Any, removals: list[Removal], stopper: Adaptive | None = None
    ) -> Effects:
        engine = Engine(
            self.model,
            task,
            self.anatomy,
            removals,
            measure=self.measure,
            stopper=stopper,
            progress=self._tell,
            **self._engine,  # type: ignore[arg-type]
        )
        return engine.run()

    def _loop(self, measure: Callable[[], float]) -> None:
        """The plain loop: the whole measure once for every removal."""
        removals = self.removals()
        falls = {
            axis.name: torch.zeros(axis.units, dtype=torch.float64) for axis in self.anatomy.axes
        }
        with Gates(self.model, self.anatomy.axes) as gates:
            dense = measure()
            for done, removal in enumerate(removals, start=1):
                axis = self._axes[removal.axis]
                gates.keep(removal.rest(axis))
                try:
                    fall = dense - measure()
                finally:
                    gates.keep({removal.axis: tuple(range(axis.units))})
                falls[removal.axis][list(removal.units)] = fall / len(removal.units)
                if self._progress:
                    self._progress(done, len(removals))
        for axis in self.anatomy.axes:
            self._add(axis, falls[axis.name])

    def _tell(self, state: State) -> None:
        if self._progress:
            self._progress(state.done, state.total)
        if self._watch:
            self._watch(state, lambda: self.scores_of(state.so_far()))

    def _order(self, axis: Axis) -> Tensor:
        """Units from the least to the most important by the cheap metric."""
        if self._rewire == "contiguous":
            return torch.arange(axis.units)
        if self._rewire is None:
            values = unit_norms(self.model, axis).cpu()
        else:
            values = torch.tensor(self._rewire.values[axis.name])
        return values.argsort(stable=True)

    def _groups(self, axis: Axis) -> Iterator[tuple[int, ...]]:
        if axis.kind == "ffn":
            yield from groups_of(self._order(axis), self.num_groups)
        else:
            yield from ((unit,) for unit in range(axis.units))

    def _tied_scores(self, means: dict[str, Tensor]) -> Scores:
        """Scores in which the neurons of one group stand in the order of the cheap metric."""
        for axis in self.anatomy.axes:
            if axis.kind == "ffn" and axis.name in means:
                means[axis.name] = means[axis.name] + self._ties(axis, means[axis.name])
        scores = self._scores(means)
        if self.effects is None:
            return scores
        intervals = {name: [(v, v) for v in row] for name, row in scores.values.items()}
        for removal, (low, high) in bootstrap(self.effects.falls).items():
            share = len(removal.units)
            for unit in removal.units:
                intervals[removal.axis][unit] = (low / share, high / share)
        rows = {name: tuple(row) for name, row in intervals.items()}
        return dataclasses.replace(scores, intervals=rows)

    def _ties(self, axis: Axis, means: Tensor) -> Tensor:
        place = torch.empty(axis.units, dtype=torch.float64)
        place[self._order(axis)] = torch.linspace(0, 1, axis.units, dtype=torch.float64)
        spread = float(means.max() - means.min())
        return place * _TIE * (spread or 1.0)

    def _settings(self) -> dict[str, Any]:
        rewire = self._rewire.metric if isinstance(self._rewire, Scores) else self._rewire
        settings = {
            "updates": self._count,
            "num_groups": self.num_groups,
            "rewire": rewire or "weight norm",
            "measure": self.measure,
            "nested": self.nested,
        }
        if self.effects is not None:
            measured = {"examples": len(self.effects.dense)}
            measured |= {"evaluations": self.effects.evaluations, "of": self.effects.possible}
            settings |= measured
        if self._adaptive is not None:
            settings["adaptive"] = dict(self._adaptive)
            settings["error_rate"] = self._error_rate
            settings["unsure"] = [removal.name for removal in self.undecided]
        return settings


def _unions(groups: Sequence[Removal]) -> Iterator[Removal]:
    """The first group, the first two together, ..., all."""
    gone: set[int] = set()
    for group in groups:
        gone |= set(group.units)
        yield Removal(group.axis, tuple(sorted(gone)))


def _rising(rows: Sequence[tuple[Removal, Tensor]]) -> dict[Removal, Tensor]:
    """What each group adds, neighbours pooled until the mean per unit rises.

    Source: pool adjacent violators; Barlow et al., Statistical Inference under Order Restrictions,
    1972.
    """
    pooled: list[tuple[Removal, Tensor]] = []
    for group, row in rows:
        pooled.append((group, row))
        while len(pooled) > 1 and _per_unit(pooled[-2]) > _per_unit(pooled[-1]):
            (last, more), (first, less) = pooled.pop(), pooled.pop()
            pooled.append((Removal(first.axis, (*first.units, *last.units)), less + more))
    return dict(pooled)


def _per_unit(row: tuple[Removal, Tensor]) -> float:
    return float(row[1].mean()) / len(row[0].units)
