"""Repair: what is left of a layer learns to stand in for what went, in closed form, no training.

A removed head, neuron or value dimension leaves its consumer (the attention's output projection,
the second matrix of an FFN) with fewer inputs. Its weights and bias are solved again by ridge
regression, so that the residual stream behind it is what it is in the dense model: layer after
layer, each fed by what the repaired ones before it give, in one pass over the data. Where a whole
layer went, the consumer before it aims at the stream behind it. Dimensions of queries and keys are
folded into those that stay first (`queries.py`); last, the outputs are mapped back onto the dense
ones.

Source: the regression is that of GRAIL and CORP (2602.05243) with means and bias; fed by the
already repaired model as in Kwon et al., NeurIPS 2022 (2204.09656). That the stream, not the
layer's own answer, is the target, that rows count by what outputs feel of them, and that a removed
layer is stood in for by the consumer before it, is ours.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from vlprune.anatomy import Anatomy
from vlprune.calls import Inputs, frozen, quiet_eval
from vlprune.consumers import (
    Additions,
    Consumer,
    Forward,
    Key,
    consumers_of,
    examples_of,
    forward_of,
    output_gradients,
    removed_modules,
    size_of,
)
from vlprune.copies import clone
from vlprune.cutting import cut_
from vlprune.dissect import dissect
from vlprune.gates import Gates
from vlprune.moments import Linear, Moments
from vlprune.plan import Plan, PlanRow
from vlprune.pruner import DependencyGraphPruner, Repair, attach_record, check_fits, record_of
from vlprune.recover.projections import find_projection, fold
from vlprune.recover.queries import repair_queries
from vlprune.recover.stepping import Stepper
from vlprune.recover.streams import Place, Stream, find_streams, watching

RIDGES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
_HELD_OUT = 5  # every so-manieth example says which ridge is best, and whether any is
_FEWEST = 10  # examples
_LEAST = 1e-6  # of the targets' variance: what a new solution must win to be taken
_FLOOR = 1e-3  # of the mean: what a row counts that no output feels


class _Stop(NamedTuple):
    key: Key
    tensor: Tensor


@dataclasses.dataclass(slots=True)
class _Seen:
    """What was seen of a map: rows to fit it to, and rows that say whether it helps."""

    fitted: Moments = dataclasses.field(default_factory=Moments)
    held_out: Moments = dataclasses.field(default_factory=Moments)

    def add(self, x: Tensor, target: Tensor, held: Tensor, weight: Tensor | None = None) -> None:
        """Add rows x [n, F] and targets [n, D], those that are `held` [n] to the second kind."""
        for moments, part in ((self.fitted, ~held), (self.held_out, held)):
            moments.add(x[part], target[part], None if weight is None else weight[part])

    def best(
        self, now: Linear, has_bias: bool, ridges: Sequence[float]
    ) -> tuple[Linear | None, float | None, float, float]:
        """Return the best map, its ridge, and the relative errors before and after.

        Map and ridge are None where none of `ridges` does better than `now` on held-out rows.
        """
        constant = None if has_bias else now.bias
        before = self.held_out.error(now)
        errors = {
            ridge: self.held_out.error(self.fitted.fit(now.weight, ridge, constant))
            for ridge in ridges
        }
        ridge = min(errors, key=lambda r: errors[r])
        spread = max(self.held_out.spread(), 1e-30)
        relative = max(before, 0.0) / spread
        if errors[ridge] >= before - _LEAST * spread:
            return None, None, relative, relative
        found = (self.fitted + self.held_out).fit(now.weight, ridge, constant)
        return found, ridge, relative, max(errors[ridge], 0.0) / spread


def repair(
    model: nn.Module,
    plan: Plan,
    task: Any,
    *,
    anatomy: Anatomy | None = None,
    example_inputs: Inputs | None = None,
    targets: Literal["stream", "answer"] = "stream",
    sequential: bool = True,
    sensitivity: bool = True,
    outputs: bool = True,
    ridges: Sequence[float] = RIDGES,
    verify: bool = True,
    progress: Callable[[int, int], None] | None = None,
) -> nn.Module:
    """Return `model` cut by `plan`, with what is left solved again to stand in for what went.

    A layer's new weights are kept only where they do better than the old ones on examples that
    they were not fitted to (every fifth), with the ridge of `ridges` that does best there; then
    they are fitted to all. The record of the result names every layer and its error before and
    after (`vlprune.pruner.record_of(small).repairs`).

    Args:
        model: dense; left as it was.
        plan: made for it.
        task: gives batches and outputs (or a loss); labels are not used where it gives outputs.
        anatomy: of the model, to spare a dissection where the plan removes layers or halves: what
            stands in for these need not be in the plan.
        example_inputs: for the check masked = cut; default: of the task, else of the family.
        targets: "stream": what is added up to there shall be as in the dense model; "answer": only
            the consumer's own answer.
        sequential: feed layers by what the repaired ones before them give; else by the dense
            model's, all at once.
        sensitivity: let tokens count by what a change of theirs does to the outputs (one backward
            pass over the data); else all alike.
        outputs: at the end, map features onto the dense ones, folded into the last projections.
        ridges: in units of the mean variance of a feature; pulls towards the old weights.
        verify: as of `prune`.
        progress: called with (consumers done, consumers).

    Raises:
        PlanError: if the plan does not fit.
        ValueError: if the task has fewer than 10 examples.
    """
    check_fits(plan, model)
    student = clone(model)
    batches = list(task.batches())
    examples = sum(map(size_of, batches))
    if examples < _FEWEST:
        raise ValueError(f"task must have at least {_FEWEST} examples; got {examples} in repair.")
    if example_inputs is None:
        example_inputs = task.example_inputs(model)
    rows = plan.rows
    if removed_modules(rows):
        known = {row.axis.name for row in rows}
        anatomy = dissect(model, example_inputs) if anatomy is None else anatomy
        others = (axis for axis in anatomy.select(("head", "ffn")).axes if axis.name not in known)
        rows += tuple(PlanRow(axis=axis, keep=tuple(range(axis.units))) for axis in others)
    job = _Repair(model, student, rows, forward_of(task), batches, tuple(ridges))
    with ExitStack() as stack:
        for one in (model, student):
            stack.enter_context(quiet_eval(one))
            stack.enter_context(frozen(one))
            gates = stack.enter_context(Gates(one, [row.axis for row in rows]))
        gates.keep(plan.keep)
        if targets == "stream":
            job.find_streams()
        if sensitivity:
            job.feel()
        with torch.no_grad():
            queries = repair_queries(model, student, rows, job.gone, job.forward, batches)
            job.report |= {repair.module: repair for repair in queries}
            job.solve_all(sequential, progress)
            if outputs:
                job.align()
    small = DependencyGraphPruner(student, example_inputs).prune(plan, verify=verify)
    plain = clone(model)
    cut_(plain, plan.rows)
    before = plain.state_dict()
    changed = [name for name, t in small.state_dict().items() if not torch.equal(t, before[name])]
    record = record_of(small)
    record = dataclasses.replace(
        record,
        repaired=tuple(dict.fromkeys((*record.repaired, *changed))),
        repairs=(*record.repairs, *job.report.values()),
    )
    attach_record(small, record)
    return small


class _Repair:
    """One repair under way."""

    def __init__(
        self,
        model: nn.Module,
        student: nn.Module,
        rows: Sequence[PlanRow],
        forward: Forward,
        batches: Sequence[Any],
        ridges: tuple[float, ...],
    ):
        self.model, self.student = model, student
        self.forward, self.batches, self.ridges = forward, batches, ridges
        self.report: dict[str, Repair] = {}
        self.gone = removed_modules(rows)
        self.consumers = consumers_of(student, rows, self.gone)
        self.seen = {path: _Seen() for path in self.consumers}
        self.streams: dict[Key, Stream] = {}
        self.felt: list[dict[Key, Tensor]] = [{} for _ in batches]  # what rows count [n]
        sizes = [size_of(batch) for batch in batches]
        self.examples = [range(sum(sizes[:i]), sum(sizes[: i + 1])) for i in range(len(sizes))]

    def find_streams(self) -> None:
        """Find what each consumer's answer is added to."""
        batch = self.batches[0]
        run = lambda: self.forward(self.model, batch)  # noqa: E731
        self.streams = find_streams(self.model, run, self.consumers, self.gone)

    def feel(self) -> None:
        """Ask by backward passes what outputs feel of every row of every consumer."""
        for felt, batch in zip(self.felt, self.batches, strict=True):
            with torch.enable_grad(), Additions(self.model, self.consumers) as additions:
                outputs = self.forward(self.model, batch)
                for gradients in output_gradients(outputs, additions.zeros):
                    for key, gradient in gradients.items():
                        rows = self.consumers[key[0]].rows(gradient)
                        square = rows.float().pow(2).sum(-1)
                        felt[key] = felt[key] + square if key in felt else square

    def solve_all(self, sequential: bool, progress: Callable[[int, int], None] | None) -> None:
        """Run all batches from consumer to consumer; solve each when all have come to it."""
        runner = self.student if sequential else self.model
        with self._forwards(self.model, "out") as dense, self._forwards(runner, "in") as runs:
            waiting: list[_Stop | None] = [run.step() for run in runs]
            solved: set[str] = set()
            while any(waiting):
                key = next(stop.key for stop in waiting if stop is not None)
                consumer = self.consumers[key[0]]
                here = {n: stop for n, stop in enumerate(waiting) if stop and stop.key == key}
                for number, stop in here.items():
                    target = self._target(key, runs[number], dense[number])
                    self._add(consumer, number, key, stop.tensor, target)
                if sequential:
                    self._solve(consumer)
                for number in here:
                    waiting[number] = runs[number].step()
                solved.add(consumer.path)
                if progress is not None:
                    progress(len(solved), len(self.consumers))
            for run in dense:
                while run.step() is not None:
                    pass
            self.wanted = [run.result for run in dense]
            self.given = [run.result for run in runs]
        if not sequential:
            for consumer in self.consumers.values():
                self._solve(consumer)
            self.given = [self.forward(self.student, batch) for batch in self.batches]

    @contextmanager
    def _forwards(self, model: nn.Module, side: Literal["in", "out"]) -> Iterator[list[Stepper]]:
        """One forward per batch, stopping where inputs ("in") or targets ("out") are known."""
        befores = collections.Counter(stream.before for stream in self.streams.values())
        afters: dict[Place, list[Key]] = collections.defaultdict(list)
        for key, stream in self.streams.items():
            if stream.after is not None and side == "out":
                afters[stream.after].append(key)
        runs: list[Stepper] = []

        def look(place: Place, tensor: Tensor) -> None:
            run = Stepper.current()
            if run not in runs:  # the other side's, on the same model
                return
            if place in befores:
                run.seen[place] = (tensor, befores[place])
            path, at, call, which = place
            if path in self.consumers and at == side and which == 0:
                stream = self.streams.get((path, call), Stream())
                if side == "in" or stream.after is None:
                    Stepper.stop(_Stop((path, call), tensor))
            for key in afters.get(place, ()):
                Stepper.stop(_Stop(key, tensor))

        paths = {place[0] for place in (*befores, *afters) if place} | set(self.consumers)
        with watching(model, look, paths):
            runs += [Stepper(functools.partial(self.forward, model, b)) for b in self.batches]
            try:
                yield runs
            finally:
                for run in runs:
                    run.close()

    def _target(self, key: Key, run: Stepper, dense: Stepper) -> Tensor:
        """What the consumer's answer should be, for one batch."""
        stream = self.streams.get(key, Stream())
        while key not in dense.seen:
            stop: _Stop | None = dense.step()
            if stop is None:
                raise RuntimeError(f"{key[0]} must run in the dense model as in the masked one.")
            dense.seen[stop.key] = stop.tensor
        target: Tensor = dense.seen.pop(key)
        if stream.before is None:
            return target
        before = _used(run, stream.before)
        if stream.after is None:
            change = _used(dense, stream.before) - before
            return target + (change if stream.scale is None else change / stream.scale)
        change = target - before
        return change if stream.scale is None else change / stream.scale

    def _add(self, consumer: Consumer, number: int, key: Key, x: Tensor, target: Tensor) -> None:
        """Take in the rows of one batch."""
        examples = examples_of(x, len(self.examples[number])) + self.examples[number].start
        rows, wanted = consumer.rows(x)[:, consumer.kept], consumer.rows(target)
        counts = self.felt[number].get(key)
        if counts is None:
            counts = torch.ones(len(rows), device=rows.device)
        counts = counts / counts.mean().clamp_min(1e-30) + _FLOOR
        held = examples % _HELD_OUT == _HELD_OUT - 1
        self.seen[consumer.path].add(rows, wanted, held, counts)

    def _solve(self, consumer: Consumer) -> None:
        """Find the ridge that does best on held-out examples, and fit all examples with it."""
        weight, bias = consumer.weight, consumer.bias
        now = Linear(weight=weight, bias=weight.new_zeros(len(weight)) if bias is None else bias)
        seen = self.seen[consumer.path]
        found, ridge, before, after = seen.best(now, bias is not None, self.ridges)
        if found is not None:
            consumer.take(found)
        self.report[consumer.path] = Repair(
            module=consumer.path,
            kept=int(consumer.stays.sum()),
            of=len(consumer.stays),
            before=before,
            after=after,
            ridge=ridge,
        )

    def align(self) -> None:
        """Map features [N, E] onto the dense ones, in the last projections."""
        for place, rows in enumerate(zip(*self.given, strict=True)):
            wanted = torch.cat([row[place] for row in self.wanted])
            given = torch.cat(rows)
            if given.dim() == 2 and given.is_floating_point() and len(given) > given.shape[1]:
                self._align(place, given, wanted)

    def _align(self, place: int, given: Tensor, wanted: Tensor) -> None:
        held = torch.arange(len(given), device=given.device) % _HELD_OUT == _HELD_OUT - 1
        seen = _Seen()
        seen.add(given, wanted, held)
        size = given.shape[1]
        now = Linear(weight=torch.eye(size, device=given.device), bias=given.new_zeros(size))
        better, ridge, before, after = seen.best(now, has_bias=False, ridges=self.ridges)
        if better is None:
            return
        found = find_projection(
            self.student, lambda: self.forward(self.student, self.batches[0]), place
        )
        if found is None:
            return
        fold(self.student, found, better.weight)
        self.report[found.name] = Repair(
            module=found.name, kept=size, of=size, before=before, after=after, ridge=ridge
        )


def _used(run: Stepper, place: Place) -> Tensor:
    """The tensor seen at a place; forgotten when all who need it have had it."""
    tensor, uses = run.seen[place]
    if uses > 1:
        run.seen[place] = (tensor, uses - 1)
    else:
        del run.seen[place]
    found: Tensor = tensor
    return found
