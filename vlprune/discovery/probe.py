"""Which tensor rows feed one unit and no other: read off gradients, for any forward.

The input features of a linear layer are split into units; among all tensor rows around, those that
feed one unit and no other are its own (`decoding.py`). A split that is too fine is told by rows
that feed several of its units (grouped keys, the dims of one head); the next coarser one is tried.

The region runs as in `tracing.py`. That a split can be cut is proven in `fit.py`; nothing is
assumed here about class names.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vlprune.anatomy import Site, under
from vlprune.calls import Call, map_tensors, run
from vlprune.discovery.decoding import (
    GIVEN,
    RESIDUAL,
    Codes,
    NoOrderError,
    decode,
    mixes_tokens,
    reached,
    reaches,
    sites_of,
)
from vlprune.discovery.regions import is_linear
from vlprune.discovery.tracing import Source, Trace, Use


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Coupling:
    """A row of units in the input features of one linear layer; all names relative to the region.

    Attributes:
        consumer: path of the layer that consumes the units.
        units, block: how many, and input features per unit.
        dim: dimension of the consumer's input that holds the features (-1; 1 for convolutions).
        sites: where the units lie in the tensors of the region.
        norms: modules that take statistics over the units' features.
        attends: whether an attention stands between the units' sources and the consumer.
        others: paths of more layers that consume the same units.
        inputs: (number or name of an argument, dimension, entries per unit) of what the region is
            given for every unit.
        uncalled: modules whose matrices hold rows of the units, used without calling the module.
        values, value_dims: of heads, those sites of which every row feeds but one feature, and
            how many such features a head has; the rows of the others feed all features of a head.
    """

    consumer: str
    units: int
    block: int
    dim: int
    sites: tuple[Site, ...]
    norms: tuple[str, ...]
    attends: bool
    others: tuple[str, ...] = ()
    inputs: tuple[tuple[int | str, int, int], ...] = ()
    uncalled: tuple[str, ...] = ()
    values: tuple[Site, ...] = ()
    value_dims: int = 0

    @property
    def kind(self) -> str:
        """The strategy that it belongs to: "head" where an attention mixes them, else "ffn"."""
        return "head" if self.attends or self.block > 1 else "ffn"


@dataclasses.dataclass(frozen=True, slots=True)
class Obstacle:
    """A part that has no units to offer, and why; `kind` as of a refusal: "" concerns all."""

    consumer: str
    reason: str
    kind: str


def couplings(
    region: nn.Module, call: Call, skip: Sequence[str] = ()
) -> tuple[list[Coupling], list[Obstacle]]:
    """Return the couplings of `region` and what could not be split.

    Args:
        region: a real float64 module, see `regions.replica`.
        call: how it is called, see `regions.real_call`.
        skip: modules of the region that are regions themselves: their layers are not looked at.
    """
    trace = Trace(region)
    given: list[Source] = []

    def watched(value: Any, place: int | str) -> Any:
        def watch(tensor: Tensor) -> Tensor:
            if not tensor.is_floating_point():
                return tensor
            whole = isinstance(value, Tensor)
            given.append(Source(tensor.requires_grad_(True), {}, place=place if whole else None))
            return tensor * 1.0  # a region may change its input in place

        return map_tensors(value, watch)

    with torch.enable_grad():
        inputs = Call(
            tuple(watched(value, place) for place, value in enumerate(call.args)),
            {name: watched(value, name) for name, value in call.kwargs.items()},
        )
        with trace:
            run(region, inputs)
    trace.sources += given
    found: list[Coupling] = []
    obstacles: list[Obstacle] = []
    covered: set[int] = set()
    for path, uses in trace.uses.items():
        if any(under(path, inner) for inner in skip):
            continue
        answer, between = _coupling(trace, path, uses)
        if isinstance(answer, Coupling):
            found.append(answer)
        elif answer:
            obstacles.append(Obstacle(path, answer, "head"))
        if answer:
            covered.update(between)
    found = _of_all_consumers(found)
    obstacles += _uncovered(trace, skip, covered)
    obstacles += _unreached(region, trace, skip)
    return found, obstacles


def _of_all_consumers(couplings: Sequence[Coupling]) -> list[Coupling]:
    """Neurons that several layers consume are one coupling: a row that goes is gone for all."""
    merged: list[Coupling] = []
    for coupling in couplings:
        place = next((i for i, other in enumerate(merged) if _shares_rows(coupling, other)), None)
        if place is None:
            merged.append(coupling)
            continue
        first = merged[place]
        more, less = sorted((first, coupling), key=lambda c: len(c.sites), reverse=True)
        sites = dict.fromkeys((*more.sites[:-1], *less.sites, more.sites[-1]))
        merged[place] = dataclasses.replace(
            more,
            sites=tuple(sites),
            norms=tuple(dict.fromkeys((*more.norms, *less.norms))),
            others=(*more.others, less.consumer, *less.others),
        )
    return merged


def _shares_rows(one: Coupling, other: Coupling) -> bool:
    """Say whether two layers consume the same neurons, or some of them more."""
    alike = (one.units, one.block, one.dim, one.kind) == (
        *(other.units, other.block, other.dim, other.kind),
    )
    return alike and one.kind == "ffn" and bool({*one.sites[:-1]} & {*other.sites[:-1]})


def _unreached(region: nn.Module, trace: Trace, skip: Sequence[str]) -> Iterator[Obstacle]:
    """The largest parts with layers of which none ran: a cut there would prove nothing."""
    linears = [path for path, module in region.named_modules() if is_linear(module)]
    ran = trace.called | set(trace.uses)
    idle = [p for p in linears if p not in ran and not any(under(p, inner) for inner in skip)]
    named: list[str] = []
    for path in idle:
        ends = [i for i, character in enumerate(path) if character == "."]
        parts = [path[:end] for end in ends]
        whole = [p for p in parts if not any(under(one, p) for one in ran)]
        part = next(iter(whole), path)
        if part not in named:
            named.append(part)
            yield Obstacle(part, "the example inputs do not reach it", "")


def _uncovered(trace: Trace, skip: Sequence[str], covered: set[int]) -> Iterator[Obstacle]:
    """Attentions that no layer's features were read off: none goes without a word."""
    for moment, shape in trace.mixers:
        path = trace.places.get(moment, "")
        if moment not in covered and not any(under(path, inner) for inner in skip):
            heads = shape[1] if len(shape) > 3 else 1
            why = "its attention has one head"
            if heads > 1:
                why = "no layer reads its heads alone, or each is given something from outside"
            yield Obstacle(
                path, f"heads stay: {why} (attention {list(shape)})", "" if heads == 1 else "head"
            )


