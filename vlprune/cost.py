"""What any plan costs, as arithmetic over an anatomy; and the same counted on a real model.

Parameters are exact. Multiply-accumulates (MACs) equal half of what
`torch.utils.flop_counter.FlopCounterMode` counts on the cut model for the example inputs that the
model was dissected with. Milliseconds come from a latency table, where the anatomy has one. No
model is needed to price a plan.
"""

from __future__ import annotations

import collections
import contextlib
import logging
import math
import statistics
from collections.abc import Mapping, Sequence

import torch
from torch import nn

from vlprune.anatomy import Anatomy, Axis, Site, under
from vlprune.calls import Inputs, calls_of, frozen, quiet_eval, run
from vlprune.errors import BudgetError
from vlprune.latency import latency_ms, table_of
from vlprune.plan import Cost

Keep = Mapping[str, tuple[int, ...]]


def shapes_after(anatomy: Anatomy, keep: Keep) -> dict[str, tuple[int, ...] | None]:
    """Return tensor name to shape after the plan, None where the tensor is gone."""
    lost = _lost_experts(anatomy, keep)
    shapes = _shapes(anatomy, keep, _gone_scopes(anatomy, keep))
    return {name: None if _is_inside(name, lost) else shape for name, shape in shapes.items()}


def _shapes(
    anatomy: Anatomy, keep: Keep, gone: tuple[str, ...]
) -> dict[str, tuple[int, ...] | None]:
    shapes: dict[str, list[int]] = {t.name: list(t.shape) for t in anatomy.tensors}
    cuts = _cuts(anatomy, keep)
    for (tensor, dim), sites in cuts.items():
        kinds = {axis.kind for axis, _ in sites}
        if len(kinds) > 1:  # heads and their dims: rows that go twice count once
            twice = {i for axis, site in sites for i in site.indices(_removed(axis, keep))}
            shapes[tensor][dim] -= len(twice)
            continue
        for axis, site in sites:
            shapes[tensor][dim] -= (axis.units - len(keep[axis.name])) * site.size
    return {
        name: None if any(under(name, scope) for scope in gone) else tuple(shape)
        for name, shape in shapes.items()
    }


def _cuts(anatomy: Anatomy, keep: Keep) -> Mapping[tuple[str, int], Sequence[tuple[Axis, Site]]]:
    """(tensor, dimension) to the sites there that lose something."""
    cuts: dict[tuple[str, int], list[tuple[Axis, Site]]] = collections.defaultdict(list)
    for axis in anatomy.axes:
        if axis.name in keep and len(keep[axis.name]) < axis.units:
            for site in axis.sites:
                cuts[site.tensor, site.dim].append((axis, site))
    return cuts


def _removed(axis: Axis, keep: Keep) -> tuple[int, ...]:
    kept = set(keep[axis.name])
    return tuple(unit for unit in range(axis.units) if unit not in kept)


def price(anatomy: Anatomy, keep: Keep) -> Cost:
    """Return the cost of the whole model when only `keep` stays on the axes that it names."""
    gone = _gone_scopes(anatomy, keep)
    shapes = _shapes(anatomy, keep, gone)
    lost = _lost_experts(anatomy, keep)
    params = sum(
        math.prod(shape)
        for tensor in anatomy.tensors
        if tensor.is_parameter
        and (shape := shapes[tensor.name]) is not None
        and not (lost and _is_inside(tensor.name, lost))
    )
    routed = _routed(anatomy, keep)
    shares = {a.name: (len(keep[a.name]), a.units) for a in anatomy.axes if a.name in keep}
    sizes = {tensor.name: math.prod(tensor.shape) for tensor in anatomy.tensors}
    macs = 0
    for operation in anatomy.operations:
        if any(under(operation.module, scope) for scope in gone):
            continue
        numerator, denominator = operation.macs, 1
        for name in operation.tensors:
            now = shapes[name]
            numerator *= 0 if now is None else math.prod(now)
            denominator *= max(sizes[name], 1)
            if name in routed:  # as many experts run as before
                kept, units = routed[name]
                numerator, denominator = numerator * units, denominator * kept
        for name in operation.axes:
            kept, units = shares.get(name, (1, 1))
            numerator, denominator = numerator * kept, denominator * units
        macs += numerator // denominator
    table = anatomy.latency
    timed = None if table is None else latency_ms(table, anatomy.axes, keep)
    return Cost(params=params, macs=macs, latency_ms=timed)


