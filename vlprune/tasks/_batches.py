"""What every task asks of its batches."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor


def check_repeatable(batches: Any, name: str) -> None:
    """Raise TypeError if `batches` can be gone through only once: scoring needs many passes."""
    if iter(batches) is batches:
        raise TypeError(
            f"{name} must be a list or loader that can be gone through many times; got an "
            f"iterator {type(batches).__name__}. Wrap it in list()."
        )


def pair_of(batch: Any, second: str) -> tuple[Tensor, Tensor]:
    """Return (image, `second`) of a batch that is a mapping with these names, or a sequence."""
    if isinstance(batch, Mapping):
        return batch["image"], batch[second]
    image, other = batch[:2]
    return image, other


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


def first_of(batches: Iterable[tuple[Tensor, Tensor]], task: str) -> tuple[Tensor, Tensor]:
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
