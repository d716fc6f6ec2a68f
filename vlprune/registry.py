"""Names to plug-ins, for metrics, strategies, allocations, families and tasks.

A registry imports its own folder at the first look-up (every file whose name has no leading
underscore) and then the entry points of the same name, so a plug-in is one file and nothing else
changes. Import errors are raised, never swallowed. This file knows no plug-in.
"""

from __future__ import annotations

import difflib
import importlib
import importlib.metadata
import pkgutil
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

from vlprune.errors import UnknownNameError

T = TypeVar("T")


class Registry(Mapping[str, Any]):
    """A read-only mapping from name to plug-in that fills itself at first look-up.

    Args:
        group: folder and entry-point group at once, for instance "vlprune.metrics".
        noun: what one entry is, for messages, for instance "metric".
    """

    def __init__(self, group: str, noun: str):
        self.group = group
        self.noun = noun
        self._entries: dict[str, Any] = {}
        self._loaded = False

    def register(self, name: str) -> Callable[[T], T]:
        """Return a decorator that files its object under `name`.

        Raises:
            ValueError: if another object has that name already.
        """

        def file_under(entry: T) -> T:
            known = self._entries.get(name, entry)
            if known is not entry and _origin(known) != _origin(entry):
                raise ValueError(
                    f"{self.noun} {name!r} must be registered once; got {entry!r} beside "
                    f"{known!r}. Give one of them another name."
                )
            self._entries[name] = entry  # a module that is imported again replaces its own
            return entry

        return file_under

    def __getitem__(self, name: str) -> Any:
        self._load()
        if name not in self._entries:
            raise UnknownNameError(self._unknown(name))
        return self._entries[name]

    def __contains__(self, name: object) -> bool:
        self._load()
        return name in self._entries

    def __iter__(self) -> Iterator[str]:
        self._load()
        return iter(sorted(self._entries))

    def __len__(self) -> int:
        self._load()
        return len(self._entries)

    def by_class_name(self, attribute: str) -> Any:
        """Return the entry whose own name is `attribute`; a package's `__getattr__`."""
        if not attribute.startswith("_"):
            for entry in self.values():
                if getattr(entry, "__name__", None) == attribute:
                    return entry
        raise AttributeError(f"module {self.group!r} has no attribute {attribute!r}")

    def _unknown(self, name: str) -> str:
        near = difflib.get_close_matches(str(name), list(self), n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        return f"{self.noun} {name!r} is not known; known are {', '.join(self)}.{hint}"

    def _load(self) -> None:
        if self._loaded:
            return
        self._loaded = True  # first, so that a plug-in may look others up while it is imported
        try:
            folder = importlib.import_module(self.group)
            for module in pkgutil.iter_modules(folder.__path__, self.group + "."):
                if not module.name.rpartition(".")[2].startswith("_"):
                    importlib.import_module(module.name)
            for point in importlib.metadata.entry_points(group=self.group):
                entry = point.load()
                if entry not in self._entries.values():
                    self.register(point.name)(entry)
        except BaseException:
            self._loaded = False
            raise


def _origin(entry: Any) -> object:
    """Where an entry is defined; itself where that cannot be told (a row of data)."""
    module, name = getattr(entry, "__module__", None), getattr(entry, "__qualname__", None)
    return (module, name) if name else id(entry)


METRICS = Registry("vlprune.metrics", "metric")
STRATEGIES = Registry("vlprune.strategies", "strategy")
ALLOCATIONS = Registry("vlprune.allocation", "allocation")
FAMILIES = Registry("vlprune.families", "family")
TASKS = Registry("vlprune.tasks", "task")
