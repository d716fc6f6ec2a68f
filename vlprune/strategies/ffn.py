"""FFN neurons: rows of the first matrix (and of a gate) and columns of the second.

Found by the dependency graph alone: a linear layer in a transformer block whose input features
are coupled with nothing but the outputs of linear layers of the same block.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Sequence

from torch import nn

from vlprune.anatomy import Axis, Gate, Site, under
from vlprune.dissect import ModelView
from vlprune.errors import TraceError
from vlprune.layout import relative
from vlprune.registry import STRATEGIES


@STRATEGIES.register("ffn")
def neurons(view: ModelView) -> Iterator[Axis]:
    """Yield one axis per feed-forward network found in a transformer block."""
    for stack in view.stacks:
        for index in range(len(stack.blocks)):
            block = f"{stack.path}.{index}"
            candidates = list(_candidates(view, block))
            if not candidates:
                continue  # asking for the graph would trace the model for nothing
            if not any(view.graph.sees(path) for path in candidates):
                view.refuse(block, "neurons stay: the example inputs' outputs do not depend on it")
            for consumer in filter(view.graph.sees, candidates):
                axis = _axis(view, block, consumer, index)
                if axis is not None:
                    yield axis


def _candidates(view: ModelView, block: str) -> Iterator[str]:
    """Linear layers of the block that belong to no attention."""
    attentions = [path for path in view.attentions if under(path, block)]
    outs = [relative(path, view.attentions[path].out) for path in attentions]
    for path, module in view.model.get_submodule(block).named_modules(prefix=block):
        linear = isinstance(module, nn.Linear) and module.in_features > 0
        free = not any(under(path, attention) for attention in attentions) and path not in outs
        if linear and free:
            yield path


def _axis(view: ModelView, block: str, consumer: str, depth: int) -> Axis | None:
    above = view.graph.producers(consumer)
    inside = all(under(path, block) for path in (*above.linears, *above.passed))
    if above.open_ended or not above.linears or not inside:
        return None  # fed by the residual stream, not by a hidden layer of its own
    norms = [path for path in above.passed if _mixes_features(view.model.get_submodule(path))]
    if norms:
        view.refuse(consumer, f"neurons stay: {norms[0]} normalises over them")
        return None
    linear = view.model.get_submodule(consumer)
    assert isinstance(linear, nn.Linear), consumer
    units = linear.in_features
    try:
        traced = view.graph.sites(consumer, units)
    except TraceError as error:
        view.refuse(consumer, str(error))
        return None
    path = _common([*above.linears, consumer])
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


def _mixes_features(module: nn.Module) -> bool:
    """Say whether what a module answers for one feature depends on others: it has weights."""
    return any(True for _ in module.parameters())


def _by_first_name(view: ModelView, sites: Sequence[Site]) -> tuple[Site, ...]:
    named = [(view.tensor_name(site.tensor), site) for site in sites]
    return tuple(dataclasses.replace(site, tensor=name) for name, site in named if name is not None)


def _common(paths: Sequence[str]) -> str:
    """The path of the innermost module that holds all of `paths`."""
    steps = zip(*(path.split(".") for path in paths), strict=False)
    shared = itertools.takewhile(lambda names: len(set(names)) == 1, steps)
    return ".".join(names[0] for names in shared)
