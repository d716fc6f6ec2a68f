"""Attention classes that count their heads, where their own forward counts features per head.

Many forwards reshape queries, keys and values by one shape `(..., -1, self.head_dim)`: true until
queries and values have other widths. `vlprune.classes.split:PACKAGE__MODULE__CLASS__ATTRIBUTE`
names a subclass with the same forward, but for `(..., self.ATTRIBUTE, -1)` in these places, where
ATTRIBUTE counts the heads, and a width of all heads (`self.all_head_size`) that is told to follow.
"""

from __future__ import annotations

import ast
import functools
from typing import Any

from torch import nn

from vlprune.classes._rewriting import flat_name, imported, is_nameable, own_forward, subclass

_WIDTHS = ("all_head_size", "attn_dim", "embed_dim", "inner_dim")


def split_names(cls: type[nn.Module], attribute: str) -> list[str]:
    """Return the importable name of the split subclass of `cls`, if there can be one."""
    if not is_nameable(cls) or "__" in attribute:
        return []
    _, tree = own_forward(cls)
    if tree is None or not _Split(attribute).changes(tree):
        return []
    return [f"{__name__}:{flat_name(cls)}__{attribute}"]


def __getattr__(name: str) -> Any:
    if name.startswith("__") or "__" not in name:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return _made(name)


@functools.cache
def _made(name: str) -> type[nn.Module]:
    *parts, attribute = name.split("__")
    cls = imported(parts)
    owner, tree = own_forward(cls)
    if tree is None or not _Split(attribute).changes(tree):
        raise AttributeError(f"{cls.__qualname__}.forward has no heads to split")
    return subclass(f"{__name__}:{name}", cls, owner, tree)


class _Split(ast.NodeTransformer):
    """Turns shapes that end in (-1, features per head) into ones that end in (heads, -1)."""

    def __init__(self, attribute: str):
        self._attribute = attribute
        self._count = 0

    def changes(self, tree: ast.Module) -> bool:
        """Change `tree` in place; say whether there was anything to change."""
        self.visit(tree)
        return self._count > 0

    def visit_Tuple(self, node: ast.Tuple) -> ast.AST:
        """A shape as a tuple."""
        self.generic_visit(node)
        self._turn(node.elts)
        is_width = len(node.elts) == 1 and _reads_self(node.elts[0], _WIDTHS)
        if is_width:  # the shape of all heads side by side
            node.elts[0] = ast.parse("-1", mode="eval").body
        return node

    def visit_Call(self, node: ast.Call) -> ast.AST:
        """A shape as the arguments of `view` or `reshape`."""
        self.generic_visit(node)
        if isinstance(node.func, ast.Attribute) and node.func.attr in ("view", "reshape"):
            self._turn(node.args)
            if len(node.args) > 1 and _reads_self(node.args[-1], _WIDTHS):
                node.args[-1] = ast.parse("-1", mode="eval").body
        return node

    def _turn(self, entries: list[ast.expr]) -> None:
        if len(entries) < 3 or ast.unparse(entries[-2]) not in ("-1", f"self.{self._attribute}"):
            return
        if _reads_self(entries[-1], ("head_dim", "attention_head_size", "head_size", "key_dim")):
            entries[-2] = ast.parse(f"self.{self._attribute}", mode="eval").body
            entries[-1] = ast.parse("-1", mode="eval").body
            self._count += 1


def _reads_self(node: ast.expr, names: tuple[str, ...]) -> bool:
    return (
        isinstance(node, ast.Attribute)
        and node.attr in names
        and isinstance(node.value, ast.Name)
        and node.value.id == "self"
    )
