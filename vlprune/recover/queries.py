"""Dimensions of queries and keys that went: what stays of the queries takes on their share.

Attention scores are sums over dimensions. The part of the removed ones, q_P . k_P, is replaced by
its best bilinear form in those that stay, q_K^T M k_K, and I + M is folded into the queries' rows:

    M = C(q_K)^-1 C(q_K, q_P) C(k_P, k_K) C(k_K)^-1

with C the second moments of queries and the covariances of keys (a constant over all keys changes
no softmax). All follows from the moments of what the projections are given. Where something stands
between projection and product (rotary positions, a norm) this need not help: each attention keeps
its new rows only if its answers come closer to the dense ones on batches that were left out.

Source: the aim is that of CORP (2602.05243) for attention dimensions; M is the least-squares
solution of q_P . k_P ~ q_K^T M k_K over all pairs of queries and keys.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from vlprune.anatomy import Site, under
from vlprune.calls import removing, tensors_of
from vlprune.consumers import Forward, parameter_of
from vlprune.moments import Moments
from vlprune.plan import PlanRow
from vlprune.pruner import Repair
from vlprune.recover.listening import listening_to_outputs

_RIDGES = (1e-6, 1e-4, 1e-2)  # of the mean variance of a dimension
_HELD_OUT = 5  # the last one in so many batches says whether it helps


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class _Pair:
    """The rows of queries and keys of an axis of which some dimensions go."""

    row: PlanRow
    query: Site
    key: Site


def repair_queries(
    model: nn.Module,
    student: nn.Module,
    rows: Iterable[PlanRow],
    gone: Sequence[str],
    forward: Forward,
    batches: Sequence[Any],
) -> list[Repair]:
    """Fold removed dimensions into the queries of `student`, in place; return what was done.

    Args:
        model: dense.
        student: the same with the plan's gates on.
        rows: of the plan.
        gone: modules that the plan removes.
        forward: gives the outputs for a batch.
        batches: of a task.
    """
    pairs = [pair for pair in map(_pair_of, rows) if pair is not None]
    pairs = [pair for pair in pairs if not any(under(pair.row.axis.path, path) for path in gone)]
    if not pairs:
        return []
    left_out = max(len(batches) // _HELD_OUT, 1)
    fitted = batches[:-left_out] or batches
    moments = _input_moments(model, pairs, forward, fitted)
    checked = batches[-left_out:]
    wanted = _answers(model, [pair.row.axis.path for pair in pairs], forward, checked)

    def error(path: str) -> float:
        (found,) = _answers(student, [path], forward, checked).values()
        parts = list(zip(found, wanted[path], strict=True))
        size = sum(float(b.square().sum()) for _, b in parts)
        return sum(float((a - b).square().sum()) for a, b in parts) / max(size, 1e-30)

    report = []
    for pair in pairs:
        path = pair.row.axis.path
        before = error(path)
        sides = _sides(student, pair, moments)
        found = [parameter_of(student, name) for name in _names(pair.query)]
        tensors = [tensor for tensor in found if tensor is not None]
        best, ridge, rows_of_best = before, None, [t.clone() for t in tensors]
        kept = [t.clone() for t in tensors]
        for candidate in _RIDGES:
            if sides is None:
                break
            _fold(tensors, pair, sides, candidate)
            after = error(path)
            if after < best:
                best, ridge, rows_of_best = after, candidate, [t.clone() for t in tensors]
            _write(tensors, kept)
        _write(tensors, rows_of_best)
        report.append(
            Repair(
                module=pair.query.tensor,
                kept=len(pair.row.keep) * pair.query.size,
                of=pair.row.axis.units * pair.query.size,
                before=before,
                after=best,
                ridge=ridge,
            )
        )
    return report


def _write(tensors: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    for tensor, value in zip(tensors, values, strict=True):
        tensor.copy_(value)


def _pair_of(row: PlanRow) -> _Pair | None:
    """Queries and keys of an axis of their dimensions that loses some and keeps some."""
    axis = row.axis
    if axis.gate.kind != "product" or not row.keep or not row.removed:
        return None
    if len(axis.gate.sites) != 1:
        return None
    (gated,) = axis.gate.sites
    others = [
        site
        for site in axis.sites
        if site != gated and site.tensor.endswith("weight") and site.dim == gated.dim
    ]
    if len(others) != 1 or others[0].block != gated.block:
        return None
    key, query = sorted((others[0], gated), key=lambda site: site.repeats)
    if query.repeats % key.repeats:
        return None
    return _Pair(row=row, query=query, key=key)


def _names(site: Site) -> tuple[str, str]:
    """The names of the weight and of the bias that goes with it."""
    return site.tensor, site.tensor.removesuffix("weight") + "bias"


def _projected(model: nn.Module, site: Site, moments: Moments) -> tuple[Tensor, Tensor]:
    """Mean [rows] and covariance [rows, rows] of what a weight's rows answer."""
    weight, bias = (parameter_of(model, name) for name in _names(site))
    assert weight is not None
    matrix = weight.double()
    mean = matrix @ moments.means()[0]
    if bias is not None:
        mean = mean + bias.double()
    return mean, matrix @ moments.covariance() @ matrix.T


