"""What every task asks of its batches."""

from __future__ import annotations

from typing import Any


def check_repeatable(batches: Any, name: str) -> None:
    """Raise TypeError if `batches` can be gone through only once: scoring needs many passes."""
    if iter(batches) is batches:
        raise TypeError(
            f"{name} must be a list or loader that can be gone through many times; got an "
            f"iterator {type(batches).__name__}. Wrap it in list()."
        )
