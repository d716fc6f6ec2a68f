"""Models without weights, run for their shapes: operations on meta tensors, without Python kernels.

torch spells most operations out in Python where a tensor is on the meta device, milliseconds each:
too slow to run a deep model again and again. The few that a transformer consists of are answered
here by an empty tensor of the right shape and dtype; all others go the usual way.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

_aten = torch.ops.aten


class QuickShapes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """A context in which operations on meta tensors are quick; others are left alone."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        shape_of = _SHAPES.get(func)
        if shape_of is not None and isinstance(args[0], Tensor) and args[0].is_meta:
            answer = shape_of(*args)
            if answer is not None:
                return answer
        return func(*args, **(kwargs or {}))


def _addmm(bias: Tensor, a: Tensor, b: Tensor, *_: Any) -> Tensor:
    return a.new_empty(a.shape[0], b.shape[1])


def _mm(a: Tensor, b: Tensor) -> Tensor:
    return a.new_empty(*a.shape[:-1], b.shape[-1])


def _like(x: Tensor, *_: Any) -> Tensor:
    return x.new_empty(x.shape)


def _pointwise(a: Tensor, b: Any, *_: Any) -> Tensor | None:
    is_number = not isinstance(b, Tensor) or (b.dim() == 0 and not b.is_meta)
    if is_number:
        return a.new_empty(a.shape) if a.is_floating_point() else None
    if a.dtype != b.dtype or not b.is_meta:
        return None
    shape: torch.Size = torch.broadcast_shapes(a.shape, b.shape)  # type: ignore[no-untyped-call]
    return a.new_empty(shape)


def _layer_norm(x: Tensor, shape: Any, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    ends = x.dim() - len(shape)
    statistics = x.new_empty(*x.shape[:ends], *[1] * len(shape))
    return x.new_empty(x.shape), statistics, statistics


_SHAPES: dict[Any, Callable[..., Any]] = {
    _aten.addmm.default: _addmm,
    _aten.mm.default: _mm,
    _aten.bmm.default: _mm,
    _aten.native_layer_norm.default: _layer_norm,
    **dict.fromkeys(
        [
            _aten.gelu.default,
            _aten.relu.default,
            _aten.silu.default,
            _aten.sigmoid.default,
            _aten.tanh.default,
            _aten._softmax.default,
            _aten._safe_softmax.default,
        ],
        _like,
    ),
    **dict.fromkeys(
        [_aten.add.Tensor, _aten.sub.Tensor, _aten.mul.Tensor, _aten.div.Tensor], _pointwise
    ),
}
