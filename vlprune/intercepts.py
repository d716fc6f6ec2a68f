"""What gates change inside of a forward: products with a matrix, and the choice of experts.

A hook on a module sees what goes in and out of it. Some forwards multiply with a matrix whose
module they never call, and a router of experts chooses before it answers; these modes, entered for
as long as a module runs, see the operations themselves.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle

CHOICES = ("topk", "argmax", "sort", "argsort")
CHOICE_DIM = {"topk": 2, "argmax": 1, "sort": 1, "argsort": 1}  # place of `dim` among arguments


class ProductMode(TorchFunctionMode):
    """Lets `change` have a say in what `linear` answers with one matrix, bias included."""

    def __init__(self, weight: Tensor, change: Callable[[Tensor], Tensor]):
        super().__init__()
        self._weight = weight
        self._change = change

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        answer = func(*args, **kwargs)
        if getattr(func, "__name__", "") == "linear":
            weight = kwargs["weight"] if "weight" in kwargs else args[1]
            if weight is self._weight:
                return self._change(answer)
        return answer


class RouterMode(TorchFunctionMode):
    """Keeps experts from being chosen: with gate 0 never, with gate 1 as they would be.

    A router multiplies tokens with one row per expert, turns the answers into weights (softmax or
    sigmoid) and chooses the best few. The logarithm of the gate is added to an expert's answer:
    under a softmax its weight is multiplied by the gate before all are divided by their sum. At 0
    whatever the choice is made from is minus infinity, too, a bias for balance included.

    Args:
        experts: how many there are.
        gate_of: logits [..., experts] to the gate [experts], or one for every example that
            broadcasts to the logits; None for no change.
        tap: called with how often each expert was chosen [..., experts, 1], zeros and ones.
    """

    def __init__(
        self,
        experts: int,
        gate_of: Callable[[Tensor], Tensor | None],
        tap: Callable[[Tensor], None] | None = None,
    ):
        super().__init__()
        self.inside = 0  # how deep in the module that holds the router's matrix
        self._experts = experts
        self._gate_of = gate_of
        self._tap = tap
        self._gate: Tensor | None = None
        self._chosen: Tensor | None = None

    def __exit__(self, *failure: Any) -> None:
        super().__exit__(*failure)  # type: ignore[no-untyped-call]
        if self._tap is not None and self._chosen is not None and self._chosen.dim() > 1:
            counts = torch.nn.functional.one_hot(self._chosen, self._experts).sum(-2)
            self._tap(counts.unsqueeze(-1))
        self._gate = self._chosen = None
        self.inside = 0

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name == "linear" and self.inside:
            logits = func(*args, **kwargs)
            if logits.shape[-1] != self._experts:
                return logits
            self._gate = self._gate_of(logits)
            return logits if self._gate is None else logits + _log(self._gate).to(logits.dtype)
        if name in CHOICES and chooses_from_all(args, kwargs, name, self._experts):
            x, *rest = args
            if self._gate is not None and self._gate.dim() == 1:  # one per example is never 0
                x = x.masked_fill(self._gate <= 0, float("-inf"))
            found = func(x, *rest, **kwargs)
            if name == "topk":
                self._chosen = found.indices
            return found
        return func(*args, **kwargs)


def while_running(module: nn.Module, mode: TorchFunctionMode) -> list[RemovableHandle]:
    """Enter `mode` whenever `module` runs; return what to remove to end that."""

    def enter(*_: Any) -> None:
        mode.__enter__()  # type: ignore[no-untyped-call]

    def leave(*_: Any) -> None:
        mode.__exit__(None, None, None)  # type: ignore[no-untyped-call]

    return [
        module.register_forward_pre_hook(enter),
        module.register_forward_hook(leave, always_call=True),
    ]


def chooses_from_all(args: tuple[Any, ...], kwargs: Any, name: str, experts: int) -> bool:
    """Say whether a call of one of `CHOICES` is along a last dimension of that size."""
    x = args[0] if args else None
    if not isinstance(x, Tensor) or not x.dim() or x.shape[-1] != experts:
        return False
    place = CHOICE_DIM[name]
    dim = kwargs.get("dim", args[place] if len(args) > place else -1)
    return dim in (-1, x.dim() - 1)


def _log(gate: Tensor) -> Tensor:
    """The logarithm of a gate, minus infinity at 0, where its gradient is 0."""
    positive = gate > 0
    return torch.where(positive, torch.where(positive, gate, 1.0).log(), float("-inf"))
