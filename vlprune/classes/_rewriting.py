"""Subclasses whose forward is that of their class but for a few nodes of its syntax tree.

They are made by name, when first asked for, so that a module that takes one on pickles, compiles
and exports: the name says the class and what was changed.
"""

from __future__ import annotations

import ast
import inspect
import linecache
import textwrap
from typing import Any

from torch import nn

from vlprune.errors import UnknownNameError
from vlprune.trusted import import_trusted


def is_nameable(cls: type[nn.Module]) -> bool:
    """Say whether a name can say where `cls` is, and no rule has made it already."""
    named = f"{cls.__module__}.{cls.__qualname__}"
    return (
        not cls.__module__.startswith("vlprune.classes.")
        and "<locals>" not in named
        and "__" not in named
    )


def imported(parts: list[str]) -> type[nn.Module]:
    """Return the class whose import path has these parts."""
    for size in range(len(parts) - 1, 0, -1):
        try:
            found: Any = import_trusted(".".join(parts[:size]))
        except (ModuleNotFoundError, UnknownNameError):
            continue
        for part in parts[size:]:
            found = getattr(found, part)
        if isinstance(found, type) and issubclass(found, nn.Module):
            return found
    raise AttributeError(f"no module holds the class {'.'.join(parts)}")


def defining(cls: type[nn.Module]) -> Any:
    """Return the class that `cls` has its forward from; None where it has none of its own."""
    for base in cls.__mro__:
        if "forward" in vars(base):
            return None if base.__module__.startswith("torch.") else base
    return None


def forward_tree(cls: Any) -> ast.Module | None:
    """Return the class's own forward as a tree, without decorators; None if it is not plain."""
    function = inspect.unwrap(cls.forward)
    if getattr(function, "__closure__", None):
        return None
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    except (OSError, TypeError, SyntaxError):
        return None
    forward = tree.body[0]
    if not isinstance(forward, ast.FunctionDef) or forward.name != "forward":
        return None
    forward.decorator_list = []
    return tree


def own_forward(cls: type[nn.Module]) -> tuple[Any, ast.Module | None]:
    """Return the class that defines the forward of `cls`, and its tree; None where it has none."""
    owner = defining(cls)
    return owner, None if owner is None else forward_tree(owner)


def flat_name(cls: type[nn.Module]) -> str:
    """Return where `cls` is as one name; `imported` takes its parts."""
    return f"{cls.__module__}.{cls.__qualname__}".replace(".", "__")


def subclass(
    named: str, cls: type[nn.Module], owner: Any, tree: ast.Module, **names: Any
) -> type[nn.Module]:
    """Return the subclass of `cls` with this forward, in the scope of `owner`'s.

    Args:
        named: its importable name, "package.module:Class".
        cls: the class that modules have.
        owner: the class that defines the forward.
        tree: the changed forward.
        names: what it may use beside that scope.
    """
    module, _, name = named.partition(":")
    source = ast.unparse(ast.fix_missing_locations(tree))
    file = f"<{module}.{name}>"
    linecache.cache[file] = (len(source), None, source.splitlines(keepends=True), file)
    scope = {**inspect.unwrap(owner.forward).__globals__, **names}
    exec(compile(source, file, "exec"), scope)
    members = {"forward": scope["forward"], "__module__": module, "__doc__": cls.__doc__}
    return type(name, (cls,), members)
