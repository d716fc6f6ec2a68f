"""What may be imported by a name that stands in a file: files may come from anyone."""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import sys
from types import ModuleType

from vlprune.errors import UnknownNameError

_LIBRARIES = ("vlprune", "torch", "transformers", "timm", "open_clip")
_KINDS = ("metrics", "strategies", "allocation", "families", "tasks")


def import_trusted(module: str) -> ModuleType:
    """Return a module of the libraries that models come from, of a package with plug-ins of ours.

    Or one that is imported already.

    Raises:
        UnknownNameError: for any other; nothing of it was run.
        ModuleNotFoundError: if there is none of that name.
    """
    package = module.partition(".")[0]
    if package not in _LIBRARIES and module not in sys.modules and package not in _plugged_in():
        raise UnknownNameError(
            f"module {module!r} must be of {', '.join(_LIBRARIES)}, of a package with plug-ins, or "
            "imported already; it is not. Import it first where you trust it."
        )
    return importlib.import_module(module)


@functools.cache
def _plugged_in() -> frozenset[str]:
    """The packages that have entry points of ours."""
    groups = [f"vlprune.{kind}" for kind in _KINDS]
    points = [p for group in groups for p in importlib.metadata.entry_points(group=group)]
    return frozenset(point.module.partition(".")[0] for point in points)
