"""Batches of any data set of scenes: all at once in a list, or each made when it is asked for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeAlias, overload

from torch import Tensor

Batch: TypeAlias = dict[str, Tensor]


class Stream(Sequence[Batch]):
    """Batches in order, each made anew when it is asked for; the last may be smaller.

    Args:
        make: a batch of these examples.
        count: of all examples.
        batch_size: examples in a batch.
    """

    def __init__(self, make: Callable[[range], Batch], count: int, batch_size: int):
        self._make, self._count, self._batch_size = make, count, batch_size

    def __len__(self) -> int:
        return -(-self._count // self._batch_size)

    @overload
    def __getitem__(self, index: int) -> Batch: ...
    @overload
    def __getitem__(self, index: slice) -> list[Batch]: ...
    def __getitem__(self, index: int | slice) -> Batch | list[Batch]:
        if isinstance(index, slice):
            return [self[place] for place in range(*index.indices(len(self)))]
        start = range(len(self))[index] * self._batch_size
        return self._make(range(start, min(start + self._batch_size, self._count)))


def batches_of(
    make: Callable[[range], Batch], count: int, batch_size: int, *, stream: bool
) -> Sequence[Batch]:
    """Return the batches: a list, since calibration reads it many times, or a `Stream`.

    A list holds 110 KB a scene; a stream holds nothing, for training on many scenes once.
    """
    found = Stream(make, count, batch_size)
    return found if stream else list(found)
