"""Plain models: cut ones that open_clip, timm or transformers load without this package.

A library's class holds one size for all layers of a stack, so a plain plan keeps equally many units
on each, drops whole layers, and leaves whole what the class cannot express. What it can is found by
trial: the class is built with the sizes and its tensors are compared.
"""

from __future__ import annotations

import collections
import dataclasses
import os
import re
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vlprune.anatomy import Anatomy, Axis
from vlprune.calls import Inputs, calls_of, cast, quiet_eval
from vlprune.contracts import Task
from vlprune.copies import clone, exact_clone
from vlprune.cost import count_params, price, resource_of
from vlprune.cutting import cut_
from vlprune.dissect import default_inputs
from vlprune.errors import BudgetError, CheckpointError, LawError, PlanError
from vlprune.history import Fate, fates_of
from vlprune.law import TOLERANCE, difference
from vlprune.layout import Family
from vlprune.pipeline import mask, plan, plan_of
from vlprune.plan import Plan, Scores, make_plan
from vlprune.pruner import record_of, source_of
from vlprune.ranking import keep_after, ranks, savings
from vlprune.registry import FAMILIES

_MEND = (
    "Make one with `vlprune plan SCORES --plain MODEL` (vlprune.plain_plan), or save it with "
    "vlprune.save_pretrained."
)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Plain:
    """A folder that a library loads by itself.

    Attributes:
        folder: where its files lie.
        load: the line of Python that loads it.
        params: parameters of the stock model.
        relative_error: between it and the cut model, in float64.
    """

    folder: str
    load: str
    params: int
    relative_error: float

    def __str__(self) -> str:
        return f"{self.load}  # {self.params:,} params, equal to {self.relative_error:.1e}"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Restriction:
    """What it costs that a plan is plain: beside the best free plan of the same budget.

    Attributes:
        free, plain: share of the sum of scores that a plan keeps.
        free_params, plain_params: of the planned models.
        measures: of the model masked by the free and by the plain plan; None without a task.
    """

    free: float
    plain: float
    free_params: int
    plain_params: int
    measures: tuple[float, float] | None = None

    def __str__(self) -> str:
        measured = (
            "; measure {:.2f} (free {:.2f})".format(*reversed(self.measures))
            if self.measures
            else ""
        )
        return (
            f"keeps {self.plain:.1%} of the scores (free {self.free:.1%}) with "
            f"{self.plain_params:,} params (free {self.free_params:,}){measured}"
        )


def to_plain(
    small: nn.Module, folder: str | os.PathLike[str], *, example_inputs: Inputs | None = None
) -> Plain:
    """Save a cut model as its library's own class, for machines without this package.

    Args:
        small: as `prune`, `repair` or `from_pretrained` returned it, trained since or not.
        folder: new or empty.
        example_inputs: what the check runs on; default: made by the family of the model's class.

    Raises:
        PlanError: if the stock class cannot hold the plan, naming the axes.
        CheckpointError: if the folder holds something.
        LawError: if the stock model computes something else.
    """
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise CheckpointError(f"{folder} must be new or empty; it is not. Choose another folder.")
    family, arguments = _stock_arguments(small)
    assert family.write is not None
    stock = _built(family, arguments, small)
    _check_shapes(small, stock)
    stock.load_state_dict(small.state_dict(), strict=True)
    stock.to(next(p.dtype for p in small.parameters() if p.is_floating_point()))
    error = _difference(small, stock, example_inputs)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as scratch:
        staged = Path(scratch) / "plain"
        staged.mkdir()
        line = family.write(stock, arguments, staged)
        os.replace(staged, folder)
    return Plain(
        folder=str(folder),
        load=line.replace("FOLDER", str(folder)),
        params=count_params(stock),
        relative_error=error,
    )


def plain_plan(
    scores: Scores, budget: Mapping[str, float], model: nn.Module, *, min_units: int = 0
) -> Plan:
    """Return the plan of a budget that loses least among those that the stock class can hold.

    All layers of a stack lose their worst unit together, the set that is worth least per parameter
    (or MAC) saved first. A set that saves far more than is still needed (a layer) is also passed
    over, and what then loses less is taken. The budget is met within one set.

    Args:
        scores: what every unit is worth; add "layer" to the strategies to let layers go.
        budget: see `vlprune.plan`.
        model: that was scored: what its class can hold is tried on it.
        min_units: at least so many units stay on every axis.

    Raises:
        PlanError: if its class can hold no plan at all.
        BudgetError: if the budget cannot be met.
    """
    anatomy = scores.anatomy
    groups = stock_groups(model, anatomy)
    if not groups:
        raise PlanError(
            f"a stock {type(model).__name__} must be able to lose some of "
            f"{', '.join(anatomy.kinds)}; it can hold none with fewer. Score other strategies, "
            "such as ffn,layer."
        )
    keep = _cheapest(scores, _bundles(scores, groups, resource_of(budget), min_units), budget)
    return plan_of(scores, keep, budget, allocation="plain", min_units=min_units)