def _is_fed_by_weights(sources: Sequence[Source], codes: Codes) -> bool:
    """Say whether a matrix makes the units, rather than a table or the region's input."""
    for (number, dim), code in codes.items():
        source = sources[number]
        if source.rows and bool((code >= 0).any()):
            shape = source.tensor.shape
            if source.moment or (len(shape) > 1 and source.tensor.numel() > shape[dim]):
                return True
    return False


def _coupling(trace: Trace, path: str, uses: Sequence[Use]) -> tuple[Coupling | str, list[int]]:
    """The coupling at a layer, or why there is none; and the attentions before it."""
    alive = [use for use in uses if use.x.requires_grad]
    if not alive or not alive[0].x.shape[alive[0].dim]:
        return "", []
    first = alive[0]
    features = first.x.shape[first.dim]
    sources = reached(trace.sources, alive)
    begin = min((s.moment for s in sources if s.rows and s.moment), default=0)
    between = {moment: shape for moment, shape in trace.mixers if begin <= moment <= first.moment}
    mixers, moments = list(between.values()), list(between)
    reason = ""
    counts = _head_counts(mixers, trace.hints, features)
    waiting = [features, *counts]
    while waiting:
        units = waiting.pop(0)
        codes = decode(alive, sources, units, counts)
        if isinstance(codes, str):
            if codes == RESIDUAL and units == features:
                return "", []
            reason = codes or reason
            continue
        try:
            sites = tuple(sites_of(sources, codes, units))
        except NoOrderError as error:
            return f"units stay: {error}", moments
        attends = bool(mixers) and mixes_tokens(first, sources, codes)
        if not sites or not _is_fed_by_weights(sources, codes) or (units == features and attends):
            named = {size for shape in mixers for size in shape[1:-2]}
            waiting = [count for count in waiting if count in named]
            continue  # single dims of an attention's values are no heads
        if path not in trace.called:
            return f"units stay: the weight of {path} is used, but the module not called", moments
        coupling = Coupling(
            consumer=path,
            units=units,
            block=features // units,
            dim=first.dim,
            sites=(*sites, Site(tensor=f"{path}.weight", dim=1, block=features // units)),
            norms=tuple(dict.fromkeys(o for s in sites if (o := _owner(s)) in trace.norms)),
            attends=attends,
            inputs=tuple(
                (place, dim, len(code) // units)
                for (number, dim), code in codes.items()
                if (place := sources[number].place) is not None and _is_in_order(code, units)
            ),
        )
        holders = {_owner(site) for site in sites if (site.tensor, site.dim) in _products(sources)}
        coupling = dataclasses.replace(coupling, uncalled=tuple(sorted(holders - trace.called)))
        if attends:
            coupling = _with_values(coupling, alive, sources)
        return coupling, moments if attends or coupling.block > 1 else []
    return (reason, moments) if mixers and reason != GIVEN else ("", [])


def _with_values(coupling: Coupling, uses: Sequence[Use], sources: Sequence[Source]) -> Coupling:
    """The coupling with those sites told apart whose rows feed single features of a head.

    Where heads have E features, a row of values feeds one of them: the first features of all heads
    depend on every E-th row alone, and on all rows of queries and keys.
    """
    widths = {site.block for site in coupling.sites if coupling.block % site.block == 0}
    products = _products(sources)
    for width in sorted(widths - {1}, reverse=True):
        firsts = torch.arange(coupling.block * coupling.units) % width == 0
        noise = [torch.ones_like(use.x) for use in uses]
        found = reaches(uses, sources, noise, firsts)
        rows: dict[tuple[str, int], Tensor] = {}
        for source, touched in zip(sources, found, strict=True):
            for dim, names in source.rows.items():
                for key in names:
                    known = rows.get(key)
                    rows[key] = touched(dim) if known is None else known | touched(dim)
        values = tuple(s for s in coupling.sites[:-1] if _every(s, rows, width, coupling.units))
        if any((site.tensor, site.dim) in products for site in values):
            return dataclasses.replace(coupling, values=values, value_dims=width)
    return coupling


def _products(sources: Sequence[Source]) -> set[tuple[str, int]]:
    """(tensor, dimension) of all rows that linear layers answer."""
    return {key for s in sources if s.moment for names in s.rows.values() for key in names}


def _every(site: Site, rows: Mapping[tuple[str, int], Tensor], width: int, units: int) -> bool:
    """Say whether of the rows of `site` only every `width`-th one was touched."""
    touched = rows[site.tensor, site.dim][site.offset : site.offset + units * site.block]
    places = touched.nonzero().flatten()
    return site.block % width == 0 and len(places) > 0 and not bool((places % width).any())


def _is_in_order(code: Tensor, units: int) -> bool:
    """Say whether the rows belong to the units one after the other, as many to each."""
    size = len(code)
    return size % units == 0 and torch.equal(code, torch.arange(size) * units // max(size, 1))


def _owner(site: Site) -> str:
    return site.tensor.rpartition(".")[0]


def _head_counts(
    mixers: Sequence[tuple[int, ...]], hints: Sequence[int], features: int
) -> list[int]:
    """Numbers of heads to try, most first: what attention tensors and attributes name, divisors."""
    if not mixers:
        return []
    named = {size for shape in mixers for size in shape[1:-2]} | set(hints)
    named = {size for size in named if 1 < size < features and features % size == 0}
    divisors = {size // k for size in named for k in range(1, size // 2 + 1) if size % k == 0}
    return sorted(named | {d for d in divisors if d > 1}, reverse=True)