def _routed(anatomy: Anatomy, keep: Keep) -> dict[str, tuple[int, int]]:
    """Tensors with rows for every expert, the router's excepted -> experts now and before."""
    return {
        name: (len(keep[axis.name]), axis.units)
        for name, axis in routed_tensors(anatomy).items()
        if keep.get(axis.name)
    }


def _lost_experts(anatomy: Anatomy, keep: Keep) -> frozenset[str]:
    """Modules in lists that are gone with their unit; what they computed others do now."""
    return frozenset(
        f"{path}.{unit}"
        for axis in anatomy.axes
        if axis.lists and axis.name in keep
        for unit in _removed(axis, keep)
        for path in axis.lists
    )


def _is_inside(name: str, modules: frozenset[str]) -> bool:
    """Say whether the tensor `name` lies in one of `modules`, which may be many."""
    ends = [place for place, character in enumerate(name) if character == "."]
    return any(name[:end] in modules for end in ends)


def _gone_scopes(anatomy: Anatomy, keep: Keep) -> tuple[str, ...]:
    return tuple(
        scope
        for axis in anatomy.axes
        if axis.removal != "slice" and axis.name in keep
        for unit in set(range(axis.units)) - set(keep[axis.name])
        for scope in axis.scopes[unit]
    )


def dense_cost(anatomy: Anatomy) -> Cost:
    """Return the cost of the model as it is."""
    return price(anatomy, {})


def least_cost(anatomy: Anatomy) -> Cost:
    """Return the cost of the model with every unit of every axis removed that may go."""
    return price(anatomy, {axis.name: tuple(range(axis.least)) for axis in anatomy.axes})


BUDGET_KEYS = ("params", "macs", "prunable_params", "latency", "latency_ms")
SMALLEST = {"params": 1.0, "macs": 1.0, "latency_ms": 1e-6}  # that removing a unit counts as saving


def absolute_budget(anatomy: Anatomy, budget: Mapping[str, float]) -> dict[str, float]:
    """Return a budget in absolutes: "params", "macs" and "latency_ms" of the whole model.

    Args:
        anatomy: the axes that may be cut.
        budget: what the result may cost. A number in (0, 1] is the share of the dense model to
            keep, one above 1 an absolute. "prunable_params" counts only those parameters that the
            axes of `anatomy` can remove at all. "latency" (a share, or milliseconds above 1) and
            "latency_ms" (always milliseconds) are met by the arithmetic of the latency table that
            the anatomy has.

    Raises:
        BudgetError: for an unknown key, a value out of range, a latency without a table, or a
            budget that no plan can reach; the message says the least and the most that can be
            reached.
    """
    if not budget:
        raise BudgetError(f"budget must name one of {', '.join(BUDGET_KEYS)}; got none.")
    dense, least = dense_cost(anatomy), least_cost(anatomy)
    limits: dict[str, float] = {}
    for key, value in budget.items():
        if key in _TIMES:
            table_of(anatomy)  # raises where there is none
        kind, target = _absolute(key, value, dense, least)
        limits[kind] = min(target, limits.get(kind, target))
    return limits


def resource_of(budget: Mapping[str, float]) -> str:
    """Return what units are priced in under a budget: what it limits where that is one thing."""
    if set(budget) == {"macs"}:
        return "macs"
    return "latency_ms" if budget and set(budget) <= _TIMES else "params"


def on_the_way(now: float, limit: float, share: float) -> float:
    """Return what a resource may be when `share` of the way from `now` to `limit` is gone."""
    gone = share * (now - limit)
    return now - (gone if isinstance(now, float) else math.floor(gone))


def routed_tensors(anatomy: Anatomy) -> dict[str, Axis]:
    """Return tensors with rows for every expert, the router's excepted, and the experts' axis."""
    return {
        site.tensor: axis
        for axis in anatomy.axes
        if axis.gate.kind == "router"
        for site in axis.sites
        if site not in axis.gate.sites
    }


