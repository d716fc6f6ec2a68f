"""`compare`: score once by every metric, cut at every budget, measure on the same examples."""

from __future__ import annotations

import dataclasses
import itertools
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import scipy.stats
import torch
from torch import nn

from vlprune.anatomy import Anatomy
from vlprune.calls import Inputs, quiet_eval
from vlprune.clocks import device_of, resized
from vlprune.compare.results import Agreement, Comparison, Difference, Failure, Point, Scoring
from vlprune.consumers import forward_of
from vlprune.contracts import Task
from vlprune.cost import count_macs, count_params, latencies_ms
from vlprune.dissect import default_inputs, dissect
from vlprune.errors import BudgetError, LawError, PlanError
from vlprune.pipeline import Progress, plan, prune, score, task_inputs
from vlprune.plan import Plan, Scores, versions
from vlprune.ranking import savings
from vlprune.recover.repair import repair
from vlprune.samples import Samples, differences, samples_of

METRICS = ("reconstruction", "fisher", "taylor", "magnitude", "random")
Command = Callable[[str, str, float, bool], str]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class _Made:
    """One model that was measured."""

    point: Point
    samples: Samples


def compare(
    model: nn.Module,
    task: Task,
    test: Task | None = None,
    *,
    metrics: Iterable[str] = METRICS,
    allocations: Sequence[str] = ("global",),
    keeps: Sequence[float] = (0.75, 0.5, 0.35),
    resource: str = "prunable_params",
    strategies: tuple[str, ...] = ("head", "ffn"),
    repaired: bool = True,
    settings: Mapping[str, Mapping[str, Any]] | None = None,
    scores: Mapping[str, Scores] | None = None,
    batch_size: int = 8,
    name: str = "",
    command: Command | None = None,
    progress: Callable[[str], Progress] | None = None,
) -> Comparison:
    """Return what every metric and allocation leaves of `model` at every budget.

    Every metric scores once; its scores are cut at every budget. Each cut model is verified, and
    measured with the dense one in turns.

    Args:
        model: left as it was.
        task: to score and repair on.
        test: to measure on; default: `task` itself, and the page says so.
        metrics: names in the registry.
        allocations: names in the registry.
        keeps: shares to keep of `resource`.
        resource: "params", "macs" or "prunable_params".
        strategies: kinds of axes that may lose units.
        repaired: measure every plan also after `repair`.
        settings: of metrics, by name.
        scores: ready ones by a name of their own, of the same strategies; compared besides.
        batch_size: of the call whose latency is measured.
        name: of the model, for the page.
        command: from metric, allocation, keep and repaired to what makes the model again; default:
            Python.
        progress: called with a title, gives what is called with (done, total).

    Raises:
        UnknownNameError: for an unknown metric.
        ValueError: if there is nothing to compare, or a share is not in (0, 1).
    """
    ready = dict(scores or {})
    names = tuple(dict.fromkeys([*metrics, *ready]))
    keeps = tuple(sorted(set(keeps), reverse=True))
    _check(names, allocations, keeps)
    work = _Work(model, task, test or task, strategies, batch_size, command or _python(resource))
    dense = work.measured(model, None, ("dense", "", 1.0, False), 0.0)
    tell = progress or (lambda title: lambda done, total: None)
    scorings, failures, made = [], [], []
    for metric in names:
        if metric not in ready:
            ready[metric], scoring = work.scored(metric, (settings or {}).get(metric, {}), tell)
        else:
            scoring = _given(ready[metric], metric)
        scorings.append(scoring)
        step = tell(f"cut by {metric}")
        cases = list(itertools.product(keeps, allocations))
        step(0, len(cases))
        for done, (keep, allocation) in enumerate(cases, start=1):
            try:
                made += work.cut(metric, ready[metric], allocation, (resource, keep), repaired)
            except (BudgetError, LawError, PlanError, TypeError, ValueError) as error:
                case = Failure(metric=metric, allocation=allocation, keep=keep, reason=str(error))
                failures.append(case)
            step(done, len(cases))
    return Comparison(
        model=name or work.anatomy.model,
        task=task.name,
        resource=resource,
        keeps=keeps,
        dense=dense.point,
        points=tuple(one.point for one in made),
        failures=tuple(failures),
        scorings=tuple(scorings),
        differences=tuple(_differences(made)),
        agreements=tuple(_agreements({metric: ready[metric] for metric in names})),
        plans=work.plans,
        made_by={
            "strategies": list(strategies),
            "measured_on": len(dense.samples.rows) if len(dense.samples.rows) > 1 else None,
            "same_examples": test is None or test is task,
            "batch_size": batch_size,
            "device": str(work.device),
            "threads": torch.get_num_threads(),
            "versions": versions(),
        },
    )


def _check(names: tuple[str, ...], allocations: Sequence[str], keeps: tuple[float, ...]) -> None:
    if not (names and allocations and keeps):
        raise ValueError(
            f"compare must be given metrics, allocations and shares to keep; got {names}, "
            f"{tuple(allocations)}, {keeps}."
        )
    wrong = [keep for keep in keeps if not 0 < keep < 1]
    if wrong:
        raise ValueError(f"keeps must be shares between 0 and 1, such as 0.5; got {wrong}.")


