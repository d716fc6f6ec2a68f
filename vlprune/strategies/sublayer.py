"""Sub-layers: the attention, cross-attention or FFN half of a block, with its norm.

What is left of the block adds nothing in its place; the residual stream passes by.
"""

from __future__ import annotations

from collections.abc import Iterator

from vlprune.anatomy import Axis, Gate, Swap
from vlprune.discovery.discover import Stack
from vlprune.dissect import ModelView
from vlprune.layout import HalfLayout, relative
from vlprune.registry import STRATEGIES


@STRATEGIES.register("sublayer")
def sublayers(view: ModelView) -> Iterator[Axis]:
    """Yield one axis per stack and kind of half; its units are the blocks that have that half."""
    for stack in view.discovery.stacks:
        declared = view.blocks.get(f"{stack.path}.{stack.indices[0]}")
        for half in declared.halves if declared is not None else ():
            blocks = tuple(
                f"{stack.path}.{index}"
                for index in stack.indices
                if _is_present(view, f"{stack.path}.{index}.{half.scopes[0]}")
            )
            if blocks and declared is not None:
                yield _axis(view, stack, half, blocks, declared.bypass)


def _is_present(view: ModelView, path: str) -> bool:
    owner, _, name = path.rpartition(".")
    return getattr(view.model.get_submodule(owner), name, None) is not None


def _axis(
    view: ModelView, stack: Stack, half: HalfLayout, blocks: tuple[str, ...], bypass: str
) -> Axis:
    modules = tuple(relative(block, half.module) for block in blocks)
    return Axis(
        name=f"{stack.path}:sublayer.{half.name}",
        kind="sublayer",
        tower=view.tower(modules[0]),
        depth=0,
        units=len(blocks),
        removal="bypass",
        gate=Gate(kind=half.gate, modules=modules, argument=half.argument, keyword=half.keyword),
        swaps=tuple(Swap(module=block, to=bypass, when="bypass") for block in blocks),
        scopes=tuple(tuple(relative(block, scope) for scope in half.scopes) for block in blocks),
    )
