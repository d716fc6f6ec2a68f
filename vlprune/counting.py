"""What a cut model holds, counted on the model itself: units by shapes, MACs by torch's counter."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from torch import nn

from vlprune.calls import Inputs, calls_of, cast, map_tensors, quiet_eval
from vlprune.certificate import AxisCount
from vlprune.copies import clone
from vlprune.cost import count_macs
from vlprune.dissect import tensor_shapes
from vlprune.history import Fate
from vlprune.plan import Plan


def counted_macs(
    small: nn.Module, dense: nn.Module | None, plans: Sequence[Plan], inputs: Inputs
) -> tuple[int | None, int | None, int | None]:
    """Return multiply-accumulates on the inputs: dense, planned (on the plan's), achieved."""
    planned = plans[-1].planned
    return (
        None if dense is None else _macs_of(dense, inputs),
        None if planned is None else planned.macs,
        _macs_of(small, inputs),
    )


def _macs_of(model: nn.Module, inputs: Inputs) -> int | None:
    """What torch's counter says of a copy on the device meta; None where it cannot be run there."""
    try:
        dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
        meta = [map_tensors(cast(call, dtype), lambda t: t.to("meta")) for call in calls_of(inputs)]
        counted = clone(model).to("meta")
        with quiet_eval(counted):
            return count_macs(counted, meta)
    except Exception:  # a forward that asks for values, or an operation without a meta kernel
        return None


def counted(
    small: nn.Module, dense: nn.Module | None, fates: dict[str, Fate]
) -> tuple[AxisCount, ...]:
    """Return units planned and found, axis by axis.

    Args:
        small: the cut model.
        dense: the original or its structure; None: nothing is counted.
        fates: what the plans did, from `history.fates_of`.
    """
    found = {} if dense is None else _units_found(small, dense, list(fates.values()))
    return tuple(
        AxisCount(
            name=fate.name,
            tower=fate.axis.tower,
            kind=fate.axis.kind,
            depth=fate.depth,
            units=fate.axis.units,
            planned=sum(not fate.parts or fate.parts[unit] is not None for unit in fate.keep),
            achieved=found.get(fate.name),
        )
        for fate in fates.values()
    )


def _units_found(small: nn.Module, dense: nn.Module, fates: Sequence[Fate]) -> dict[str, int]:
    """Units that the cut model has by the shapes of both, of axes whose units shapes tell."""
    new = _shapes(small)
    found: dict[str, int] = {}
    for fate in fates:
        if fate.axis.removal == "delete":
            now: Any = small.get_submodule(fate.name.rpartition(":")[0])
            before: Any = dense.get_submodule(fate.axis.path)
            found[fate.name] = fate.axis.units - (len(before) - len(now))
        elif fate.axis.removal == "bypass":
            held = [f"{part}." for part in fate.parts if part is not None]
            found[fate.name] = sum(any(name.startswith(part) for name in new) for part in held)
    shared = _losses(_shapes(dense), new, fates)
    for alone in (True, False):  # then what is lost where all others that share it are known
        for losses in shared:
            unknown = [name for name in losses.sizes if name not in found]
            if len(unknown) == 1 and (len(losses.sizes) == 1) == alone:
                (name,) = unknown
                found[name] = losses.units[name] - losses.without(found) // losses.sizes[name]
    for losses in shared:  # every tensor must say the same; a part of a unit counts as one
        name, size = next(iter(losses.sizes.items()))
        more = losses.without(found) if losses.sizes.keys() <= found.keys() else 0
        if more:
            found[name] -= -(-abs(more) // size) * (1 if more > 0 else -1)
    return found


@dataclasses.dataclass(slots=True)
class _Loss:
    """How much shorter a dimension of a tensor is, and whose units lie there."""

    lost: int
    kinds: set[str] = dataclasses.field(default_factory=set)
    sizes: dict[str, int] = dataclasses.field(default_factory=dict)  # indices of a unit
    units: dict[str, int] = dataclasses.field(default_factory=dict)

    def without(self, found: dict[str, int]) -> int:
        """What is lost besides the units that are known to be gone."""
        known = [name for name in self.sizes if name in found]
        return self.lost - sum(self.sizes[n] * (self.units[n] - found[n]) for n in known)


def _losses(
    old: dict[str, tuple[int, ...]], new: dict[str, tuple[int, ...]], fates: Sequence[Fate]
) -> list[_Loss]:
    """The dimensions that hold units of one kind only: those of several are products."""
    found: dict[tuple[str, int], _Loss] = {}
    for fate in fates:
        places = dict.fromkeys((site.tensor, site.dim) for site in fate.axis.sites)
        for (before, dim), (now, _, size) in zip(places, fate.tensors, strict=False):
            if before in old and now in new:
                lost = old[before][dim] - new[now][dim]
                loss = found.setdefault((now, dim), _Loss(lost=lost))
                loss.kinds.add(fate.axis.kind)
                loss.sizes[fate.name], loss.units[fate.name] = size, fate.axis.units
    return [loss for loss in found.values() if len(loss.kinds) == 1]


def _shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {tensor.name: tensor.shape for tensor in tensor_shapes(model)}
