"""torch-pruning's dependency graph, guarded, as sites: which tensor rows belong to one unit.

A second witness beside `discovery/`, which finds units without it: `vlprune inspect --graph` and
the tests ask whether both name the same rows. The graph is traced once, for reading only: nothing
is cut through it. Guards: a time limit, nested outputs, frozen parameters (they would vanish from
the graph), train and eval modes, indices out of range.
"""

from __future__ import annotations

import ctypes
import dataclasses
import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from vlprune.anatomy import Axis, Site
from vlprune.calls import Call, quiet_eval, run, tensors_of
from vlprune.errors import TraceError

TRACE_LIMIT_S = 300.0
GROUP_LIMIT_S = 20.0


@dataclasses.dataclass(frozen=True, slots=True)
class Producers:
    """Where features come from.

    Attributes:
        linears: paths of the nearest linear layers upstream.
        passed: paths of the other modules on the way (norms, convolutions).
        open_ended: whether a way up ended in anything else, such as the model's input.
    """

    linears: tuple[str, ...]
    passed: tuple[str, ...]
    open_ended: bool


class CoupledGraph:
    """Which tensor rows are coupled with the input features of a linear layer.

    Args:
        model: traced by one forward and autograd graph per call; left as it was.
        calls: every call adds its part of the model to the graph.
        limit_s: seconds before the trace is given up.

    Raises:
        TraceError: if the graph cannot be built, or not within `limit_s`.
    """

    def __init__(self, model: nn.Module, calls: Sequence[Call], limit_s: float = TRACE_LIMIT_S):
        self._model = model
        self._limit_s = limit_s
        self._names = {id(module): path for path, module in model.named_modules()}
        self._graph = _build(model, calls, limit_s)

    def sees(self, path: str) -> bool:
        """Say whether the module ran as a module of its own in the trace."""
        return self._model.get_submodule(path) in self._graph.module2node

    def sites(self, consumer: str, units: int, block: int = 1) -> tuple[Site, ...]:
        """Return where the input features of `consumer` lie in all coupled tensors.

        Args:
            consumer: path of a linear layer with `units * block` input features.
            units: number of units.
            block: input features per unit.

        Raises:
            TraceError: if the graph's answer is not a row of equal blocks in range.
        """
        with _time_limit(min(self._limit_s, GROUP_LIMIT_S), f"reading the group of {consumer}"):
            first = self._group(consumer, list(range(block)))
            whole = self._group(consumer, list(range(units * block)))
        sites: list[Site] = []
        for (path, side), indices in first.items():
            for tensor, dim in self._tensors(path, side):
                sites += self._runs(
                    f"{path}.{tensor}", dim, indices, whole[path, side], units, block
                )
        return tuple(sites)

    def producers(self, consumer: str) -> Producers:
        """Return which modules the input features of `consumer` come from.

        Walks up to the next linear layers, through operations and through other modules, and never
        further, so that it ends where reading a whole group would not.
        """
        start = self._graph.module2node[self._model.get_submodule(consumer)]
        linears, passed, open_ended = [], [], False
        waiting, seen = list(start.inputs), {id(start)}
        while waiting:
            node = waiting.pop()
            if id(node) in seen:
                continue
            seen.add(id(node))
            path = self._names.get(id(node.module))
            if isinstance(node.module, nn.Linear) and path is not None:
                linears.append(path)
                continue
            if path is not None:
                passed.append(path)
            # an operation without inputs transposes a weight; anything else is a source
            is_source = path is not None or isinstance(node.module, nn.Parameter)
            open_ended = open_ended or (is_source and not node.inputs)
            waiting += node.inputs
        return Producers(tuple(linears), tuple(passed), open_ended)

    def _group(self, consumer: str, features: list[int]) -> dict[tuple[str, str], list[int]]:
        import torch_pruning  # lazy: it imports timm, where timm is installed

        module = self._model.get_submodule(consumer)
        group = self._graph.get_pruning_group(
            module, torch_pruning.prune_linear_in_channels, features
        )
        members: dict[tuple[str, str], list[int]] = {}
        for dependency, indices in group:
            target = dependency.target.module
            if isinstance(target, nn.Module) and id(target) in self._names:
                side = "in" if "in_channels" in dependency.handler.__name__ else "out"
                found = members.setdefault((self._names[id(target)], side), [])
                found += [int(i) for i in indices if int(i) not in found]
            elif isinstance(target, nn.Parameter):
                members[f"parameter {dependency.target.name}", "out"] = [int(i) for i in indices]
        return {key: sorted(value) for key, value in members.items()}

    def _tensors(self, path: str, side: str) -> list[tuple[str, int]]:
        module = self._model.get_submodule(path)
        if side == "in":
            return [("weight", 1)]
        return [("weight", 0)] + ([("bias", 0)] if module.bias is not None else [])

    def _runs(
        self, tensor: str, dim: int, first: list[int], whole: list[int], units: int, block: int
    ) -> Iterator[Site]:
        size = self._model.get_parameter(tensor).shape[dim]
        offsets = first[::block]
        expected = sorted(o + i for o in offsets for i in range(units * block))
        if whole != expected or (whole and not 0 <= whole[0] <= whole[-1] < size):
            raise TraceError(
                f"the dependency graph's rows of {tensor!r} must be {units} blocks of {block} "
                f"inside [0, {size}); it answered [{whole[0]}..{whole[-1]}], {len(whole)} rows."
            )
        for offset in offsets:
            yield Site(tensor=tensor, dim=dim, offset=offset, block=block)


