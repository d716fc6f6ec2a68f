"""Classes that call those linear layers of which their own forward takes only the weight.

`F.linear(x, self.NAME.weight, bias)` goes past the module `self.NAME`: a layer there that lost rows
could not say where they were. `vlprune.classes.calling:PACKAGE__MODULE__CLASS` names a subclass
with the same forward, but for `product(self.NAME, x, bias)` in these places; see `padded.py`.
"""

from __future__ import annotations

import ast
import functools
from typing import Any

from torch import nn

from vlprune.classes._rewriting import flat_name, imported, is_nameable, own_forward, subclass
from vlprune.classes.padded import product


def calling_name(cls: type[nn.Module]) -> str:
    """Return the importable name of the calling subclass of `cls`, "" if there is none."""
    if not is_nameable(cls):
        return ""
    _, tree = own_forward(cls)
    return f"{__name__}:{flat_name(cls)}" if tree is not None and call_layers(tree) else ""


def __getattr__(name: str) -> Any:
    if name.startswith("__") or "__" not in name:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return _made(name)


@functools.cache
def _made(name: str) -> type[nn.Module]:
    cls = imported(name.split("__"))
    owner, tree = own_forward(cls)
    if tree is None or not call_layers(tree):
        raise AttributeError(f"{cls.__qualname__}.forward takes no weight out of a layer")
    return subclass(f"{__name__}:{name}", cls, owner, tree, **NAMES)


NAMES = {"vlprune_product": product}


def call_layers(tree: ast.Module) -> bool:
    """Change a forward in place; say whether there was anything to change. It needs `NAMES`."""
    calls = _Call()
    calls.visit(tree)
    return calls.count > 0


class _Call(ast.NodeTransformer):
    """Turns `F.linear(x, self.NAME.weight, bias)` into `product(self.NAME, x, bias)`."""

    count = 0

    def visit_Call(self, node: ast.Call) -> ast.AST:
        """A product, its arguments by position or by name."""
        self.generic_visit(node)
        if ast.unparse(node.func).rpartition(".")[2] != "linear":
            return node
        given = dict(zip(("input", "weight", "bias"), node.args, strict=False))
        given |= {keyword.arg: keyword.value for keyword in node.keywords if keyword.arg}
        weight = given.get("weight")
        if not isinstance(weight, ast.Attribute) or weight.attr != "weight" or "input" not in given:
            return node
        layer = weight.value
        if not isinstance(layer, ast.Attribute) or ast.unparse(layer.value) != "self":
            return node
        self.count += 1
        bias = given.get("bias", ast.Constant(None))
        function = ast.Name(next(iter(NAMES)), ctx=ast.Load())
        return ast.Call(func=function, args=[layer, given["input"], bias], keywords=[])
