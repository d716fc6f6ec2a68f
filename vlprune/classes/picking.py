"""Modules that are handed something for every head, and take what is for the heads that stay.

A relative position bias or a table of rotary angles may be made once, outside, for all layers.
`vlprune.classes.picking:Picking__PACKAGE__MODULE__CLASS__INPUT__DIM__BLOCK` names a subclass of
PACKAGE.MODULE.CLASS, made when first asked for, by name, that picks its units along dimension DIM
of INPUT (the number of an argument, or its name), BLOCK entries each.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn

from vlprune.classes._rewriting import imported, is_nameable

KEPT = "vlprune_kept"


class Picking(nn.Module):
    """Hands its class's own forward the part of one input that belongs to the kept units."""

    picked: int | str
    dim: int
    block: int
    vlprune_kept: tuple[int, ...]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """See the class itself."""
        at = self.picked
        whole: Tensor = args[at] if isinstance(at, int) else kwargs[at]
        entries = [u * self.block + i for u in self.vlprune_kept for i in range(self.block)]
        kept = torch.tensor(entries, dtype=torch.long, device=whole.device)
        part = whole.index_select(self.dim, kept)
        if isinstance(at, int):
            args = (*args[:at], part, *args[at + 1 :])
        else:
            kwargs = {**kwargs, at: part}
        return _handed_on(super().forward(*args, **kwargs), part, whole)


def _handed_on(output: Any, part: Tensor, whole: Tensor) -> Any:
    """The output with the whole input where its part is handed on to the next module."""
    if isinstance(output, tuple):
        return tuple(_handed_on(entry, part, whole) for entry in output)
    return whole if output is part else output


def picking_name(cls: type[nn.Module], place: int | str, dim: int, block: int) -> str:
    """Return the importable name of the picking subclass of `cls`, "" if there can be none."""
    if not is_nameable(cls) or "__" in str(place):
        return ""
    named = f"{cls.__module__}.{cls.__qualname__}".replace(".", "__")
    return f"{__name__}:Picking__{named}__{place}__{dim}__{block}"


def __getattr__(name: str) -> Any:
    if not name.startswith("Picking__"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return _made(name)


@functools.cache
def _made(name: str) -> type[nn.Module]:
    _, *parts, place, dim, block = name.split("__")
    members = {
        "__module__": __name__,
        "__doc__": Picking.__doc__,
        "picked": int(place) if place.isdigit() else place,
        "dim": int(dim),
        "block": int(block),
    }
    return type(name, (Picking, imported(parts)), members)
