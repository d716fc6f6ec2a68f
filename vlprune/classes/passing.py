"""Blocks that hand on what they are given: a removed layer whose place in its list must stay.

Others may count on the place: features that are tapped there, tables with an entry per layer, a
second list that is walked in step. Such a block keeps its attributes and loses all that it held.
`vlprune.classes.passing:PassingBlock__PACKAGE__MODULE__CLASS` names a subclass of
PACKAGE.MODULE.CLASS, made when first asked for, by name: recorders that look for the class still
find the block.
"""

from __future__ import annotations

import functools
from typing import Any

from torch import Tensor, nn

from vlprune.classes._rewriting import imported, is_nameable


class PassingBlock(nn.Module):
    """Answers its residual input: the first argument, or `hidden_states`."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """[B, T, D] -> [B, T, D]."""
        return _residual(args, kwargs)


class PassingTuple(nn.Module):
    """The same, as a tuple of one."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """[B, T, D] -> ([B, T, D],)."""
        return (_residual(args, kwargs),)


class PassingPair(nn.Module):
    """The same, with no attention weights beside it."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """[B, T, D] -> ([B, T, D], None)."""
        return _residual(args, kwargs), None


_CLASSES = (PassingBlock, PassingTuple, PassingPair)


def passing_names(cls: type[nn.Module]) -> list[str]:
    """Return the importable names of the passing subclasses of `cls`, if there can be any."""
    if not is_nameable(cls):
        return []
    suffix = f"{cls.__module__}.{cls.__qualname__}".replace(".", "__")
    return [f"{__name__}:{passing.__name__}__{suffix}" for passing in _CLASSES]


def __getattr__(name: str) -> Any:
    kind, _, suffix = name.partition("__")
    passing = next((cls for cls in _CLASSES if cls.__name__ == kind), None)
    if passing is None or not suffix:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return _made(name, passing, suffix)


@functools.cache
def _made(name: str, passing: type[nn.Module], suffix: str) -> type[nn.Module]:
    cls = imported(suffix.split("__"))
    return type(name, (passing, cls), {"__module__": __name__, "__doc__": passing.__doc__})


def is_passing(module: nn.Module) -> bool:
    """Say whether `module` is a block that was removed in its place."""
    return isinstance(module, _CLASSES)


def _residual(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    found: Tensor = args[0] if args else kwargs.get("hidden_states", next(iter(kwargs.values())))
    return found
