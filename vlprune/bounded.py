"""A limit on the memory of new tensors, checked before they are made: for files from anyone."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from vlprune.errors import CheckpointError

_SIZED = ("empty", "zeros", "ones", "full", "rand", "randn", "randint", "new_empty", "new_zeros")
_COUNTED = ("arange", "linspace", "eye")


class Bounded(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """While on, tensors are made only as long as all of them together fit.

    Counts what factories are asked for, whether it is freed again or not.

    Args:
        size_bytes: of all.

    Raises:
        CheckpointError: by the factory that goes beyond it.
    """

    def __init__(self, size_bytes: int):
        super().__init__()  # type: ignore[no-untyped-call]
        self.size_bytes = size_bytes
        self.taken = 0

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Count what a factory is asked for, then let it run."""
        options = kwargs or {}
        dtype = options.get("dtype") or torch.get_default_dtype()
        self.taken += _numel(func, args) * dtype.itemsize
        if self.taken > self.size_bytes:
            raise CheckpointError(
                f"the original model must fit into {self.size_bytes:,} bytes; it takes more. The "
                "files may be damaged, or not be what they say."
            )
        return func(*args, **options)


def _numel(func: Any, args: tuple[Any, ...]) -> int:
    """How many elements a factory makes."""
    name = func.overloadpacket.__name__
    if name in _SIZED:
        sizes = next((arg for arg in args if isinstance(arg, (list, tuple))), ())
        return math.prod(map(abs, sizes))
    if name in _COUNTED:
        numbers = [abs(arg) for arg in args if isinstance(arg, (int, float))]
        return int(max(numbers, default=0))
    return 0
