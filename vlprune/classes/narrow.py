"""Attention classes that take the width of their heads from an attribute, not from their input.

Many forwards begin with `B, N, C = x.shape` and then use C for the width of all heads together:
true until a head is gone. `vlprune.classes.narrow:PACKAGE__MODULE__CLASS__k` names a subclass with
the same forward, but for one line `C = self.vlprune_width` before the k-th statement that reads C
(which may still mean the input's width before it); with `__k__m` C is itself again from the m-th
on. It is made when first asked for, by name, so that a module that takes it on pickles, compiles
and exports. State-dict keys and `isinstance` stay.
"""

from __future__ import annotations

import ast
import functools
import importlib
import inspect
import linecache
import textwrap
from collections.abc import Iterator
from typing import Any

from torch import nn

WIDTH = "vlprune_width"


def narrow_names(cls: type[nn.Module]) -> list[str]:
    """Return the importable names of the narrow subclasses of `cls`, if there can be any."""
    named = f"{cls.__module__}.{cls.__qualname__}"
    if cls.__module__ == __name__ or "<locals>" in named or "__" in named:
        return []
    owner = _defining(cls)
    places = 0 if owner is None else len(_readings(_forward(owner)))
    spans: list[tuple[int, ...]] = [(k,) for k in range(places)]
    spans += [(k, m) for k in range(places) for m in range(k + 1, places)]
    stem = f"{__name__}:{named.replace('.', '__')}"
    return ["__".join([stem, *map(str, span)]) for span in spans]


def __getattr__(name: str) -> Any:
    if name.startswith("__") or "__" not in name:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return _narrow(name)


@functools.cache
def _narrow(name: str) -> type[nn.Module]:
    parts = name.split("__")
    places = [int(part) for part in parts if part.isdigit()]
    cls = imported(parts[: -len(places)] if places else parts)
    owner = _defining(cls)
    tree = None if owner is None else _forward(owner)
    readings = _readings(tree)
    if owner is None or tree is None or not places or places[-1] >= len(readings):
        raise AttributeError(f"{cls.__qualname__}.forward has no places {places} to narrow it at")
    body, index, width = readings[places[0]]
    for _, until, _ in [readings[place] for place in places[1:]]:
        body.insert(until, ast.parse(f"{width} = whole_{width}").body[0])
        body.insert(index, ast.parse(f"whole_{width} = {width}").body[0])
        index += 1
    body.insert(index, ast.parse(f"{width} = self.{WIDTH}").body[0])
    source = ast.unparse(ast.fix_missing_locations(tree))
    file = f"<{__name__}.{name}>"
    linecache.cache[file] = (len(source), None, source.splitlines(keepends=True), file)
    scope = dict(owner.forward.__globals__)
    exec(compile(source, file, "exec"), scope)
    members = {"forward": scope["forward"], "__module__": __name__, "__doc__": cls.__doc__}
    return type(name, (cls,), members)


def imported(parts: list[str]) -> type[nn.Module]:
    """Return the class whose import path has these parts."""
    for size in range(len(parts) - 1, 0, -1):
        try:
            found: Any = importlib.import_module(".".join(parts[:size]))
        except ModuleNotFoundError:
            continue
        for part in parts[size:]:
            found = getattr(found, part)
        assert isinstance(found, type), parts
        return found
    raise AttributeError(f"no module holds the class {'.'.join(parts)}")


def _defining(cls: type[nn.Module]) -> Any:
    """The class that `cls` has its forward from; None where it has none of its own."""
    for base in cls.__mro__:
        if "forward" in vars(base):
            return None if base.__module__.startswith("torch.") else base
    return None


def _forward(cls: Any) -> ast.Module | None:
    """The class's own forward as a tree, without decorators; None where its source is not plain."""
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


def _readings(tree: ast.Module | None) -> list[tuple[list[ast.stmt], int, str]]:
    """(statements, index, name): where a name that holds the input's last size is read next."""
    if tree is None:
        return []
    forward = tree.body[0]
    assert isinstance(forward, ast.FunctionDef)
    inputs = {argument.arg for argument in forward.args.args}
    for body, start, name in _widths(forward, inputs):
        places = [start + 1]
        for index in range(start + 2, len(body)):
            if any(isinstance(n, ast.Name) and n.id == name for n in ast.walk(body[index])):
                places.append(index)
        return [(body, index, name) for index in places]
    return []


def _widths(node: ast.AST, inputs: set[str]) -> Iterator[tuple[list[ast.stmt], int, str]]:
    """(statements, index, name): where a name takes the last size of an input."""
    for field in ("body", "orelse"):
        statements = getattr(node, field, [])
        for place, statement in enumerate(statements if isinstance(statements, list) else []):
            if isinstance(statement, ast.Assign) and len(statement.targets) == 1:
                name = _last_size(statement.targets[0], statement.value, inputs)
                if name:
                    yield statements, place, name
            yield from _widths(statement, inputs)


def _last_size(target: ast.expr, value: ast.expr, inputs: set[str]) -> str:
    if isinstance(value, ast.Subscript) and isinstance(target, ast.Name):
        index = ast.unparse(value.slice)
        return target.id if _is_shape(value.value, inputs) and index in ("-1", "2") else ""
    if isinstance(target, ast.Tuple) and _is_shape(value, inputs):
        names = [element.id for element in target.elts if isinstance(element, ast.Name)]
        if len(target.elts) == 4 and "C" in names:  # an image, channels first
            return "C"
        last = target.elts[-1]
        return last.id if isinstance(last, ast.Name) else ""
    return ""


def _is_shape(value: ast.expr, inputs: set[str]) -> bool:
    if isinstance(value, ast.Call):
        value = value.func
    return (
        isinstance(value, ast.Attribute)
        and value.attr in ("shape", "size")
        and isinstance(value.value, ast.Name)
        and value.value.id in inputs
    )
