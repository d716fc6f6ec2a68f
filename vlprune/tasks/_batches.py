"""What every task asks of its batches."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


def check_repeatable(batches: Any, name: str) -> None:
    """Raise TypeError if `batches` can be gone through only once: scoring needs many passes."""
    if iter(batches) is batches:
        raise TypeError(
            f"{name} must be a list or loader that can be gone through many times; got an "
            f"iterator {type(batches).__name__}. Wrap it in list()."
        )


def fields(batch: Any, *names: str) -> tuple[Tensor, ...]:
    """Return these fields of a batch: a mapping with their names, or a tuple in their order.

    Raises:
        TypeError: if a mapping has not all of them, or a tuple is too short.
    """
    if isinstance(batch, Mapping) and set(names) <= set(batch):
        return tuple(batch[name] for name in names)
    if isinstance(batch, (tuple, list)) and len(batch) >= len(names):
        return tuple(batch[: len(names)])
    got = sorted(batch) if isinstance(batch, Mapping) else f"{type(batch).__name__}"
    raise TypeError(
        f"a batch must hold {', '.join(map(repr, names))}, as a dict or in this order; got {got}."
    )


def check_labels(labels: Tensor, classes: int, ignore: int | None = None) -> Tensor:
    """Return labels with -1 where they do not count.

    Raises:
        ValueError: if one is no class.
    """
    ignored = torch.zeros_like(labels, dtype=torch.bool) if ignore is None else labels == ignore
    outside = ((labels < 0) | (labels >= classes)) & ~ignored
    if outside.any():
        raise ValueError(
            f"labels must lie in [0, {classes}), the classes that the model scores; got "
            f"{int(labels[outside][0])}. Number them so, or tell Segmentation to ignore it."
        )
    return labels.masked_fill(ignored, -1)


def first_of(batches: Iterable[T], task: str) -> T:
    """Return the first batch of a loader.

    Raises:
        ValueError: if there is none.
    """
    for batch in batches:
        return batch
    raise no_batches(task)


def no_batches(task: str) -> ValueError:
    """Return the error that an empty loader is met with."""
    return ValueError(f"loader must yield at least one batch; got none in {task}.")
