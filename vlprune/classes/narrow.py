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
from collections.abc import Iterator
from typing import Any

from torch import nn

from vlprune.classes._rewriting import (
    flat_name,
    imported,
    is_nameable,
    own_forward,
    subclass,
)
from vlprune.classes.calling import NAMES, call_layers, calling_name
from vlprune.layout import resolve

WIDTH = "vlprune_width"


def narrow_names(cls: type[nn.Module]) -> list[str]:
    """Return the importable names of the narrow subclasses of `cls`, if there can be any."""
    if not is_nameable(cls):
        return []
    _, tree = own_forward(cls)
    places = len(_readings(tree))
    spans: list[tuple[int, ...]] = [(k,) for k in range(places)]
    spans += [(k, m) for k in range(places) for m in range(k + 1, places)]
    stem = f"{__name__}:{flat_name(cls)}"
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
    owner, tree = own_forward(cls)
    readings = _readings(tree)
    if owner is None or tree is None or not places or places[-1] >= len(readings):
        raise AttributeError(f"{cls.__qualname__}.forward has no places {places} to narrow it at")
    body, index, width = readings[places[0]]
    for _, until, _ in [readings[place] for place in places[1:]]:
        body.insert(until, ast.parse(f"{width} = whole_{width}").body[0])
        body.insert(index, ast.parse(f"whole_{width} = {width}").body[0])
        index += 1
    body.insert(index, ast.parse(f"{width} = self.{WIDTH}").body[0])
    calling = calling_name(cls)  # a class that counts on padded layers must not lose that
    if calling:
        call_layers(tree)
        return subclass(f"{__name__}:{name}", resolve(calling), owner, tree, **NAMES)
    return subclass(f"{__name__}:{name}", cls, owner, tree)


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
