"""The verbs: create_model, score, plan, mask, prune, verify. Each stands alone; values in between.

dissect is in `dissect.py`, save_pretrained and from_pretrained in `store.py`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import itertools
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sized
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vlprune.anatomy import Anatomy, Axis
from vlprune.calls import Inputs, frozen, map_tensors, quiet_eval
from vlprune.consumers import forward_of
from vlprune.contracts import Task
from vlprune.copies import clone
from vlprune.cost import absolute_budget, dense_cost, price
from vlprune.cutting import cut_
from vlprune.dissect import default_inputs, dissect
from vlprune.errors import LawError, PlanError, UnknownNameError, UnsupportedModelError
from vlprune.faults import check_weights, where_not_finite
from vlprune.gates import Gates
from vlprune.latency import with_latency
from vlprune.law import check_masked_equals_cut
from vlprune.plan import Plan, Scores, make_plan
from vlprune.pruner import (
    DependencyGraphPruner,
    Record,
    attach_record,
    check_fits,
    cut_but_last_,
    record_of,
    source_of,
)
from vlprune.recover.repair import repair
from vlprune.registry import ALLOCATIONS, FAMILIES, METRICS, STRATEGIES
from vlprune.shipped import SHIPPED
from vlprune.store import from_pretrained
from vlprune.timetable import LatencyTable

Progress = Callable[[int, int], None]


def create_model(
    spec: str,
    *,
    pretrained: str | bool | None = None,
    device: torch.device | str | None = None,
    **arguments: Any,
) -> nn.Module:
    """Return the model that `spec` names, in eval mode.

    Args:
        spec: "open_clip:NAME", "timm:NAME", "hf:FOLDER-OR-HUB-NAME", a model that ships
            ("scenes-clip", see `shipped.py`), or a folder that `save_pretrained` wrote.
        pretrained: weights: an open_clip tag, True or False for timm and hf. Default: the weights
            in an hf folder, random ones for open_clip and timm.
        device: where to put the model; "meta" builds it without weights: enough to dissect, plan
            and cut the largest.
        arguments: passed to the library's own constructor.

    Raises:
        UnknownNameError: if `spec` names nothing.
        CheckpointError: if it is a damaged folder.
    """
    if spec in SHIPPED:
        model = SHIPPED[spec].load()
    elif Path(spec).is_dir():
        return from_pretrained(spec, device=device)
    else:
        library, _, name = spec.partition(":")
        named = [f for key, f in FAMILIES.items() if library in (key, key.partition("_")[0])]
        found = [family.create for family in named if family.create is not None]
        if not name or not found:
            raise UnknownNameError(
                f"model {spec!r} must be open_clip:NAME, timm:NAME, hf:FOLDER, "
                f"{', '.join(SHIPPED)} or a saved folder; it is none of these."
            )
        options = {} if pretrained is None else {"pretrained": pretrained}
        try:
            with _without_weights(device):
                model = found[0](name, **options, **arguments)
        except RuntimeError as error:  # how timm and open_clip say that a name is unknown
            said = textwrap.shorten(str(error), 300, placeholder=" ...")
            raise UnknownNameError(f"{library} could not create {name!r}: {said}") from error
    source = source_of(model)
    if source is not None:
        made = {"spec": spec, "pretrained": pretrained, "arguments": arguments}
        attach_record(model, Record(source={**source, "made": made}))
    return model if device is None else model.to(device)


@contextlib.contextmanager
def _without_weights(device: torch.device | str | None) -> Iterator[None]:
    """For "meta", let every parameter lose its data as soon as a module has it.

    Not `torch.device("meta")`: builders of open_clip and timm ask tensors for their values.
    """
    if device is None or torch.device(device).type != "meta":
        yield
        return
    from accelerate import init_empty_weights  # lazy: slow to import

    with init_empty_weights():
        yield


def score(
    model: nn.Module,
    metric: str = "fisher",
    task: Task | None = None,
    *,
    anatomy: Anatomy | None = None,
    example_inputs: Inputs | None = None,
    strategies: tuple[str, ...] = ("head", "ffn"),
    max_batches: int | None = None,
    progress: Progress | None = None,
    **settings: Any,
) -> Scores:
    """Return what every unit of `model` is worth.

    Args:
        model: any model that can be dissected; run in eval mode and left as it was.
        metric: a name in the registry, see `vlprune list`.
        task: batches, loss and measure; metrics that read only weights need none.
        anatomy: of the model, to spare a dissection.
        example_inputs: for the dissection; default: the task's, else the family's.
        strategies: kinds of axes to score.
        max_batches: of the task, for metrics that run batches.
        progress: called with (done, total).
        settings: of the metric. One that takes scores (mope's `rewire`) may be a metric's name.

    Raises:
        UnknownNameError: for an unknown metric.
        TypeError: if the metric needs a task and there is none.
        ValueError: if weights, or what the model makes of the batches, are not finite: named.
    """
    kind = METRICS[metric]
    check_weights(model)
    if kind.needs != "nothing" and task is None:
        raise TypeError(
            f"metric {metric!r} needs a task ({kind.needs} on its batches); got none. "
            "Give task=vlprune.tasks.Retrieval(loader), or one of your own."
        )
    if anatomy is None:
        inputs = example_inputs if example_inputs is not None else task_inputs(model, task)
        anatomy = dissect(model, inputs)
    _check_strategies(anatomy, strategies)
    for name in getattr(kind, "takes_scores", ()):
        if isinstance(settings.get(name), str):
            settings[name] = score(
                model,
                settings[name],
                task,
                anatomy=anatomy,
                strategies=strategies,
                max_batches=max_batches,
            )
    if kind.needs in ("measure", "task"):
        settings["progress"] = progress
    meter = kind(model, anatomy, strategies=strategies, **settings)
    with quiet_eval(model), frozen(model), _naming_faults(model, task), meter:
        if task is not None and kind.needs == "measure":
            with torch.no_grad():
                meter.update(lambda: task.measure(model))
        elif kind.needs == "task":
            with torch.no_grad():
                meter.update(task)
        elif task is not None and kind.needs != "nothing":
            _run_batches(meter, model, task, kind.needs, max_batches, progress)
        scores: Scores = meter.compute()
    return scores


@contextlib.contextmanager
def _naming_faults(model: nn.Module, task: Task | None) -> Iterator[None]:
    """Where scoring fails for numbers that are not finite, say where the first one arises."""
    try:
        yield
    except (PlanError, AssertionError) as error:
        place = ""
        if task is not None:
            data = task
            place = where_not_finite(
                model, lambda: [data.loss(model, batch) for batch in data.batches()]
            )
        if not place:
            raise
        raise ValueError(
            f"numbers must be finite; the first NaN or infinity is in {place}. Look at the batch "
            "and the weights that it meets."
        ) from error


def _check_strategies(anatomy: Anatomy, strategies: tuple[str, ...]) -> None:
    for name in strategies:
        STRATEGIES[name]  # raises for an unknown one, with the known
    if not anatomy.select(strategies).axes:
        raise UnsupportedModelError(
            f"strategies must find something in {anatomy.model}; {', '.join(strategies) or 'none'} "
            f"found nothing, it has {', '.join(anatomy.kinds)}."
        )


def _run_batches(
    meter: Any,
    model: nn.Module,
    task: Task,
    needs: str,
    max_batches: int | None,
    progress: Progress | None,
) -> None:
    batches = task.batches()
    total = len(batches) if isinstance(batches, Sized) else 0
    outputs = forward_of(task)
    if needs == "steps" and meter.steps is not None:
        batches = itertools.cycle(list(itertools.islice(batches, max_batches)))
        total = max_batches = meter.steps
    for done, batch in enumerate(itertools.islice(batches, max_batches), start=1):
        if needs == "outputs":
            with torch.enable_grad():
                meter.update(outputs(model, batch))
        elif needs in ("backward", "steps"):
            with torch.enable_grad():
                loss = task.loss(model, batch)
            loss.backward()  # type: ignore[no-untyped-call]
            meter.update()
            if needs == "steps":
                meter.step()
        else:
            with torch.no_grad():
                task.loss(model, batch)
            meter.update()
        if progress:
            progress(done, min(total, max_batches or total) or done)


def task_inputs(model: nn.Module, task: Task | None) -> Inputs | None:
    """Return the example inputs of a task on the model's device; None where there are none."""
    inputs = task.example_inputs(model) if task is not None else None
    if inputs is None:
        return None
    device = next(model.parameters()).device
    moved: Inputs = map_tensors(inputs, lambda t: t.to(device))
    return moved


def plan(
    scores: Scores,
    budget: Mapping[str, float],
    allocation: str = "global",
    *,
    min_units: int = 0,
    within: Scores | None = None,
    latency: LatencyTable | None = None,
    **options: Any,
) -> Plan:
    """Return which units stay so that the model costs no more than `budget`.

    Args:
        scores: what every unit is worth.
        budget: {"params": 0.5} or {"macs": 0.5} of the whole model, {"prunable_params": 0.5} of
            what the scored axes can remove; floats are shares to keep, integers absolutes. With a
            table {"latency": 0.5}, or {"latency_ms": 12.5}.
        allocation: a name in the registry: how the budget is spread over axes.
        min_units: at least so many units stay on every axis.
        within: other scores that choose which units of an axis stay; how many is said by
            `scores`. Axes whose units differ in price (layers) are chosen by `scores` alone.
        latency: what the model's parts take on a device (`vlprune.profile`). Under a budget of
            latency neurons stay in multiples that run fast there, unless `round_to` says else.
        options: of the allocation.

    Raises:
        BudgetError: if it cannot be met, saying the least and the most that can be reached.
        PlanError: if the latency table does not fit the scores' anatomy.
    """
    if latency is not None:
        scores = dataclasses.replace(scores, anatomy=with_latency(scores.anatomy, latency))
    anatomy = scores.anatomy
    absolute_budget(anatomy, budget)
    options = {**_fast_widths(anatomy, budget, allocation), **options}
    keep = ALLOCATIONS[allocation](scores, budget, min_units=min_units, **options)
    if within is not None:
        keep = {name: _best(anatomy.axis(name), units, within) for name, units in keep.items()}
    more = {
        **({} if within is None else {"within": within.metric}),
        **({} if anatomy.latency is None else {"latency": anatomy.latency.place}),
        **{k: v.metric if isinstance(v, Scores) else v for k, v in options.items()},
    }
    return plan_of(scores, keep, budget, allocation=allocation, min_units=min_units, **more)


def plan_of(
    scores: Scores,
    keep: Mapping[str, tuple[int, ...]],
    budget: Mapping[str, float],
    **how: Any,
) -> Plan:
    """Return the plan that keeps `keep`, priced, with how it was made.

    Args:
        scores: that it was made of.
        keep: axis name to units that stay.
        budget: that was asked for.
        how: allocation, its options; JSON values only.
    """
    anatomy = scores.anatomy
    return make_plan(
        anatomy,
        keep,
        asked=budget,
        dense=dense_cost(anatomy),
        planned=price(anatomy, keep),
        made_by={
            "metric": scores.metric,
            "settings": scores.settings,
            "strategies": list(anatomy.kinds),
            **how,
        },
    )


def _fast_widths(anatomy: Anatomy, budget: Mapping[str, float], allocation: str) -> dict[str, Any]:
    """The option that keeps neurons in multiples that run fast, under a budget of latency."""
    table = anatomy.latency
    if table is None or table.round_to == 1 or not {"latency", "latency_ms"} & set(budget):
        return {}
    takes = inspect.signature(ALLOCATIONS[allocation]).parameters
    return {"round_to": table.round_to} if "round_to" in takes else {}


def _best(axis: Axis, kept: tuple[int, ...], scores: Scores) -> tuple[int, ...]:
    """As many units of an axis as are kept, the best by other scores."""
    values = scores.values.get(axis.name)
    if axis.removal != "slice" or values is None:
        return kept
    order = sorted(range(axis.units), key=lambda unit: (-values[unit], unit))
    return tuple(sorted(order[: len(kept)]))


@contextlib.contextmanager
def mask(model: nn.Module, plan: Plan) -> Iterator[nn.Module]:
    """Yield `model` computing as if cut by `plan`; bit-exact as before when the block ends.

    Raises:
        PlanError: if the plan was made for another structure.
    """
    check_fits(plan, model)
    with Gates(model, plan.axes) as gates:
        gates.keep(plan.keep)
        yield model


def prune(
    model: nn.Module,
    plan: Plan,
    example_inputs: Inputs | None = None,
    *,
    verify: bool = True,
    inplace: bool = False,
) -> nn.Module:
    """Return a new, smaller module: `model` without the units that `plan` does not keep.

    Args:
        model: left as it was unless `inplace`. Make optimisers after pruning: parameters are new.
        plan: made for this model's structure.
        example_inputs: what the check runs on; default: made by the family of the model's class.
        verify: check in float64 that the result computes what the masked model does.
        inplace: cut the given model itself.

    Raises:
        PlanError: if the plan does not fit.
        LawError: if masked and cut model disagree; the model is not returned.
    """
    return DependencyGraphPruner(model, example_inputs).prune(plan, verify=verify, inplace=inplace)


def compress(
    model: nn.Module,
    task: Task,
    budget: Mapping[str, float],
    *,
    metric: str = "reconstruction",
    allocation: str = "global",
    strategies: tuple[str, ...] = ("head", "ffn"),
    steps: int = 1,
    repaired: bool = True,
    min_units: int = 0,
    settings: Mapping[str, Any] | None = None,
    options: Mapping[str, Any] | None = None,
    latency: LatencyTable | None = None,
    verify: bool = True,
    progress: Callable[[str], Progress] | None = None,
) -> nn.Module:
    """Return a smaller `model`: scored, planned, cut and repaired, all at once or a bit at a time.

    Args:
        model: left as it was.
        task: to score and repair on; no labels are used where it gives outputs.
        budget: see `plan`.
        metric: a name in the registry.
        allocation: a name in the registry.
        strategies: kinds of axes that may lose units.
        steps: so often a part is cut, repaired and scored again; each keeps the same share of what
            the one before it left.
        repaired: solve what is left again after every cut (`repair`).
        min_units: at least so many units stay on every axis.
        settings: of the metric.
        options: of the allocation.
        latency: as of `plan`; a table fits one structure, so with one step only.
        verify: as of `prune`.
        progress: called with a title, gives what is called with (done, total).

    Raises:
        BudgetError: if the budget cannot be met.
        ValueError: if steps is below 1, or above 1 with a latency table.
    """
    if steps < 1 or (latency is not None and steps > 1):
        most = "" if latency is None else " and at most 1, as a latency table fits one structure"
        raise ValueError(f"steps must be at least 1{most}; got {steps}.")
    inputs = task_inputs(model, task)
    whole = dissect(model, inputs)
    anatomy = whole.select(strategies)
    if latency is not None:
        anatomy = with_latency(anatomy, latency)
    dense, limits = dense_cost(anatomy), absolute_budget(anatomy, budget)
    small = model
    for step in range(1, steps + 1):
        part = {
            name: round(getattr(dense, name) * (limit / getattr(dense, name)) ** (step / steps))
            for name, limit in limits.items()
        }
        if step > 1:
            whole = dissect(small, inputs)
            anatomy = whole.select(strategies)
        tell = progress(f"{metric} {step}/{steps}") if progress else None
        scores = score(
            small,
            metric,
            task,
            anatomy=anatomy,
            strategies=strategies,
            progress=tell,
            **(settings or {}),
        )
        chosen = plan(
            scores,
            limits if step == steps else part,
            allocation,
            min_units=min_units,
            **(options or {}),
        )
        if repaired:
            tell = progress(f"repair {step}/{steps}") if progress else None
            small = repair(small, chosen, task, anatomy=whole, verify=verify, progress=tell)
        else:
            small = prune(small, chosen, inputs, verify=verify)
    return small


def verify(dense: nn.Module, small: nn.Module, example_inputs: Inputs | None = None) -> float:
    """Return the relative error between `dense` masked by the plans of `small`, and `small`.

    Where `small` was repaired, what is compared with the masked model is the same cut without the
    repair, and `small` must have its weights but for those that its record names as repaired.

    Args:
        dense: the model that `small` was cut from, with the weights it had then; where it was cut
            more than once, the first one or any in between.
        small: as `prune` or `from_pretrained` returned it, not trained since.
        example_inputs: default: made by the family of the model's class.

    Raises:
        LawError: if they disagree.
        ValueError: if `small` was never cut.
    """
    plans = record_of(small).plans
    if not plans:
        raise ValueError("small must carry a plan; this model was never cut by vlprune.prune.")
    inputs = default_inputs(dense, batch=2) if example_inputs is None else example_inputs
    before_last = clone(dense)
    cut_but_last_(before_last, plans)
    repaired = set(record_of(small).repaired)
    if repaired:
        plain = clone(before_last)
        cut_(plain, plans[-1].rows)
        state = small.state_dict()
        for name, tensor in plain.state_dict().items():
            if name not in repaired and not torch.equal(tensor.cpu(), state[name].cpu()):
                raise LawError(
                    f"weights that were not repaired must be the original's; {name!r} differs."
                )
        small = plain
    return check_masked_equals_cut(before_last, small, plans[-1], inputs)
