"""Regions: the parts of a model that are probed on their own, with the calls that reach them.

A region is one transformer block, or a part that stands outside of all blocks (an attention pool).
Regions of one signature are built alike: one of them is probed for all. Its replica is a copy on
the CPU, in float64, with drawn weights: what weights happen to be zero must not hide a coupling.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vlprune.anatomy import under
from vlprune.calls import Call, map_tensors, quiet_eval, run, tensors_of
from vlprune.copies import drop_caches, shared_copy, use_exact_kernels
from vlprune.cutting import LAYER_INDICES
from vlprune.shapes import QuickShapes

_FEW_TOKENS = 9


@dataclasses.dataclass(frozen=True, slots=True)
class Region:
    """A module path and what tells regions of the same make apart from others."""

    path: str
    signature: tuple[Any, ...]


@dataclasses.dataclass(frozen=True, slots=True)
class Visit:
    """How a module was called in one run of the model, as shapes.

    Attributes:
        times: number of calls.
        inputs: (position or keyword, shape) of every tensor among the arguments of the first call.
        outputs: shapes of the tensors of the first answer.
    """

    times: int
    inputs: tuple[tuple[int | str, tuple[int, ...]], ...]
    outputs: tuple[tuple[int, ...], ...]


def is_linear(module: nn.Module) -> bool:
    """Say whether `module` multiplies features with a matrix of its own."""
    weight = getattr(module, "weight", None)
    return isinstance(weight, Tensor) and weight.dim() >= 2 and not any(module.children())


def regions_of(model: nn.Module) -> list[Region]:
    """Return the regions of `model`, inner ones first, in order of their paths."""
    modules = dict(model.named_modules())
    lists = (nn.ModuleList, nn.Sequential, nn.ModuleDict)
    items = [
        path
        for path, module in modules.items()
        if path and isinstance(modules[path.rpartition(".")[0]], lists) and _is_block(module)
    ]
    outside = [path for path in _maximal(model, items) if _is_block(modules[path])]
    found = sorted({*items, *outside}, key=lambda path: (-path.count("."), path))
    return [Region(path, signature(modules[path])) for path in found]


def _is_block(module: nn.Module) -> bool:
    plain = type(module) in (nn.ModuleList, nn.ModuleDict)
    return not plain and sum(is_linear(m) for m in module.modules()) >= 2


def _maximal(model: nn.Module, items: Sequence[str]) -> Iterator[str]:
    """The largest modules that hold no item."""
    holds = {path[: i or None] for path in items for i in _ends(path)} | ({""} if items else set())
    for path, module in model.named_modules():
        inside = any(under(path, item) for item in items)
        parent = path.rpartition(".")[0]
        if (
            not inside
            and path not in holds
            and (parent in holds or not path)
            and module is not None
        ):
            yield path


def _ends(path: str) -> list[int]:
    return [i for i, character in enumerate(path) if character == "."] + [len(path)]


def signature(module: nn.Module) -> tuple[Any, ...]:
    """Return class, tensor shapes and integer attributes of `module` and all inside of it."""
    rows: list[Any] = []
    for path, inner in module.named_modules():
        numbers = tuple(
            (name, value)
            for name, value in vars(inner).items()
            if isinstance(value, (int, float, str, tuple))
            and not name.startswith("_")
            and name not in (*LAYER_INDICES, "training", "drop_prob")
            and _is_plain(value)
        )
        tensors = tuple(
            (name, tuple(tensor.shape), str(tensor.dtype))
            for name, tensor in [*inner._parameters.items(), *inner._buffers.items()]
            if tensor is not None
        )
        rows.append((path, type(inner).__qualname__, numbers, tensors))
    return tuple(rows)


def _is_plain(value: Any) -> bool:
    entries = value if isinstance(value, tuple) else (value,)
    return all(isinstance(entry, (int, float, str)) for entry in entries)


def observe(
    model: nn.Module, calls: Sequence[Call], regions: Sequence[Region], watched: Sequence[str]
) -> tuple[dict[tuple[Any, ...], tuple[str, Call]], dict[str, Visit]]:
    """Run `model` once and note how its parts are called.

    Returns:
        Signature -> path and first call of the first region of that signature that runs, and path
        -> visit of every watched module that runs.
    """
    first: dict[tuple[Any, ...], tuple[str, Call]] = {}
    visits: dict[str, Visit] = {}

    def keep_call(region: Region) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            if region.signature not in first:
                first[region.signature] = (region.path, Call(_held(args), _held(dict(kwargs))))

        return hook

    def keep_shapes(path: str) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            seen = visits.get(path)
            if seen is not None:
                visits[path] = dataclasses.replace(seen, times=seen.times + 1)
                return
            named: list[tuple[int | str, Any]] = [*enumerate(args), *kwargs.items()]
            inputs = tuple((n, tuple(v.shape)) for n, v in named if isinstance(v, Tensor))
            visits[path] = Visit(1, inputs, tuple(tuple(t.shape) for t in tensors_of(output)))

        return hook

    handles: list[Any] = []
    for region in regions:
        module = model.get_submodule(region.path)
        handles.append(module.register_forward_pre_hook(keep_call(region), with_kwargs=True))
    for path in watched:
        module = model.get_submodule(path)
        handles.append(module.register_forward_hook(keep_shapes(path), with_kwargs=True))
    try:
        with quiet_eval(model), torch.no_grad(), QuickShapes():
            for call in calls:
                run(model, call)
    finally:
        for handle in handles:
            handle.remove()
    return first, visits


def _held(value: Any) -> Any:
    """The arguments as they were: what the model changes later (a cache) is copied."""
    if isinstance(value, (Tensor, nn.Module)) or value is None:
        return value
    if isinstance(value, (tuple, list)) and type(value) in (tuple, list):
        return type(value)(_held(entry) for entry in value)
    if type(value) is dict:
        return {key: _held(entry) for key, entry in value.items()}
    try:
        return copy.deepcopy(value)
    except Exception:  # a live object that cannot be copied is passed on as it is
        return value


def replica(module: nn.Module, seed: int = 0) -> nn.Module:
    """Return a float64 copy of `module` on the CPU with drawn weights; meta ones become real."""
    copied = shared_copy(module)
    generator = torch.Generator().manual_seed(seed)
    drawn: dict[int, Tensor] = {}
    with torch.no_grad():
        for inner in copied.modules():
            holders: tuple[Any, Any] = (inner._parameters, inner._buffers)
            for holder in holders:
                for name, tensor in holder.items():
                    if tensor is None:
                        continue
                    if id(tensor) not in drawn:
                        drawn[id(tensor)] = _drawn(tensor, generator, holder is inner._buffers)
                    holder[name] = drawn[id(tensor)]
    for inner in copied.modules():
        inner._forward_hooks.clear()
        inner._forward_pre_hooks.clear()
        drop_caches(inner)
    return use_exact_kernels(copied.eval())


def _drawn(tensor: Tensor, generator: torch.Generator, is_buffer: bool) -> Any:
    real = _is_real(tensor)
    if not tensor.is_floating_point():
        kept = (
            tensor.detach().cpu().clone() if real else torch.zeros(tensor.shape, dtype=tensor.dtype)
        )
        return kept
    if is_buffer and real:
        return tensor.detach().cpu().double().clone()
    noise = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
    if tensor.dim() > 1:
        value = noise / math.sqrt(max(tensor[0].numel(), 1)) if tensor.numel() else noise
    else:
        value = 0.7 + 0.3 * noise.abs()
    return value if is_buffer else nn.Parameter(value)


def _is_real(tensor: Tensor) -> bool:
    from torch._subclasses.fake_tensor import FakeTensor  # lazy: spares start-up time

    return not tensor.is_meta and not isinstance(tensor, FakeTensor)


def short_call(module: nn.Module, call: Call) -> Call:
    """Return `call` with few tokens, if `module` computes with them; else `call` itself.

    What a block's rows feed does not depend on how many tokens there are. The tokens are the rows
    of the first floating input [batch, tokens, width].
    """
    first = next((t for t in tensors_of((call.args, call.kwargs)) if t.is_floating_point()), None)
    if first is None or first.dim() != 3:
        return call
    tokens, width = first.shape[1:]
    if tokens <= 2 * _FEW_TOKENS or tokens == width:
        return call

    def shorten(tensor: Tensor) -> Tensor:
        for dim, size in enumerate(tensor.shape):
            if size == tokens:
                tensor = tensor.narrow(dim, 0, _FEW_TOKENS)
        return tensor.contiguous()

    shortened = map_tensors(call, shorten)
    assert isinstance(shortened, Call)
    try:
        with torch.no_grad():
            answer = next(tensors_of(run(shared_copy(module), shortened)))
    except Exception:  # it counts its tokens
        return call
    return shortened if answer.shape[:2] == (first.shape[0], _FEW_TOKENS) else call


def real_call(call: Call, seed: int = 0) -> Call:
    """Return `call` on the CPU in float64, with noise for the first floating tensor.

    Tensors without data (meta, fake) become noise, zeros for integers and True for booleans.
    """
    generator = torch.Generator().manual_seed(seed)
    drawn: list[Tensor] = []

    def real(tensor: Tensor) -> Tensor:
        has_data = _is_real(tensor)
        if not tensor.is_floating_point():
            if has_data:
                return tensor.detach().cpu().clone()
            fill = torch.ones if tensor.dtype is torch.bool else torch.zeros
            return fill(tensor.shape, dtype=tensor.dtype)
        if has_data and drawn:
            return tensor.detach().cpu().double().clone()
        noise = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
        drawn.append(noise)
        return noise

    replaced = map_tensors(call, real)
    assert isinstance(replaced, Call)
    return Call(_held(replaced.args), _held(dict(replaced.kwargs)))
