"""Dimensions of heads: the same ones of queries and keys, or of values, in every head of a layer.

Where the heads lie was probed (`probe.py`): a row of values feeds one feature of its head, rows of
queries and keys feed all. Rotary embeddings turn dimensions in pairs; which ones, the trials tell
(`fit.py`). The softmax scale stays the original one.

Source: Shi et al., UPop, ICML 2023 (2301.13741), section 3: one mask for all heads of a layer.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

from torch import Tensor, nn

from vlprune.anatomy import Axis, Gate, Growth, Refusal, Site, Swap
from vlprune.calls import Call
from vlprune.classes.split import split_names
from vlprune.discovery.fit import axis_of, fit_any, fit_together, padded_axis
from vlprune.discovery.probe import Coupling

Part = tuple[str, Growth]
PARTS: tuple[Part, ...] = (("qk", "scores"), ("v", "mixture"))
_PAIRS = ("single", "halves", "neighbours")


def dims_of(
    region: nn.Module,
    call: Call,
    coupling: Coupling,
    heads: Axis,
    taken_on: tuple[Swap, ...],
) -> Iterator[Axis | Refusal]:
    """Yield the query-key and the value dimensions of heads: shared by all, then of every one.

    Args:
        region: a real float64 replica.
        call: how it is called.
        coupling: of the heads.
        heads: the axis that they were proven as.
        taken_on: classes declared for heads that lost dimensions, with those for gates.
    """
    for part, growth in PARTS:
        width, sites = _value_rows(coupling) if part == "v" else _score_rows(region, coupling)
        if len(sites) < 1 + (part == "qk") or width < 2:
            reason = f"dimensions stay: its {part} rows lie in no matrix of their own"
            yield Refusal(module=heads.path, reason=reason, kind="head_dim")
            continue
        swaps = _ways(region, heads, taken_on)
        plain = axis_of(coupling, heads.path)
        variants = _variants(region, coupling, plain, part, growth, width, sites, swaps)
        found = fit_any(region, call, variants)
        if isinstance(found, str):
            yield Refusal(module=heads.path, reason=f"dimensions stay: {found}", kind="head_dim")
            continue
        yield found
        yield from _of_every_head(region, call, found, coupling)


def _of_every_head(
    region: nn.Module, call: Call, shared: Axis, coupling: Coupling
) -> Iterator[Axis | Refusal]:
    """One axis per head (or per group that shares keys): its own dimensions, padded."""
    padded = padded_axis(region, shared)
    rows = {site for site in shared.sites if site.dim == 0 and _is_matrix(region, site)}
    if padded is None or not rows <= set(padded.sites):
        name = min(_owner(site) for site in rows)
        reason = f"dimensions of single heads stay: {name} is no linear layer that is called"
        yield Refusal(module=shared.path, reason=reason, kind="head_dim_per_head")
        return
    gates = tuple(swap for swap in shared.swaps if swap.when == "gate")
    cuts = tuple(swap for swap in padded.swaps if swap.when == "cut")
    axes = [
        dataclasses.replace(
            padded,
            name=f"{shared.name.replace(':head_dim.', ':head_dim_per_head.')}.{head}",
            kind="head_dim_per_head",
            sites=_of_head(padded.sites, head, coupling.units),
            gate=_gate_of_head(padded, head, coupling.units),
            swaps=(*gates, *cuts),
            least=0,
        )
        for head in range(coupling.units)
    ]
    reason = fit_together(region, call, axes)
    if reason:
        reason = f"dimensions of single heads stay: {reason}"
        yield Refusal(module=shared.path, reason=reason, kind="head_dim_per_head")
        return
    yield from axes


def _of_head(sites: Sequence[Site], head: int, heads: int) -> tuple[Site, ...]:
    """The rows of one head among those that all heads share."""
    return tuple(
        dataclasses.replace(
            site,
            offset=site.offset + head * (site.repeats // heads) * site.stride,
            repeats=site.repeats // heads,
        )
        for site in sites
    )


def _gate_of_head(axis: Axis, head: int, heads: int) -> Gate:
    """A gate on the products of one head; of values where the axis has them, else of queries."""
    rows = axis.gate.sites or [site for site in axis.sites if site.dim == 0]
    matrices = tuple(s for s in _of_head(rows, head, heads) if not s.tensor.endswith(".bias"))
    modules = tuple(dict.fromkeys(map(_owner, matrices)))
    return Gate(kind="product", modules=modules, sites=matrices, within=axis.gate.within)


def _ways(region: nn.Module, heads: Axis, taken_on: tuple[Swap, ...]) -> list[tuple[Swap, ...]]:
    """Sets of classes to take on: the declared ones, then those made by rule."""
    ways = [taken_on]
    for knob in heads.knobs:
        if knob.per_unit == 1 and "." not in knob.attribute and "[" not in knob.attribute:
            cls = type(region.get_submodule(knob.module))
            ways += [
                (*(swap for swap in taken_on if swap.when == "gate"), made)
                for name in split_names(cls, knob.attribute)
                for made in (Swap(module=knob.module, to=name, when="cut"),)
            ]
    return ways


def _value_rows(coupling: Coupling) -> tuple[int, tuple[Site, ...]]:
    """Features per head, and the sites that feed one each."""
    return coupling.value_dims, coupling.values


def _score_rows(region: nn.Module, coupling: Coupling) -> tuple[int, tuple[Site, ...]]:
    """Dimensions per head, and the sites of queries and keys with their biases."""
    rest = [s for s in coupling.sites[:-1] if s not in coupling.values and s.dim == 0]
    matrices = [s for s in rest if _is_matrix(region, s) and s.block > 1]
    width = min((site.block for site in matrices), default=0)
    places = {(_owner(site), site.offset, site.block) for site in matrices}
    rows = [s for s in rest if (_owner(s), s.offset, s.block) in places or s in matrices]
    return (width, tuple(rows)) if all(s.block % width == 0 for s in matrices) else (0, ())


def _is_matrix(region: nn.Module, site: Site) -> bool:
    owner, _, name = site.tensor.rpartition(".")
    tensor: Tensor = getattr(region.get_submodule(owner), name)
    return tensor.dim() > 1


def _owner(site: Site) -> str:
    return site.tensor.rpartition(".")[0]


def _variants(
    region: nn.Module,
    coupling: Coupling,
    heads: Axis,
    part: str,
    growth: Growth,
    width: int,
    sites: Sequence[Site],
    ways: Sequence[tuple[Swap, ...]],
) -> Iterator[Axis]:
    """Ways in which these dimensions may go, the best first."""
    gates = tuple(swap for swap in ways[0] if swap.when == "gate")
    for grouping in _PAIRS if part == "qk" else _PAIRS[:1]:
        if grouping != "single" and width % 2:
            continue
        units = width if grouping == "single" else width // 2
        if units < 2:
            continue
        rows = tuple(s for site in sites for s in _spread(site, coupling.units, width, grouping))
        consumer = coupling.sites[-1]
        columns = _spread(consumer, coupling.units, width, grouping) if part == "v" else ()
        axis = dataclasses.replace(
            heads,
            name=f"{heads.path}:head_dim.{part}",
            kind="head_dim",
            units=units,
            sites=(*rows, *columns),
            grows=growth,
            least=1,  # heads without dimensions are heads removed
        )
        gated = list(_gated(region, axis, coupling, rows, width))
        for one in gated:
            for swaps in ways:
                if len(swaps) > len(gates):
                    yield dataclasses.replace(one, swaps=swaps)
        for one in gated:
            padded = padded_axis(region, one)
            if padded is not None:
                cut = tuple(swap for swap in padded.swaps if swap.when == "cut")
                yield dataclasses.replace(padded, swaps=(*gates, *cut))


def _gated(
    region: nn.Module, axis: Axis, coupling: Coupling, rows: Sequence[Site], width: int
) -> Iterator[Axis]:
    """The axis with a gate on the consumer's input, else on the first matrix, or on all of them."""
    if len(axis.sites) > len(rows):
        repeats = coupling.units * coupling.block // width
        gate = dataclasses.replace(axis.gate, block=1, repeats=repeats)
        yield dataclasses.replace(axis, gate=gate)
        products = tuple(s for s in rows if _is_matrix(region, s))
        both = dataclasses.replace(gate, sites=products, within=_users(axis, coupling))
        yield dataclasses.replace(axis, gate=both)
        return
    matrices = [site for site in rows if _is_matrix(region, site)]
    first = (_owner(matrices[0]), matrices[0].offset // width)
    queries = [site for site in matrices if (_owner(site), site.offset // width) == first]
    for chosen in (queries, matrices):
        modules = tuple(dict.fromkeys(map(_owner, chosen)))
        within = _users(axis, coupling)
        gate = Gate(kind="product", modules=modules, sites=tuple(chosen), within=within)
        yield dataclasses.replace(axis, gate=gate)


def _users(axis: Axis, coupling: Coupling) -> tuple[str, ...]:
    """The module that multiplies with the matrices, where it does not call their modules."""
    return (axis.path,) if coupling.uncalled else ()


def _spread(site: Site, heads: int, width: int, grouping: str) -> tuple[Site, ...]:
    """The rows of all heads as `width` dims that lie in every head, `width` apart."""
    repeats = heads * site.block // width
    base = dataclasses.replace(site, block=1, repeats=repeats, stride=width)
    if grouping == "halves":
        return base, dataclasses.replace(base, offset=site.offset + width // 2)
    if grouping == "neighbours":
        return (dataclasses.replace(base, block=2),)
    return (base,)
