"""torch-pruning's dependency graph, guarded, as sites: which tensor rows belong to one unit.

The graph is traced once, for reading only: nothing is cut through it later. Guards: a time limit,
nested outputs, frozen parameters (they would vanish from the graph), train and eval modes, indices
out of range. What it cannot see is declared in `families/`.
"""

from __future__ import annotations

import ctypes
import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from vlprune.anatomy import Site, under
from vlprune.calls import Call, quiet_eval, run, tensors_of
from vlprune.errors import TraceError

TRACE_LIMIT_S = 300.0


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
        with _time_limit(self._limit_s, f"reading the group of {consumer}"):
            first = self._group(consumer, list(range(block)))
            whole = self._group(consumer, list(range(units * block)))
        sites: list[Site] = []
        for (path, side), indices in first.items():
            for tensor, dim in self._tensors(path, side):
                sites += self._runs(
                    f"{path}.{tensor}", dim, indices, whole[path, side], units, block
                )
        return tuple(sites)

    def coupled_modules(self, consumer: str) -> list[tuple[str, str]]:
        """Return (module path, "in" or "out") of all that is coupled with one input feature."""
        with _time_limit(self._limit_s, f"reading the group of {consumer}"):
            return list(self._group(consumer, [0]))

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


def is_inside(members: Sequence[tuple[str, str]], scope: str) -> bool:
    """Say whether all coupled modules lie inside the module path `scope`."""
    return all(under(path, scope) for path, _ in members)


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
    with quiet_eval(model), torch.enable_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # "unwrapped parameters": we cut by our own sites
        for parameter in frozen:
            parameter.requires_grad_(True)
        try:
            yield
        finally:
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


class _OutOfTime(BaseException):
    """Thrown into the tracing thread; no `except Exception` on the way may swallow it."""