def verdicts(
    model: nn.Module, calls: Sequence[Call], axes: Sequence[Axis], limit_s: float = TRACE_LIMIT_S
) -> dict[str, str]:
    """Return what the dependency graph says of heads and neurons, axis name to verdict.

    "agrees" where it couples the same rows, "sees a part" of them, "sees nothing" where their
    layers are not in it, "cannot tell" where it gives no answer that slices could express or does
    not end, "disagrees" where it names others.
    """
    graph = CoupledGraph(model, calls, limit_s)
    return {
        axis.name: _verdict(graph, axis)
        for axis in axes
        if axis.kind in ("head", "ffn") and axis.gate.kind == "input"
    }


def _verdict(graph: CoupledGraph, axis: Axis) -> str:
    owners = {site.tensor.rpartition(".")[0] for site in axis.sites}
    if not all(graph.sees(owner) for owner in owners):
        return "sees nothing"
    try:
        traced = set(graph.sites(axis.gate.modules[0], axis.units, axis.gate.block))
    except Exception:  # torch-pruning fails in many ways on what it does not know
        return "cannot tell"
    if traced == set(axis.sites):
        return "agrees"
    return "sees a part" if traced < set(axis.sites) else "disagrees"


def _build(model: nn.Module, calls: Sequence[Call], limit_s: float) -> Any:
    import torch_pruning  # lazy: it imports timm, where timm is installed

    graph = torch_pruning.DependencyGraph()
    with _time_limit(limit_s, "building the dependency graph"), _traceable(model):
        try:
            graph.build_dependency(
                model,
                example_inputs=(),
                forward_fn=lambda module, _: [run(module, call) for call in calls],
                output_transform=lambda outputs: [
                    t for t in tensors_of(outputs) if t.grad_fn is not None
                ],
            )
        except TraceError:
            raise
        except Exception as error:
            raise TraceError(
                f"the dependency graph of {type(model).__name__} could not be built: "
                f"{type(error).__name__}: {error}. Check that the example inputs run the model."
            ) from error
    return graph


@contextmanager
def _traceable(model: nn.Module) -> Iterator[None]:
    """Let every parameter require a gradient, in eval mode, and put all back after."""
    frozen = [p for p in model.parameters() if not p.requires_grad and p.is_floating_point()]
    linears = [module for module in model.modules() if isinstance(module, nn.Linear)]
    empty: list[tuple[Any, type]] = [(m, type(m)) for m in linears if not m.weight.numel()]
    with quiet_eval(model), torch.enable_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # "unwrapped parameters": we cut by our own sites
        for parameter in frozen:
            parameter.requires_grad_(True)
        for module, _ in empty:  # torch-pruning divides by their width
            module.__class__ = _Untraced
        try:
            yield
        finally:
            for module, cls in empty:
                module.__class__ = cls
            for parameter in frozen:
                parameter.requires_grad_(False)


@contextmanager
def _time_limit(seconds: float, what: str) -> Iterator[None]:
    """Raise TraceError in this thread when the block takes longer; index loops may never end."""
    thread = threading.get_ident()
    done = threading.Event()

    def interrupt() -> None:
        if not done.is_set():
            ctypes.pythonapi.PyThreadState_SetAsyncExc(
                ctypes.c_ulong(thread), ctypes.py_object(_OutOfTime)
            )

    timer = threading.Timer(seconds, interrupt)
    timer.daemon = True
    timer.start()
    try:
        yield
    except _OutOfTime:
        raise TraceError(
            f"{what} must end within {seconds:g} s; it did not. torch-pruning loops without end on "
            "grouped-query attention with rotary embeddings."
        ) from None
    finally:
        done.set()
        timer.cancel()


class _Untraced(nn.Module):
    """A linear layer without features, while a model is traced: an output without a history."""

    weight: Tensor
    bias: Tensor | None

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        """See `nn.Linear`."""
        return functional.linear(x, self.weight, self.bias)


class _OutOfTime(BaseException):
    """Thrown into the tracing thread; no `except Exception` on the way may swallow it."""