def _sides(
    student: nn.Module, pair: _Pair, moments: dict[tuple[str, str], Moments]
) -> tuple[Tensor, Tensor] | None:
    """Second moments of queries and covariance of keys [rows, rows]; None where they never ran."""
    query = moments.get((pair.query.tensor, "query"))
    key = moments.get((pair.key.tensor, "key"))
    if query is None or key is None:
        return None
    mean, spread = _projected(student, pair.query, query)
    return spread + torch.outer(mean, mean), _projected(student, pair.key, key)[1]


def _fold(
    tensors: Sequence[Tensor], pair: _Pair, sides: tuple[Tensor, Tensor], ridge: float
) -> None:
    """Let the queries that stay take on the share of those that went, head by head."""
    queries, keys = sides
    keep, gone = pair.row.keep, pair.row.removed
    shared = pair.query.repeats // pair.key.repeats  # by so many heads of queries in a row
    for head in range(pair.query.repeats):
        q_stay = _rows(pair.query, keep, head)
        left = _solved(queries, q_stay, _rows(pair.query, gone, head), ridge)
        mine = head // shared
        right = _solved(keys, _rows(pair.key, keep, mine), _rows(pair.key, gone, mine), ridge)
        change = left @ right.T  # M [stay, stay]
        for tensor in tensors:
            rows = tensor[q_stay].double()
            tensor[q_stay] = (rows + change.T @ rows).to(tensor.dtype)


def _solved(moments: Tensor, stay: list[int], gone: list[int], ridge: float) -> Tensor:
    """C(stay)^-1 C(stay, gone), with a ridge."""
    part = moments[stay][:, stay]
    size = (ridge * part.diagonal().mean()).clamp_min(1e-30)
    more = size * torch.eye(len(part), dtype=part.dtype, device=part.device)
    found: Tensor = torch.linalg.solve(part + more, moments[stay][:, gone])
    return found


def _rows(site: Site, units: tuple[int, ...], head: int) -> list[int]:
    """Rows of some units in one head."""
    one = dataclasses.replace(site, offset=site.offset + head * site.stride, repeats=1)
    return one.indices(units)


def _input_moments(
    model: nn.Module,
    pairs: Sequence[_Pair],
    forward: Forward,
    batches: Sequence[Any],
) -> dict[tuple[str, str], Moments]:
    """Moments of what the projections of queries and keys are given: (tensor, side) to them."""
    found: dict[tuple[str, str], Moments] = {}
    sites = {(p.query.tensor, "query") for p in pairs} | {(p.key.tensor, "key") for p in pairs}
    with _listening(model, sites, found):
        for batch in batches:
            forward(model, batch)
    return found


def _answers(
    model: nn.Module,
    paths: Sequence[str],
    forward: Forward,
    batches: Sequence[Any],
) -> dict[str, list[Tensor]]:
    """What modules answer, first tensors, call by call."""
    with listening_to_outputs(model, paths) as heard:
        for batch in batches:
            forward(model, batch)
    return {path: [row.detach().float() for row in rows] for path, rows in heard.items()}


@contextmanager
def _listening(
    model: nn.Module,
    sites: Iterable[tuple[str, str]],
    found: dict[tuple[str, str], Moments],
) -> Iterator[None]:
    def hook(tensor: str, side: str) -> Callable[..., None]:
        weight = parameter_of(model, tensor)
        width = 0 if weight is None else weight.shape[1]

        def listen(module: nn.Module, args: Any, kwargs: Any) -> None:
            given = [t for t in tensors_of((args, kwargs)) if t.is_floating_point()]
            given = [t for t in given if t.dim() > 1 and t.shape[-1] == width]
            x = given[1] if side == "key" and len(given) > 1 else given[0]
            rows = x.detach().flatten(0, -2)
            found.setdefault((tensor, side), Moments()).add(rows, rows[:, :0])

        return listen

    handles = [
        model.get_submodule(tensor.rpartition(".")[0]).register_forward_pre_hook(
            hook(tensor, side), with_kwargs=True
        )
        for tensor, side in sorted(sites)
    ]
    with removing(handles):
        yield
