"""Whole layers: a block leaves its ModuleList, and the residual stream passes by.

Layer indices inside the blocks that stay (kv caches) and depth counts are renumbered.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from vlprune.anatomy import Axis, Gate, Knob, Swap
from vlprune.classes.passing import passing_names
from vlprune.discovery.discover import Stack
from vlprune.discovery.skip import fault, has_data, keeps_to_try, knob_sets
from vlprune.dissect import ModelView
from vlprune.registry import STRATEGIES

_QUICK_SECONDS = 0.5


@STRATEGIES.register("layer")
def layers(view: ModelView) -> Iterator[Axis]:
    """Yield one axis per stack of blocks: those that can go by trial."""
    for stack in view.discovery.stacks:
        yield from _tried(view, stack)


def _tried(view: ModelView, stack: Stack) -> Iterator[Axis]:
    """The axis of the layers that can go, one by one and together, if there are any.

    Best is a layer that leaves its list; where others count on its place, one that passes its
    input on; else those layers that can go at all.
    """
    candidates = _candidates(view, stack)
    reasons = []
    for axis in candidates:
        keeps = keeps_to_try(axis.units, _is_quick(view))
        reason = next((found for keep in keeps if (found := _fault(view, axis, keep))), "")
        reasons.append(reason)
        if not reason:
            everything = axis.removal == "delete" and axis.units == _depth(view, stack)
            least = 1 if everything and _fault(view, axis, ()) else 0
            yield dataclasses.replace(axis, least=least)
            return
    some = [narrowed for axis in candidates if (narrowed := _narrowed(view, axis)) is not None]
    if not some:
        view.refuse(stack.path, f"layers stay: {reasons[0]}", "layer")
        return
    axis, faults = max(some, key=lambda found: found[0].units)
    for path, reason in faults:
        view.refuse(path, f"the layer stays: {reason}", "layer")
    yield axis


def _is_quick(view: ModelView) -> bool:
    """Say whether the model runs fast enough for many trials."""
    return has_data(view.model) and view.discovery.seconds < _QUICK_SECONDS


def _depth(view: ModelView, stack: Stack) -> int:
    return len(view.model.get_submodule(stack.path))  # type: ignore[arg-type]


def _candidates(view: ModelView, stack: Stack) -> list[Axis]:
    """The ways in which layers of the stack may go, the best first."""
    sets = knob_sets(view.model, stack.path, _depth(view, stack))
    axes = [_axis(view, stack, knobs) for knobs in sets]
    if stack.argument == 0 or stack.keyword == "hidden_states":
        block = view.model.get_submodule(axes[0].gate.modules[0])
        axes += [_passing(axes[-1], name) for name in passing_names(type(block))]
    return axes


def _passing(axis: Axis, name: str) -> Axis:
    """The axis with layers that stay in their place and pass their input on."""
    swaps = tuple(Swap(module=path, to=name, when="bypass") for path in axis.gate.modules)
    return dataclasses.replace(axis, removal="bypass", swaps=swaps, knobs=())


def _narrowed(view: ModelView, axis: Axis) -> tuple[Axis, list[tuple[str, str]]] | None:
    """The axis without the layers that cannot go, and those; None where none can."""
    everything = range(axis.units)
    faults = {u: _fault(view, axis, tuple(v for v in everything if v != u)) for u in everything}
    free = [unit for unit in everything if not faults[unit]]
    if not free:
        return None
    some = dataclasses.replace(
        axis,
        units=len(free),
        gate=dataclasses.replace(axis.gate, modules=tuple(axis.gate.modules[u] for u in free)),
        scopes=tuple(axis.scopes[unit] for unit in free),
        swaps=tuple(axis.swaps[u] for u in free) if axis.removal == "bypass" else axis.swaps,
    )
    keeps = keeps_to_try(some.units, _is_quick(view))
    if any(_fault(view, some, keep) for keep in keeps):
        return None
    return some, [(axis.gate.modules[u], reason) for u, reason in faults.items() if reason]


def _fault(view: ModelView, axis: Axis, keep: tuple[int, ...]) -> str:
    return fault(view.model, view.calls, axis, keep)


def _axis(view: ModelView, stack: Stack, knobs: tuple[Knob, ...]) -> Axis:
    indices = stack.indices
    declared = view.blocks.get(f"{stack.path}.{indices[0]}")
    owner = stack.path.rpartition(".")[0]
    paths = tuple(f"{stack.path}.{index}" if stack.path else str(index) for index in indices)
    empty = declared.owner_empty if declared is not None else ""
    return Axis(
        name=f"{stack.path}:layer",
        kind="layer",
        tower=view.tower(stack.path),
        depth=0,
        units=len(paths),
        removal="delete",
        gate=Gate(kind="skip", modules=paths, argument=stack.argument, keyword=stack.keyword),
        knobs=knobs,
        swaps=(Swap(module=owner, to=empty, when="empty"),) if empty else (),
        scopes=tuple((path,) for path in paths),
    )