def restriction(
    scores: Scores, plain: Plan, model: nn.Module | None = None, task: Task | None = None
) -> Restriction:
    """Return what a plain plan costs beside the global plan of the same scores and budget.

    Args:
        scores: that both are made of.
        plain: as `plain_plan` returned it.
        model: to measure, masked by each.
        task: that measures.
    """
    free = plan(scores, plain.asked)
    measures = None
    if model is not None and task is not None:
        with torch.no_grad(), quiet_eval(model):
            found = []
            for chosen in (free, plain):
                with mask(model, chosen):
                    found.append(task.measure(model))
        measures = (found[0], found[1])
    return Restriction(
        free=_score_kept(scores, free),
        plain=_score_kept(scores, plain),
        free_params=price(scores.anatomy, free.keep).params,
        plain_params=price(scores.anatomy, plain.keep).params,
        measures=measures,
    )


def stock_groups(model: nn.Module, anatomy: Anatomy) -> tuple[tuple[Axis, ...], ...]:
    """Return sets of axes that may lose units, one on each, so that the stock class holds it.

    Each stack is tried alone; those that its class sizes together (a text encoder and a decoder of
    one config) are tried together. What is in no set has to stay whole.
    """
    stacks: dict[str, list[Axis]] = collections.defaultdict(list)
    for axis in anatomy.axes:
        stacks[re.sub(r"\d+", "N", axis.name)].append(axis)
    groups, tied = [], collections.defaultdict(list)
    for members in stacks.values():
        if _is_held(model, anatomy, members):
            groups.append(tuple(members))
        else:
            tied[members[0].kind, members[0].units].extend(members)
    return (*groups, *(tuple(m) for m in tied.values() if _is_held(model, anatomy, m)))


def _is_held(model: nn.Module, anatomy: Anatomy, axes: Sequence[Axis]) -> bool:
    """Say whether the stock class holds the model without the first unit of all these axes."""
    if any(axis.units < 2 or axis.units <= axis.least for axis in axes):
        return False
    tried = make_plan(anatomy, {axis.name: tuple(range(1, axis.units)) for axis in axes})
    small = clone(model).to("meta")
    try:
        cut_(small, tried.rows)
        family, arguments = _stock_arguments(small, (*record_of(model).plans, tried))
        return not _mismatches(small, _built(family, arguments, small, empty=True))
    except PlanError:
        return False


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class _Bundle:
    """Units that go together, by their number among all units."""

    units: list[int]
    worth: float
    saved: float
    group: int


def _bundles(
    scores: Scores, groups: Sequence[Sequence[Axis]], resource: str, min_units: int
) -> list[_Bundle]:
    """All sets of units that may go together, those that are worth least per cost first."""
    saved = savings(scores.anatomy, resource)
    starts, total = {}, 0
    for axis in scores.anatomy.axes:
        starts[axis.name], total = total, total + axis.units
    found = []
    for group, axes in enumerate(groups):
        orders = [ranks(scores, axis.name).argsort() for axis in axes]
        free = min(axis.units - max(min_units, axis.least) for axis in axes)
        for place in range(free):
            units = [(a.name, int(order[place])) for a, order in zip(axes, orders, strict=True)]
            bundle = _Bundle(
                units=[starts[name] + unit for name, unit in units],
                worth=sum(scores.values[name][unit] for name, unit in units),
                saved=sum(saved[name][unit] for name, unit in units),
                group=group,
            )
            found.append(bundle)
    return sorted(found, key=lambda bundle: bundle.worth / max(bundle.saved, 1))


def _cheapest(
    scores: Scores, bundles: Sequence[_Bundle], budget: Mapping[str, float]
) -> dict[str, tuple[int, ...]]:
    """What stays: the first sets go until the budget is met, or the last of them is passed over.

    Raises:
        BudgetError: if all sets together are not enough.
    """
    best: tuple[float, dict[str, tuple[int, ...]]] | None = None
    while True:
        try:
            keep = keep_after(scores.anatomy, [bundle.units for bundle in bundles], budget)
        except BudgetError:
            if best is None:
                raise
            return best[1]
        gone = _removed(scores.anatomy, keep)
        taken = [bundle for bundle in bundles if gone.issuperset(bundle.units)]
        loss = sum(bundle.worth for bundle in taken)
        if best is None or loss < best[0]:
            best = loss, keep
        smallest = min((bundle.saved for bundle in bundles), default=0.0)
        if not taken or taken[-1].saved <= smallest:
            return best[1]
        last = taken[-1]
        bundles = [b for b in bundles if b.group != last.group or (b in taken and b is not last)]