class _Work:
    """A model under comparison: what is made of it and kept for all points."""

    def __init__(
        self,
        model: nn.Module,
        task: Task,
        test: Task,
        strategies: tuple[str, ...],
        batch_size: int,
        command: Command,
    ):
        self.model, self.task, self.test = model, task, test
        self.strategies, self.command = strategies, command
        self.device = device_of(model)
        given = task_inputs(model, task)
        self.inputs: Inputs = default_inputs(model) if given is None else given
        self.batch = resized(self.inputs, batch_size)
        self.whole: Anatomy = dissect(model, self.inputs)
        self.anatomy = self.whole.select(strategies)
        self.plans: dict[str, Plan] = {}
        self._pass_seconds = 0.0

    def scored(
        self, metric: str, settings: Mapping[str, Any], tell: Callable[[str], Progress]
    ) -> tuple[Scores, Scoring]:
        """Score by one metric, and say what that took."""
        begin = time.perf_counter()
        found = score(
            self.model,
            metric,
            self.task,
            anatomy=self.anatomy,
            strategies=self.strategies,
            progress=tell(metric),
            **settings,
        )
        seconds = time.perf_counter() - begin
        took = Scoring(
            metric=metric,
            seconds=seconds,
            passes=seconds / self.pass_seconds(),
            settings=dict(settings),
        )
        return found, took

    def pass_seconds(self) -> float:
        """Return how long one forward pass over the task takes."""
        if not self._pass_seconds:
            forward = forward_of(self.task)
            with torch.no_grad(), quiet_eval(self.model):
                forward(self.model, next(iter(self.task.batches())))  # warm
                begin = time.perf_counter()
                for batch in self.task.batches():
                    forward(self.model, batch)
                self._pass_seconds = time.perf_counter() - begin
        return self._pass_seconds

    def cut(
        self,
        metric: str,
        scores: Scores,
        allocation: str,
        budget: tuple[str, float],
        repaired: bool,
    ) -> list[_Made]:
        """Cut by a metric at one budget, measure, and the same with what is left repaired."""
        resource, keep = budget
        chosen = plan(scores, {resource: keep}, allocation)
        self.plans[chosen.digest] = chosen
        small = prune(self.model, chosen, self.inputs)
        made = [self.measured(small, chosen, (metric, allocation, keep, False), 0.0)]
        if repaired:
            begin = time.perf_counter()
            small = repair(self.model, chosen, self.task, anatomy=self.whole)
            seconds = time.perf_counter() - begin
            case = metric, allocation, keep, True
            made.append(self.measured(small, chosen, case, seconds))
        return made

    def measured(
        self,
        model: nn.Module,
        chosen: Plan | None,
        case: tuple[str, str, float, bool],
        repair_seconds: float,
    ) -> _Made:
        """Measure one model."""
        metric, allocation, keep, repaired = case
        samples = samples_of(self.test, model)
        low, high = samples.interval()
        latency = 1.0
        if chosen is not None:
            dense_ms, own_ms = latencies_ms([self.model, model], self.batch)
            latency = own_ms / dense_ms
        point = Point(
            metric=metric,
            allocation=allocation,
            keep=keep,
            repaired=repaired,
            params=count_params(model),
            macs=count_macs(model, self.inputs),
            latency=latency,
            value=samples.value,
            low=low,
            high=high,
            repair_seconds=repair_seconds,
            plan=chosen.digest if chosen else "",
            command=self.command(*case) if chosen else "",
        )
        return _Made(point=point, samples=samples)


def _python(resource: str) -> Command:
    def command(metric: str, allocation: str, keep: float, repaired: bool) -> str:
        return (
            f'plan = vlprune.plan(vlprune.score(model, "{metric}", task), '
            f'{{"{resource}": {keep:g}}}, "{allocation}")\n'
            f"small = vlprune.{'repair(model, plan, task)' if repaired else 'prune(model, plan)'}"
        )

    return command


def _given(scores: Scores, name: str) -> Scoring:
    nan = float("nan")
    return Scoring(metric=name, seconds=nan, passes=nan, settings=dict(scores.settings))


def _differences(made: list[_Made]) -> Iterable[Difference]:
    """All pairs at equal budget."""
    for keep in dict.fromkeys(one.point.keep for one in made):
        here = [place for place, one in enumerate(made) if one.point.keep == keep]
        pairs = differences([made[place].samples for place in here])
        for (first, second), (difference, low, high) in pairs.items():
            yield Difference(
                first=here[first], second=here[second], difference=difference, low=low, high=high
            )


def _agreements(scores: Mapping[str, Scores]) -> Iterable[Agreement]:
    """Rank correlation of all pairs of metrics."""
    if not scores:
        return
    anatomy = next(iter(scores.values())).anatomy
    saved = savings(anatomy, "params")
    for first, second in itertools.combinations(scores, 2):
        rows = [
            [np.asarray(scores[metric].values[axis.name]) for metric in (first, second)]
            for axis in anatomy.axes
        ]
        each = [_spearman(a, b) for a, b in rows if len(a) > 2]
        flat = [
            np.concatenate(
                [
                    np.asarray(scores[metric].values[axis.name]) / np.asarray(saved[axis.name])
                    for axis in anatomy.axes
                ]
            )
            for metric in (first, second)
        ]
        known = [value for value in each if not np.isnan(value)]
        yield Agreement(
            first=first,
            second=second,
            within=float(np.mean(known)) if known else float("nan"),
            across=_spearman(*flat),
        )


def _spearman(first: Any, second: Any) -> float:
    if np.ptp(first) == 0 or np.ptp(second) == 0:
        return float("nan")  # scipy warns where ranks are all equal
    return float(scipy.stats.spearmanr(first, second).statistic)
