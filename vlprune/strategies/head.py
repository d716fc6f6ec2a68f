"""Attention heads: rows of the query, key and value projections and columns of the output one.

The outer width stays. Which rows are which head is declared by the families; where the dependency
graph sees them too, it must agree.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from vlprune.anatomy import Axis, Gate, Knob, Site, Swap, SwapMoment
from vlprune.dissect import ModelView
from vlprune.errors import TraceError
from vlprune.layout import AttentionLayout, relative
from vlprune.registry import STRATEGIES


@STRATEGIES.register("head")
def heads(view: ModelView) -> Iterator[Axis]:
    """Yield one axis per declared attention that has heads left."""
    for path, layout in view.attentions.items():
        attention = view.model.get_submodule(path)
        obstacle = _obstacle(attention, layout)
        if obstacle:
            view.refuse(path, obstacle)
        elif getattr(attention, layout.heads) > 0:
            axis = _axis(view, path, layout)
            disagreement = _disagreement(view, axis)
            if disagreement:
                view.refuse(path, disagreement)
            else:
                yield axis


def _obstacle(attention: nn.Module, layout: AttentionLayout) -> str:
    for attribute, reason in layout.refuse:
        value = getattr(attention, attribute, None)
        if value is not None and value is not False and not isinstance(value, nn.Identity):
            return f"heads stay: {reason} ({attribute}={type(value).__name__})"
    return ""


def _axis(view: ModelView, path: str, layout: AttentionLayout) -> Axis:
    attention = view.model.get_submodule(path)
    units, size = getattr(attention, layout.heads), getattr(attention, layout.head_dim)
    out = relative(path, layout.out)
    sites = [
        Site(tensor=name, dim=0, offset=part * units * size, block=size)
        for tensor, parts in layout.rows
        if (name := view.tensor_name(relative(path, tensor)))
        for part in range(parts)
    ]
    consumed = view.tensor_name(f"{out}.weight")
    assert consumed is not None, f"{out} has no weight"
    sites.append(Site(tensor=consumed, dim=1, block=size))
    moments: tuple[tuple[SwapMoment, str], ...] = (
        ("gate", layout.gate),
        ("cut", layout.cut),
        ("empty", layout.empty),
    )
    return Axis(
        name=f"{path}:head",
        kind="head",
        tower=view.tower(path),
        depth=view.depth(path),
        units=units,
        removal="slice",
        gate=Gate(kind="input", modules=(out,), block=size),
        sites=tuple(sites),
        knobs=tuple(
            Knob(module=path, attribute=attribute, per_unit=size if per == "head_dim" else int(per))
            for attribute, per in layout.knobs
        ),
        swaps=tuple(Swap(module=path, to=to, when=when) for when, to in moments if to),
        scopes=((path,),),
    )


def _disagreement(view: ModelView, axis: Axis) -> str:
    """Why the declared axis cannot be trusted: the graph sees its consumer and says otherwise."""
    consumer = axis.gate.modules[0]
    owners = {site.tensor.rpartition(".")[0] for site in axis.sites}
    if not all(view.graph.sees(owner) for owner in owners):
        return ""  # its weights are no modules of their own, or did not run: the law will tell
    try:
        traced = view.graph.sites(consumer, axis.units, axis.gate.block)
    except TraceError:
        return ""  # the graph misreads this forward (a qkv that is indexed, for one)
    declared = set(axis.sites)
    stray = [site for site in traced if site not in declared]
    return f"declared heads must agree with the traced ones; traced {stray[0]}" if stray else ""
