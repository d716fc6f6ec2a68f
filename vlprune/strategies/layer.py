"""Whole layers: a block leaves its ModuleList, and the residual stream passes by.

Layer indices inside the blocks that stay (kv caches) and depth counts are renumbered.
"""

from __future__ import annotations

from collections.abc import Iterator

from vlprune.anatomy import Axis, Gate, Knob, Swap
from vlprune.dissect import ModelView
from vlprune.registry import STRATEGIES


@STRATEGIES.register("layer")
def layers(view: ModelView) -> Iterator[Axis]:
    """Yield one axis per stack of blocks."""
    for stack in view.stacks:
        paths = tuple(f"{stack.path}.{i}" for i in range(len(stack.blocks)))
        owner = stack.path.rpartition(".")[0]
        first = stack.blocks[0]
        yield Axis(
            name=f"{stack.path}:layer",
            kind="layer",
            tower=view.tower(stack.path),
            depth=0,
            units=len(paths),
            removal="delete",
            gate=Gate(kind="skip", modules=paths),
            knobs=tuple(Knob(module=owner, attribute=name) for name in first.depth_knobs),
            swaps=(Swap(module=owner, to=first.owner_empty, when="empty"),)
            if first.owner_empty
            else (),
            scopes=tuple((path,) for path in paths),
        )