_TIMES = {"latency", "latency_ms"}


def _absolute(key: str, value: float, dense: Cost, least: Cost) -> tuple[str, float]:
    if key not in BUDGET_KEYS:
        raise BudgetError(f"budget must name one of {', '.join(BUDGET_KEYS)}; got {key!r}.")
    if not 0 < value < float("inf"):
        raise BudgetError(f"budget {key!r} must be a share in (0, 1] or a count; got {value!r}.")
    kind = "latency_ms" if key in _TIMES else "macs" if key == "macs" else "params"
    most, fewest = getattr(dense, kind), getattr(least, kind)
    base = fewest if key == "prunable_params" else 0
    target = value * (most - base) if value <= 1 and key != "latency_ms" else value
    target = target if key in _TIMES else base + int(target)
    if not fewest <= target <= most:
        unit, form = ("ms", ".4g") if key in _TIMES else (kind, ",")
        raise BudgetError(
            f"budget {key}={value:g} asks for {target:{form}} {unit}; these axes can reach "
            f"{fewest:{form}} ({fewest / max(most, SMALLEST[kind]):.1%}) at least and "
            f"{most:{form}} at most. Ask for a share between, or score more strategies."
        )
    return kind, target


def fits(cost: Cost, limits: Mapping[str, float]) -> bool:
    """Say whether `cost` is within every limit (keys "params", "macs", "latency_ms")."""
    return all(getattr(cost, key) <= limit for key, limit in limits.items())


def count_params(model: nn.Module) -> int:
    """Return the number of parameters of `model`, tied ones once."""
    return sum(p.numel() for p in model.parameters())


def count_macs(model: nn.Module, example_inputs: Inputs) -> int:
    """Return the multiply-accumulates of `model` on `example_inputs`, by torch's own counter.

    Fused kernels that the counter does not know (the fast path of `nn.MultiheadAttention`, CPU
    flash attention) are switched to ones that it does.
    """
    from torch.utils.flop_counter import FlopCounterMode  # lazy: it imports triton

    # torch's counter trips over parameters that are passed on without a gradient's history
    with frozen(model), countable_kernels(), FlopCounterMode(display=False) as counter:
        for call in calls_of(example_inputs):
            run(model, call)
    return int(counter.get_total_flops()) // 2


class countable_kernels:
    """A context in which attention runs through operations that the FLOP counter knows."""

    def __enter__(self) -> None:
        self._fast_path = torch.backends.mha.get_fastpath_enabled()
        torch.backends.mha.set_fastpath_enabled(False)
        self._sdpa = torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH)
        self._sdpa.__enter__()
        self._no_grad = torch.no_grad()
        self._no_grad.__enter__()

    def __exit__(self, *failure: object) -> None:
        self._no_grad.__exit__(None, None, None)
        self._sdpa.__exit__(None, None, None)
        torch.backends.mha.set_fastpath_enabled(self._fast_path)


def latencies_ms(
    models: Sequence[nn.Module], example_inputs: Inputs, rounds: int = 7
) -> list[float]:
    """Return the median milliseconds that each model takes for `example_inputs`, measured here.

    The models take turns, so that what else the machine does falls on all alike; only ratios
    within one call mean much. Uses torch's benchmark timer with the threads torch is set to.
    """
    # its import looks for a CUDA toolkit and warns where there is none
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    from torch.utils.benchmark import Timer  # lazy: spares `import vlprune` its start-up time

    calls = calls_of(example_inputs)
    timers = [
        Timer(
            "for call in calls: run(model, call)",
            globals={"calls": calls, "run": run, "model": model},
            num_threads=torch.get_num_threads(),
        )
        for model in models
    ]
    with torch.inference_mode(), contextlib.ExitStack() as modes:
        for model in models:
            modes.enter_context(quiet_eval(model))
        turns = [[timer.timeit(1).median for timer in timers] for _ in range(rounds)]
    return [1e3 * statistics.median(times) for times in zip(*turns, strict=True)]
