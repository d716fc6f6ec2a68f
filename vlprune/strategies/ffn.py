"""FFN neurons: rows of the first matrix (and of a gate) and columns of the second.

Found by the dependency graph alone: a linear layer in a transformer block whose input features
are coupled with nothing but the outputs of linear layers of the same block.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

from torch import nn

from vlprune.anatomy import Axis, Gate, Site, under
from vlprune.dissect import ModelView
from vlprune.errors import TraceError
from vlprune.graph import is_inside
from vlprune.layout import relative
from vlprune.registry import STRATEGIES


@STRATEGIES.register("ffn")
def neurons(view: ModelView) -> Iterator[Axis]:
    """Yield one axis per feed-forward network found in a transformer block."""
    for stack in view.stacks:
        for index in range(len(stack.blocks)):
            block = f"{stack.path}.{index}"
            for consumer in _candidates(view, block):
                axis = _axis(view, block, consumer, index)
                if axis is not None:
                    yield axis


def _candidates(view: ModelView, block: str) -> Iterator[str]:
    """Linear layers of the block that ran and belong to no attention."""
    attentions = [path for path in view.attentions if under(path, block)]
    outs = [relative(path, view.attentions[path].out) for path in attentions]
    for path, module in view.model.get_submodule(block).named_modules(prefix=block):
        linear = isinstance(module, nn.Linear) and module.in_features > 0
        free = not any(under(path, attention) for attention in attentions) and path not in outs
        if linear and free and view.graph.sees(path):
            yield path


def _axis(view: ModelView, block: str, consumer: str, depth: int) -> Axis | None:
    members = view.graph.coupled_modules(consumer)
    producers = [path for path, side in members if side == "out"]
    if not producers or not is_inside(members, block) or not _are_linear(view, producers):
        return None  # fed by the residual stream, not by a hidden layer of its own
    linear = view.model.get_submodule(consumer)
    assert isinstance(linear, nn.Linear), consumer
    units = linear.in_features
    try:
        traced = view.graph.sites(consumer, units)
    except TraceError as error:
        view.refuse(consumer, str(error))
        return None
    path = _common([*producers, consumer])
    return Axis(
        name=f"{path}:ffn",
        kind="ffn",
        tower=view.tower(path),
        depth=depth,
        units=units,
        removal="slice",
        gate=Gate(kind="input", modules=(consumer,)),
        sites=_by_first_name(view, traced),
    )


def _are_linear(view: ModelView, paths: Sequence[str]) -> bool:
    return all(isinstance(view.model.get_submodule(path), nn.Linear) for path in paths)


def _by_first_name(view: ModelView, sites: Sequence[Site]) -> tuple[Site, ...]:
    named = [(view.tensor_name(site.tensor), site) for site in sites]
    return tuple(
        Site(tensor=name, dim=site.dim, offset=site.offset, block=site.block)
        for name, site in named
        if name is not None
    )


def _common(paths: Sequence[str]) -> str:
    """The path of the innermost module that holds all of `paths`."""
    steps = zip(*(path.split(".") for path in paths), strict=False)
    shared = itertools.takewhile(lambda names: len(set(names)) == 1, steps)
    return ".".join(names[0] for names in shared)
