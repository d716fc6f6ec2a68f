"""Experts of a mixture: found by what a router chooses from, proven by trial.

A router is a matrix with a row per expert whose answers some choice (`topk`, `argmax`) is made
from. Its experts are the tensors with an entry per expert in the module around it, or the modules
of a list that has one for each. Shared experts, which every token passes, are no units of these.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from vlprune.anatomy import Axis, Gate, Knob, Refusal, Site, under
from vlprune.calls import Call, run
from vlprune.discovery.fit import Bench
from vlprune.intercepts import CHOICES, chooses_from_all


@dataclasses.dataclass(frozen=True, slots=True)
class _Router:
    """A matrix (path of its module) and where the choice is made from its answers."""

    matrix: str
    chooser: str
    experts: int


def experts_of(region: nn.Module, call: Call, skip: Sequence[str] = ()) -> Iterator[Axis | Refusal]:
    """Yield the experts of every router in `region` as an axis, or why they stay.

    Args:
        region: a real float64 replica.
        call: how it is called.
        skip: modules of the region that are regions themselves.
    """
    for router in _routers(region, call):
        if any(under(router.matrix, inner) for inner in skip):
            continue
        holder = _holder(region, router)
        if holder is None:
            continue  # it chooses something else than experts
        axis = _axis(region, router, holder)
        reason = ""
        for knobs in _knob_sets(region, holder, router.experts):
            fitted = _fitted(region, call, dataclasses.replace(axis, knobs=knobs))
            if isinstance(fitted, Axis):
                yield fitted
                break
            reason = reason or fitted
        else:
            yield Refusal(module=holder, reason=f"experts stay: {reason}", kind="expert")


def _fitted(region: nn.Module, call: Call, axis: Axis) -> Axis | str:
    """The axis with the fewest experts that may stay; why not, if none may go."""
    bench = Bench(region, call, axis)
    draw = torch.Generator().manual_seed(3)

    def fault(count: int) -> str:
        some = torch.randperm(axis.units, generator=draw)[:count].sort().values.tolist()
        return bench.fault(axis.knobs, [tuple(range(axis.units - count, axis.units)), tuple(some)])

    few, enough = 0, axis.units - 1
    reason = fault(enough)
    if reason:
        return reason
    while few + 1 < enough:  # a token is sent to so many that fewer do not do
        middle = (few + enough) // 2
        few, enough = (few, middle) if not fault(middle) else (middle, enough)
    return dataclasses.replace(axis, least=enough)


class _Spy(TorchFunctionMode):
    """Notes which matrices answer, and what choices are made from answers of that size."""

    def __init__(self, region: nn.Module):
        super().__init__()
        self.routers: list[_Router] = []
        self._region = region
        self._inside = [""]
        self._last: dict[int, str] = {}  # size of an answer -> module that gave it last

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        answer = func(*args, **kwargs)
        here = self._inside[-1]
        if name == "linear" and isinstance(answer, Tensor):
            self._last[answer.shape[-1]] = here
        size = args[0].shape[-1] if args and isinstance(args[0], Tensor) and args[0].dim() else 0
        if name in CHOICES and size > 1 and chooses_from_all(args, kwargs, name, size):
            matrix = self._last.get(size)
            if matrix is not None and _rows(self._region.get_submodule(matrix), size):
                self.routers.append(_Router(matrix, here, size))
        return answer

    def __enter__(self) -> _Spy:
        self._handles = []
        for path, module in self._region.named_modules():
            enter = module.register_forward_pre_hook(lambda *_, p=path: self._inside.append(p))
            leave = module.register_forward_hook(lambda *_: self._inside.pop() and None)
            self._handles += [enter, leave]
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *failure: Any) -> None:
        super().__exit__(*failure)  # type: ignore[no-untyped-call]
        for handle in self._handles:
            handle.remove()


def _routers(region: nn.Module, call: Call) -> list[_Router]:
    with torch.no_grad(), _Spy(region) as spy:
        run(region, call)
    return list({(r.matrix, r.experts): r for r in reversed(spy.routers)}.values())[::-1]


def _rows(module: nn.Module, experts: int) -> list[str]:
    """Names of the matrices of a module that have a row per expert."""
    return [
        name
        for name, tensor in module._parameters.items()
        if tensor is not None and tensor.dim() == 2 and tensor.shape[0] == experts
    ]


def _holder(region: nn.Module, router: _Router) -> str | None:
    """The innermost module that holds router, choice and experts."""
    steps = zip(router.matrix.split("."), router.chooser.split("."), strict=False)
    path: list[str] = []
    for one, other in steps:
        if one != other or not one:
            break
        path.append(one)
    while True:
        module = region.get_submodule(".".join(path))
        if _lists(module, router.experts) or _batched(module, router.experts):
            return ".".join(path)
        if not path:
            return None
        path.pop()


def _lists(module: nn.Module, experts: int) -> list[str]:
    """Lists with a module of one class for every expert."""
    return [
        path
        for path, inner in module.named_modules()
        if isinstance(inner, nn.ModuleList)
        and len(inner) == experts
        and len({type(item) for item in inner}) == 1
    ]


def _batched(module: nn.Module, experts: int) -> list[str]:
    """Modules whose matrices have an entry per expert: [experts, rows, columns]."""
    return [
        path
        for path, inner in module.named_modules()
        if any(
            p is not None and p.dim() == 3 and p.shape[0] == experts
            for p in inner._parameters.values()
        )
    ]


def _axis(region: nn.Module, router: _Router, holder: str) -> Axis:
    module, experts = region.get_submodule(holder), router.experts

    def at(path: str) -> str:
        return ".".join(part for part in (holder, path) if part)

    matrix = region.get_submodule(router.matrix)
    rows = tuple(
        Site(tensor=".".join(part for part in (router.matrix, name) if part), dim=0)
        for name in _rows(matrix, experts)
    )
    batched = set(map(at, _batched(module, experts)))
    lists = tuple(map(at, _lists(module, experts)))
    sites = list(rows)
    for path, inner in module.named_modules(prefix=holder):
        if any(path.startswith(f"{items}.") for items in lists):
            continue
        for name, tensor in [*inner._parameters.items(), *inner._buffers.items()]:
            dim = None if tensor is None else _dim_of_experts(tensor, experts, path in batched)
            if dim is not None:
                sites.append(Site(tensor=".".join(p for p in (path, name) if p), dim=dim))
    return Axis(
        name=f"{holder}:expert",
        kind="expert",
        tower="",
        depth=0,
        units=experts,
        removal="slice",
        gate=Gate(kind="router", modules=(holder,), sites=rows),
        sites=tuple(dict.fromkeys(sites)),
        lists=lists,
    )


def _dim_of_experts(tensor: Tensor, experts: int, batched: bool) -> int | None:
    """The dimension of a tensor that has an entry per expert."""
    if tensor.dim() == 1 or (tensor.dim() == 2 and batched):
        return 0 if tensor.shape[0] == experts else None
    if tensor.dim() == 2:
        return 1 if tuple(tensor.shape) == (1, experts) else None
    return 0 if tensor.dim() == 3 and tensor.shape[0] == experts else None


def _knob_sets(region: nn.Module, holder: str, experts: int) -> Iterator[tuple[Knob, ...]]:
    """Sets of attributes that may count the experts, the most plausible first."""
    named: list[Knob] = []
    others: list[Knob] = []
    for path, module in region.get_submodule(holder).named_modules(prefix=holder):
        for attribute, value in vars(module).items():
            if type(value) is int and value == experts:
                found = named if "expert" in attribute else others
                found.append(Knob(module=path, attribute=attribute))
    sets: Sequence[Sequence[Knob]] = (named, [*named, *others], [])
    yield from dict.fromkeys(tuple(knobs) for knobs in sets)
