"""Pruning a model by a plan: a cut copy, proven equal to the masked model, with its record."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from vlprune.anatomy import Axis, Site
from vlprune.calls import Inputs
from vlprune.copies import clone
from vlprune.cutting import cut_
from vlprune.dissect import default_inputs, fingerprint_of_model
from vlprune.errors import PlanError, UnsupportedModelError
from vlprune.faults import check_plain
from vlprune.history import names_after
from vlprune.law import check_masked_equals_cut
from vlprune.layout import family_of
from vlprune.plan import Plan
from vlprune.registry import FAMILIES

_RECORD = "vlprune_record"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Repair:
    """What solving a layer again did (`recover/repair.py`).

    Attributes:
        module: the layer, by its path in the dense model; for outputs the projection's parameter.
        kept, of: how many of its input features are left.
        before, after: mean squared error to what its answer should be, over the variance of that,
            on examples that it was not fitted to.
        ridge: that was best; None where the old weights were, and stayed.
    """

    module: str
    kept: int
    of: int
    before: float
    after: float
    ridge: float | None


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """What a cut model knows of its past: how to build the original, and all cuts since.

    Attributes:
        source: family and its arguments for `Family.build`, None where they are unknown.
        plans: every plan it was cut by, in order.
        relative_error: of the last check masked = cut, None where it was not run.
        repaired: tensors that are not the original's any more, by their names in this model.
        repairs: what was done to them.
        trained: whether weights were trained since the last cut (`fit` and `distil` note it).
    """

    source: dict[str, Any] | None = None
    plans: tuple[Plan, ...] = ()
    relative_error: float | None = None
    repaired: tuple[str, ...] = ()
    repairs: tuple[Repair, ...] = ()
    trained: bool = False


def record_of(model: nn.Module) -> Record:
    """Return the record that a cut model carries; an empty one for any other model."""
    found = getattr(model, _RECORD, None)
    return found if isinstance(found, Record) else Record()


def attach_record(model: nn.Module, record: Record) -> None:
    """Let `model` carry `record`; plain data, copied and pickled with it."""
    setattr(model, _RECORD, record)


class DependencyGraphPruner:
    """Cuts one model by plans whose sites came from its dependency graph, and proves the result.

    Args:
        model: the dense model; left as it was unless `prune(inplace=True)`.
        example_inputs: what the check runs on; see `calls.py` for the forms. Default: made by the
            family of the model's class.
    """

    def __init__(self, model: nn.Module, example_inputs: Inputs | None = None):
        self.model = model
        self.example_inputs = example_inputs

    def prune(self, plan: Plan, *, verify: bool = True, inplace: bool = False) -> nn.Module:
        """Return the model without the units that `plan` does not keep.

        Args:
            plan: made for this model's structure.
            verify: check in float64 that the cut model computes what the masked one does.
            inplace: cut the given model itself; with `verify` only after a copy passed.

        Raises:
            PlanError: if the plan does not fit.
            LawError: if masked and cut model disagree; nothing is returned or changed then.
        """
        check_fits(plan, self.model)
        past = record_of(self.model)
        source = past.source or source_of(self.model)
        error = None
        if verify or not inplace:
            cut = clone(self.model)
            cut_(cut, plan.rows)
        if verify:
            error = check_masked_equals_cut(self.model, cut, plan, self._inputs())
        if inplace:
            cut = self.model
            cut_(cut, plan.rows)
        record = Record(
            source=source,
            plans=(*past.plans, plan),
            relative_error=error,
            repaired=names_after(past.repaired, plan),
            repairs=past.repairs,
            trained=past.trained,
        )
        attach_record(cut, record)
        return cut

    def _inputs(self) -> Inputs:
        if self.example_inputs is None:
            return default_inputs(self.model, batch=2)
        return self.example_inputs


def source_of(model: nn.Module) -> dict[str, Any] | None:
    """Return how to build an uncut model again, None where no family can tell."""
    try:
        name, family = family_of(model, FAMILIES)
    except UnsupportedModelError:
        return None
    arguments = family.describe(model) if family.describe else None
    return None if arguments is None else {"family": name, "arguments": arguments}


def check_fits(plan: Plan, model: nn.Module) -> None:
    """Raise PlanError unless `plan` was made for a model of this structure."""
    check_plain(model)
    fingerprint = fingerprint_of_model(model)
    if plan.fingerprint != fingerprint:
        raise PlanError(
            f"plan must fit the model {type(model).__name__} {fingerprint}; got one made for "
            f"{plan.fingerprint}. Make the plan again with vlprune.plan."
        )
    sizes = {name: tensor.shape for name, tensor in model.state_dict(keep_vars=True).items()}
    faults = [
        fault for axis in plan.axes for site in axis.sites if (fault := _outside(axis, site, sizes))
    ]
    if faults:
        raise PlanError(f"plan must lie within the model's tensors; {'; '.join(faults[:5])}.")


def cut_but_last_(model: nn.Module, plans: Sequence[Plan]) -> None:
    """Cut `model` itself by all plans but the last, from the first on that is of its structure.

    Raises:
        PlanError: if one of them, or the last, does not fit what the ones before it leave.
    """
    fingerprint = fingerprint_of_model(model)
    since = next((i for i, plan in enumerate(plans) if plan.fingerprint == fingerprint), 0)
    for plan in plans[since:-1]:
        check_fits(plan, model)
        cut_(model, plan.rows)
    check_fits(plans[-1], model)


def _outside(axis: Axis, site: Site, sizes: Mapping[str, Sequence[int]]) -> str:
    """What is wrong with a site, as a plan from elsewhere may have it."""
    shape = sizes.get(site.tensor)
    if shape is None:
        return ""  # a name of another class's, which is taken on when it is cut
    last = site.offset + axis.units * site.block + (site.repeats - 1) * site.stride
    inside = -len(shape) <= site.dim < len(shape) and min(site.offset, site.stride) >= 0
    if inside and min(site.block, site.repeats) > 0 and last <= shape[site.dim]:
        return ""
    return f"axis {axis.name!r} does not in {site.tensor!r} of shape {tuple(shape)}"