def _removed(anatomy: Anatomy, keep: Mapping[str, tuple[int, ...]]) -> set[int]:
    """The numbers among all units of those that go."""
    start, gone = 0, set()
    for axis in anatomy.axes:
        gone |= {start + unit for unit in range(axis.units)} - {start + u for u in keep[axis.name]}
        start += axis.units
    return gone


def _score_kept(scores: Scores, chosen: Plan) -> float:
    kept = sum(scores.values[name][unit] for name, units in chosen.keep.items() for unit in units)
    return kept / sum(sum(row) for row in scores.values.values())


# -- the stock class -------------------------------------------------------------------------------


def _stock_arguments(
    small: nn.Module, plans: tuple[Plan, ...] | None = None
) -> tuple[Family, dict[str, Any]]:
    """The family of a cut model, and the arguments of a stock model of its sizes."""
    record = record_of(small)
    source = record.source or source_of(small)
    family = None if source is None else FAMILIES[source["family"]]
    if source is None or family is None or family.stock is None or family.write is None:
        cls = type(small)
        raise PlanError(
            f"the model must be of a library that loads it by itself; {cls.__module__}."
            f"{cls.__qualname__} is not. Save it with vlprune.save_pretrained."
        )
    fates = fates_of(record.plans if plans is None else plans)
    return family, family.stock(small, fates, source["arguments"])


def _built(
    family: Family, arguments: dict[str, Any], small: nn.Module, empty: bool = False
) -> nn.Module:
    """A stock model, on the meta device if `empty`."""
    from accelerate import init_empty_weights  # lazy: slow to import

    assert family.build is not None
    try:
        with torch.random.fork_rng(devices=[]):
            if not empty:
                return family.build(arguments)
            with init_empty_weights():
                return family.build(arguments)
    except Exception as error:  # whatever a library says of sizes that it cannot hold
        kept = _kept_of(fates_of(record_of(small).plans))
        raise PlanError(
            f"a stock {type(small).__name__} must hold the plan; built with its sizes it raises "
            f"{type(error).__name__}: {str(error).rstrip('.')}. It keeps {kept}. "
            f"{_MEND}"
        ) from error


def _mismatches(small: nn.Module, stock: nn.Module) -> list[str]:
    """Names of tensors that only one of the two has, or has in another shape."""
    one = {name: tensor.shape for name, tensor in small.state_dict().items()}
    other = {name: tensor.shape for name, tensor in stock.state_dict().items()}
    return [name for name in {**one, **other} if one.get(name) != other.get(name)]


def _check_shapes(small: nn.Module, stock: nn.Module) -> None:
    wrong = set(_mismatches(small, stock))
    if not wrong:
        return
    fates = fates_of(record_of(small).plans)
    sorts = {
        (fate.axis.tower, fate.axis.kind)
        for fate in fates.values()
        if any(tensor in wrong for tensor, _, _ in fate.tensors)
        and len(fate.keep) < fate.axis.units
    }
    hit = {n: fate for n, fate in fates.items() if (fate.axis.tower, fate.axis.kind) in sorts}
    what = _kept_of(hit) if hit else f"tensors such as {sorted(wrong)[0]!r} that it sizes otherwise"
    raise PlanError(
        f"a stock {type(small).__name__} must hold the plan: one size for all layers of a stack, "
        f"and heads of the width that its config implies; it keeps {what}. {_MEND}"
    )


def _kept_of(fates: Mapping[str, Fate]) -> str:
    """What is kept, a tower and kind at a time, layer by layer."""
    groups: dict[tuple[str, str], list[Fate]] = collections.defaultdict(list)
    for fate in fates.values():
        groups[fate.axis.tower, fate.axis.kind].append(fate)
    return "; ".join(
        f"{tower} {kind} {' '.join(str(len(f.keep)) for f in members)} of {members[0].axis.units}"
        for (tower, kind), members in groups.items()
    )


def _difference(small: nn.Module, stock: nn.Module, example_inputs: Inputs | None) -> float:
    """The relative error between the two in float64.

    Raises:
        LawError: if it is above the tolerance.
    """
    inputs = default_inputs(small, batch=2) if example_inputs is None else example_inputs
    calls = [cast(call, torch.float64) for call in calls_of(inputs)]
    error = difference(exact_clone(small), exact_clone(stock), calls)
    if not error <= TOLERANCE:
        raise LawError(
            f"the stock {type(stock).__name__} must compute what the cut model computes, to "
            f"{TOLERANCE:g}; got a relative error of {error:.3g}. Nothing was written: its source "
            "does not describe the original fully.",
            relative_error=error,
        )
    return error
