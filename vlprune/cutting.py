"""Cutting: slice tensors by sites, take blocks out, set what must follow.

No second trace and no autograd; device, dtype, `requires_grad` and tied weights stay. Class swaps
make room for counts that a class cannot hold; forwards are never patched. Nothing is proven here:
that is `law.py`, called by `pruner.py`.
"""

from __future__ import annotations

import collections
import copy
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vlprune.anatomy import Knob
from vlprune.classes.padded import PADDED, PaddedLinear
from vlprune.classes.passing import is_passing
from vlprune.copies import drop_caches
from vlprune.errors import PlanError
from vlprune.layout import resolve
from vlprune.plan import PlanRow

LAYER_INDICES = ("layer_idx", "layer_num", "layer_id", "layer_index", "idx", "index")


def cut_(model: nn.Module, plan_rows: Sequence[PlanRow]) -> None:
    """Cut `model` in place by the rows of a plan.

    Raises:
        PlanError: if a tensor or module that the plan names is not there or has another size.
    """
    rows = [row for row in plan_rows if row.removed]
    for row in rows:
        for swap in row.axis.swaps:
            if swap.when == "cut" and swap.to == PADDED:
                _swap(model.get_submodule(swap.module), swap.to)
    _slice(model, [row for row in rows if row.axis.removal == "slice"])
    for moment in ("cut", "empty"):
        for row in rows:
            for swap in row.axis.swaps:
                if swap.when == moment and swap.to != PADDED and (moment == "cut" or not row.keep):
                    _swap(model.get_submodule(swap.module), swap.to)
    for row in rows:
        for knob in row.axis.knobs:
            _turn(model, knob, row)
    whole_first = sorted(rows, key=lambda row: row.axis.kind != "layer")
    for row in whole_first:
        if row.axis.removal == "bypass":
            _bypass(model, row)
    for row in rows:
        for path in row.axis.lists:
            _shorten(model, path, row)
    for row in rows:
        if row.axis.removal == "delete":
            _delete(model, row)


def _slice(model: nn.Module, rows: Iterable[PlanRow]) -> None:
    removed: dict[str, dict[int, set[int]]] = collections.defaultdict(
        lambda: collections.defaultdict(set)
    )
    rows = list(rows)
    for row in rows:
        for site in row.axis.sites:
            removed[site.tensor][site.dim].update(site.indices(row.removed))
    owners = _owners(model)
    for name, dims in removed.items():
        tensor = _tensor(model, name)
        sliced = tensor.detach()
        for dim, indices in dims.items():
            whole = sliced.shape[dim] if dim < sliced.dim() else 0
            sliced = _without(sliced, dim, indices, name)
            for module, attribute in owners[id(tensor)]:
                if isinstance(module, PaddedLinear) and attribute == "weight":
                    pads = [row for row in rows if _pads(model, row, module)]
                    _note_places(module, rows, pads, (name, dim), whole)
        _replace(owners[id(tensor)], tensor, sliced)


def _note_places(
    module: PaddedLinear,
    rows: Sequence[PlanRow],
    pads: Sequence[PlanRow],
    place: tuple[str, int],
    size: int,
) -> None:
    """Tell a padded layer which places become zeros (`pads`) and which go for good."""
    padded: set[int] = set()
    gone: set[int] = set()
    span = 0
    for row in rows:
        for site in row.axis.sites:
            if (site.tensor, site.dim) == place:
                (padded if row in pads else gone).update(site.indices(row.removed))
                span = site.stride if row in pads and site.stride else span
    module.drop_places(place[1], size, padded - gone, gone, span)


def _pads(model: nn.Module, row: PlanRow, module: nn.Module) -> bool:
    swaps = [swap for swap in row.axis.swaps if swap.to == PADDED]
    return any(model.get_submodule(swap.module) is module for swap in swaps)


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
        _update_sizes(module, tuple(old.shape))
        drop_caches(module)


