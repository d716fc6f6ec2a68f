"""What a dependency graph cannot see, declared as rows of data: attentions, blocks, families.

A row names a class by its import path, so that no model library is imported here, and matches its
subclasses too. All rows of all families are pooled: a timm tower in an open_clip model needs no
row of its own. Rows live in `families/`, one library or model family a file.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from vlprune.anatomy import GateKind
from vlprune.calls import Inputs
from vlprune.errors import UnknownNameError, UnsupportedModelError
from vlprune.trusted import import_trusted


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class AttentionLayout:
    """Classes that an attention class takes on, where its own forward cannot hold fewer heads.

    Where the heads lie is read off gradients (`probe.py`), and what must follow is found by trial
    (`fit.py`); a row is needed only where neither suffices.

    Attributes:
        cls: import path of the class, "package.module.Class".
        gate, cut, empty: importable classes "package.module:Class" to take on while gated, when
            heads were removed, when none is left; "" where the class itself can do it.
        dims: importable class to take on when its heads lost dimensions, of queries and keys or of
            values; it serves where heads were removed, too.
        lists: attributes of `cut` with an entry per head, which lose those of removed heads.
        refuse: (attribute, reason): the attention is left whole where this is a module or a value
            other than None, False or `nn.Identity`.
    """

    cls: str
    gate: str = ""
    cut: str = ""
    dims: str = ""
    empty: str = ""
    lists: tuple[str, ...] = ()
    refuse: tuple[tuple[str, str], ...] = ()


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class HalfLayout:
    """One residual half of a block.

    Attributes:
        name: "attention", "cross_attention" or "ffn".
        gate: "output" of `module` for a pre-norm branch; "skip" for a half that ends in a norm.
        module: the gated module, relative to the block.
        scopes: modules that vanish with the half, relative to the block.
        argument, keyword: where "skip" finds the residual input among the module's arguments.
    """

    name: str
    gate: GateKind
    module: str
    scopes: tuple[str, ...]
    argument: int = 0
    keyword: str = "hidden_states"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class BlockLayout:
    """A transformer block class and its halves.

    Attributes:
        cls: import path of the class.
        halves: its residual halves.
        bypass: importable class to take on when a half is removed (its scopes become None).
        owner_empty: importable class that the owner takes on when no block is left.
    """

    cls: str
    halves: tuple[HalfLayout, ...]
    bypass: str
    owner_empty: str = ""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """A model library or family: its rows, towers, example inputs, and how to build it again.

    Attributes:
        models: import paths of the model classes that it can feed and build; see `is_a`.
        towers: (path pattern as in `fnmatch`, tower), the first that matches wins.
        example_inputs: model and batch size to inputs, for models used without data.
        describe: model to the JSON arguments of `build`, or None where they cannot be told.
        build: those arguments to a model with random weights, in eval mode, without a download.
        create: (name, pretrained, keyword arguments) to a model, for `vlprune.create_model`.
        stock: (cut model, what became of its axes (`history.py`), arguments of `build` for the
            original) to those of the library's own class of the cut model's sizes, one size for
            all layers of a stack; whether it holds the plan is tried afterwards. `plain.py` asks.
        write: (such a stock model, its arguments, folder) writes files that the library loads by
            itself, and returns the line of Python that does, with `FOLDER` for the folder.
    """

    models: tuple[str, ...] = ()
    towers: tuple[tuple[str, str], ...] = ()
    attentions: tuple[AttentionLayout, ...] = ()
    blocks: tuple[BlockLayout, ...] = ()
    example_inputs: Callable[[nn.Module, int], Inputs] | None = None
    describe: Callable[[nn.Module], dict[str, Any] | None] | None = None
    build: Callable[[dict[str, Any]], nn.Module] | None = None
    create: Callable[..., nn.Module] | None = None
    stock: Callable[[nn.Module, Mapping[str, Any], dict[str, Any]], dict[str, Any]] | None = None
    write: Callable[[nn.Module, dict[str, Any], Path], str] | None = None


def is_a(module: nn.Module, cls: str) -> bool:
    """Say whether `module` is of the class with this import path, or of a subclass.

    "package.models.*" stands for all classes of a package.
    """
    names = [f"{c.__module__}.{c.__qualname__}" for c in type(module).__mro__]
    if cls.endswith(".*"):
        return any(name.startswith(cls[:-1]) for name in names)
    return cls in names


def resolve(name: str) -> Any:
    """Return the class of modules that "package.module:Class" names.

    Raises:
        UnknownNameError: if its package is none to import from (`trusted.py`), or it names no class
            of modules.
    """
    module, _, attribute = name.partition(":")
    try:
        found = getattr(import_trusted(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise UnknownNameError(f"class {name!r} must exist; {error}.") from error
    if not (isinstance(found, type) and issubclass(found, nn.Module)):
        raise UnknownNameError(f"class {name!r} must be a class of torch modules; it is not.")
    return found


def family_of(model: nn.Module, families: Mapping[str, Family]) -> tuple[str, Family]:
    """Return name and row of the family that declares the class of `model`, or the nearest base.

    Raises:
        UnsupportedModelError: if none does.
    """
    names = [f"{c.__module__}.{c.__qualname__}" for c in type(model).__mro__]
    fitting = [
        (names.index(cls) if cls in names else len(names), name)
        for name, family in families.items()
        for cls in family.models
        if is_a(model, cls)
    ]
    if fitting:
        _, nearest = min(fitting)
        return nearest, families[nearest]
    raise UnsupportedModelError(
        f"{type(model).__module__}.{type(model).__qualname__} is a class that no family declares "
        f"(families: {', '.join(families)}). Give example_inputs to dissect it all the same, and "
        "source= to save it."
    )


def relative(path: str, step: str) -> str:
    """Return the module path that `step` leads to from `path`; "../x" is a sibling."""
    parts = path.split(".") if path else []
    while step.startswith("../"):
        parts, step = parts[:-1], step[3:]
    return ".".join([*parts, step]) if step else ".".join(parts)
