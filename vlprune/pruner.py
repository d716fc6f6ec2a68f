"""Cutting a model by a plan: slice tensors by sites, take blocks out, set what must follow.

A cut needs no second trace and no autograd; device, dtype, `requires_grad` and tied weights stay.
Class swaps make room for counts that a class cannot hold; forwards are never patched. The result
is checked against the masked model before anyone gets it (`law.py`).
"""

from __future__ import annotations

import collections
import copy
import dataclasses
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from vlprune.anatomy import Knob
from vlprune.calls import Inputs, clone
from vlprune.dissect import default_inputs, fingerprint_of_model
from vlprune.errors import PlanError, UnsupportedModelError
from vlprune.law import check_masked_equals_cut
from vlprune.layout import family_of, resolve
from vlprune.plan import Plan, PlanRow
from vlprune.registry import FAMILIES

_RECORD = "vlprune_record"
_LAYER_INDICES = ("layer_idx", "layer_num")  # where a transformers layer says which it is


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """What a cut model knows of its past: how to build the original, and all cuts since.

    Attributes:
        source: family and its arguments for `Family.build`, None where they are unknown.
        plans: every plan it was cut by, in order.
        relative_error: of the last check masked = cut, None where it was not run.
    """

    source: dict[str, Any] | None = None
    plans: tuple[Plan, ...] = ()
    relative_error: float | None = None


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
            cut_(cut, plan)
        if verify:
            error = check_masked_equals_cut(self.model, cut, plan, self._inputs())
        if inplace:
            cut = self.model
            cut_(cut, plan)
        attach_record(cut, Record(source=source, plans=(*past.plans, plan), relative_error=error))
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
    fingerprint = fingerprint_of_model(model)
    if plan.fingerprint != fingerprint:
        raise PlanError(
            f"plan must fit the model {type(model).__name__} {fingerprint}; got one made for "
            f"{plan.fingerprint}. Make the plan again with vlprune.plan."
        )


def cut_(model: nn.Module, plan: Plan) -> None:
    """Cut `model` in place by `plan`.

    Raises:
        PlanError: if a tensor or module that the plan names is not there or has another size.
    """
    rows = [row for row in plan.rows if row.removed]
    _slice(model, [row for row in rows if row.axis.removal == "slice"])
    for row in rows:
        moments = ("cut",) if row.keep else ("cut", "empty")
        for swap in row.axis.swaps:
            if swap.when in moments:
                _swap(model.get_submodule(swap.module), swap.to)
        for knob in row.axis.knobs:
            _turn(model, knob, len(row.keep))
    for row in rows:
        if row.axis.removal == "bypass":
            _bypass(model, row)
    for row in rows:
        if row.axis.removal == "delete":
            _delete(model, row)


def _slice(model: nn.Module, rows: Iterable[PlanRow]) -> None:
    removed: dict[str, dict[int, set[int]]] = collections.defaultdict(
        lambda: collections.defaultdict(set)
    )
    for row in rows:
        for site in row.axis.sites:
            removed[site.tensor][site.dim].update(site.indices(row.removed))
    owners = _owners(model)
    for name, dims in removed.items():
        tensor = _tensor(model, name)
        sliced = tensor.detach()
        for dim, indices in dims.items():
            sliced = _without(sliced, dim, indices, name)
        _replace(owners[id(tensor)], tensor, sliced)


def _without(tensor: Tensor, dim: int, indices: set[int], name: str) -> Tensor:
    size = tensor.shape[dim] if dim < tensor.dim() else 0
    if indices and max(indices) >= size:
        raise PlanError(
            f"tensor {name!r} must reach index {max(indices)} in dim {dim}; "
            f"got shape {tuple(tensor.shape)}. The plan was made for another model."
        )
    kept = torch.tensor([i for i in range(size) if i not in indices], dtype=torch.long)
    sliced = tensor.index_select(dim, kept.to(tensor.device))
    assert sliced.shape[dim] == size - len(indices), name  # requested = removed
    return sliced


def _tensor(model: nn.Module, name: str) -> Tensor:
    owner, _, attribute = name.rpartition(".")
    try:
        tensor = getattr(model.get_submodule(owner), attribute)
    except AttributeError:
        tensor = None
    if not isinstance(tensor, Tensor):
        raise PlanError(
            f"tensor {name!r} must be in the model; {type(model).__name__} has none of that name. "
            "The plan was made for another model or another version of its library."
        )
    return tensor


def _owners(model: nn.Module) -> dict[int, list[tuple[nn.Module, str]]]:
    """Tensor identity to every (module, attribute) that holds it: tied weights stay tied."""
    owners: dict[int, list[tuple[nn.Module, str]]] = collections.defaultdict(list)
    for module in model.modules():
        for attribute, tensor in [*module._parameters.items(), *module._buffers.items()]:
            if tensor is not None:
                owners[id(tensor)].append((module, attribute))
    return owners


def _replace(owners: list[tuple[nn.Module, str]], old: Tensor, sliced: Tensor) -> None:
    if isinstance(old, nn.Parameter):
        sliced = nn.Parameter(sliced, requires_grad=old.requires_grad)
    for module, attribute in owners:
        setattr(module, attribute, sliced)
        if isinstance(module, nn.Linear):
            module.out_features, module.in_features = module.weight.shape


def _swap(module: Any, to: str) -> None:
    cls = resolve(to)
    if not isinstance(module, cls):
        module.__class__ = cls
    if hasattr(module, "after_swap"):
        module.after_swap()


def _turn(model: nn.Module, knob: Knob, kept: int) -> None:
    """Set a knob; what a dotted one goes through is copied first, for others may share it."""
    holder: Any = model.get_submodule(knob.module)
    *through, attribute = knob.attribute.split(".")
    for step in through:
        setattr(holder, step, copy.copy(getattr(holder, step)))
        holder = getattr(holder, step)
    setattr(holder, attribute, kept * knob.per_unit)


def _bypass(model: nn.Module, row: PlanRow) -> None:
    for unit in row.removed:
        swap = row.axis.swaps[unit]
        _swap(model.get_submodule(swap.module), swap.to)
        for scope in row.axis.scopes[unit]:
            owner, _, name = scope.rpartition(".")
            block = model.get_submodule(owner)
            if name in block._modules:
                block._modules[name] = None


def _delete(model: nn.Module, row: PlanRow) -> None:
    stack: Any = model.get_submodule(row.axis.path)
    for unit in reversed(row.removed):
        del stack[unit]
    for index, block in enumerate(stack):
        for module in block.modules():
            for attribute in _LAYER_INDICES:
                if isinstance(getattr(module, attribute, None), int):
                    setattr(module, attribute, index)