def _update_sizes(module: Any, old: tuple[int, ...]) -> None:
    """Let the sizes that a torch layer stores say what its weight is; its shape was `old`."""
    weight = module._parameters.get("weight")
    if isinstance(module, PaddedLinear):
        module.out_features, module.in_features = module.full_rows, module.full_columns
    elif isinstance(module, nn.Linear):
        module.out_features, module.in_features = weight.shape
    elif isinstance(module, nn.modules.conv._ConvNd):
        module.out_channels = weight.shape[0]
        if module.groups > 1:  # depthwise: a group a channel
            module.groups = module.in_channels = module.out_channels
        else:
            module.in_channels = weight.shape[1]
    elif isinstance(module, nn.modules.batchnorm._BatchNorm):
        holder: Any = module.running_mean if weight is None else weight
        module.num_features = len(holder)
    elif weight is not None and tuple(getattr(module, "normalized_shape", ())) == old:
        module.normalized_shape = tuple(weight.shape)


def _swap(module: Any, to: str) -> None:
    cls = resolve(to)
    if not isinstance(module, cls):
        module.__class__ = cls
    if hasattr(module, "after_swap"):
        module.after_swap()


def _turn(model: nn.Module, knob: Knob, row: PlanRow) -> None:
    """Set a knob; what a dotted one goes through is copied first, for others may share it.

    A count follows the kept units; a list with an entry per unit loses those of the removed.
    """
    holder: Any = model.get_submodule(knob.module)
    *through, attribute = knob.attribute.split(".")
    for step in through:
        setattr(holder, step, copy.copy(getattr(holder, step)))
        holder = getattr(holder, step)
    attribute, _, entry = attribute.partition("[")
    old = getattr(holder, attribute, None)
    if entry:
        place = int(entry.rstrip("]"))
        changed = [*old]  # type: ignore[misc]
        changed[place] = len(row.keep) * knob.per_unit
        setattr(holder, attribute, tuple(changed))
    elif knob.counts == "kept":
        before = range(row.axis.units) if old is None else old
        setattr(holder, attribute, tuple(before[unit] for unit in row.keep))
    elif knob.counts != "units":
        setattr(holder, attribute, _renumbered(model, knob, row, old))
    elif isinstance(old, (list, tuple)):
        is_slice = row.axis.removal == "slice"
        gone = set(row.removed) if is_slice else {row.axis.layer(unit) for unit in row.removed}
        setattr(holder, attribute, type(old)(v for i, v in enumerate(old) if i not in gone))
    else:
        setattr(holder, attribute, len(row.keep) * knob.per_unit)


def _renumbered(model: nn.Module, knob: Knob, row: PlanRow, old: Any) -> Any:
    """The numbers of layers, or of the states after them, once some layers are gone."""
    if isinstance(old, (list, tuple)):
        return type(old)(_renumbered(model, knob, row, number) for number in old)
    gone = {row.axis.layer(unit) for unit in row.removed}
    stack: Any = model.get_submodule(row.axis.path)
    depth = len(stack)
    size = depth + 1 if knob.counts == "states" else depth
    place = old % size  # a negative number counts from the end
    last = knob.counts == "layers"  # a removed layer's answer is that of the one before it
    now = sum(i not in gone for i in range(place + last)) - last
    return now - (size - len(gone)) if old < 0 else now


def _bypass(model: nn.Module, row: PlanRow) -> None:
    for unit in row.removed:
        swap = row.axis.swaps[unit]
        if is_passing(model.get_submodule(swap.module)):
            continue  # a part of a block that is gone
        _swap(model.get_submodule(swap.module), swap.to)
        for scope in row.axis.scopes[unit]:
            if scope == swap.module:  # the block stays in its place and loses all that it held
                block = model.get_submodule(scope)
                for held in (block._modules, block._parameters, block._buffers):
                    held.clear()
                continue
            owner, _, name = scope.rpartition(".")
            block = model.get_submodule(owner)
            if name in block._modules:
                block._modules[name] = None


def _shorten(model: nn.Module, path: str, row: PlanRow) -> None:
    """Take the modules of removed units out of a list that has one a unit."""
    modules: Any = model.get_submodule(path)
    for unit in reversed(row.removed):
        del modules[unit]


def _delete(model: nn.Module, row: PlanRow) -> None:
    stack: Any = model.get_submodule(row.axis.path)
    gone = [row.axis.layer(unit) for unit in row.removed]
    places = [place for place in range(len(stack)) if place not in gone]
    for place in reversed(gone):
        del stack[place]
    for now, (before, block) in enumerate(zip(places, stack, strict=True)):
        for module in block.modules():
            for attribute in LAYER_INDICES:
                if vars(module).get(attribute) == before and now != before:
                    setattr(module, attribute, now)
