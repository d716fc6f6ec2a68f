"""The papers as programs: each reads from top to bottom, every step a public call.

`upop` and `efficientvlm` have presets and can be run by name (`vlprune recipe`); `mope_clip` is
called from Python.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vlprune.errors import UnknownNameError

NAMES = ("efficientvlm", "upop")


def load(name: str) -> Any:
    """Return the module of a recipe, a `_stages.Recipe`.

    Raises:
        UnknownNameError: if there is none.
    """
    if name not in NAMES:
        raise UnknownNameError(f"recipe must be one of {', '.join(NAMES)}; got {name!r}.")
    return importlib.import_module(f"vlprune.recipes.{name}")


def preset_of(name: str, preset: str) -> Any:
    """Return a preset of a recipe.

    Raises:
        UnknownNameError: if there is none, with all that there are.
    """
    presets: Mapping[str, Any] = load(name).PRESETS
    if preset not in presets:
        raise UnknownNameError(
            f"preset of {name} must be one of {', '.join(presets)}; got {preset!r}."
        )
    return presets[preset]


def change(preset: Any, settings: Mapping[str, Any]) -> Any:
    """Return a preset with other values of its plain fields.

    Raises:
        ValueError: if there is no such field, or its values are of another kind.
    """
    values = {field.name: getattr(preset, field.name) for field in dataclasses.fields(preset)}
    plain = {
        name: value
        for name, value in values.items()
        if not isinstance(value, Mapping) and not dataclasses.is_dataclass(value)
    }
    changed = {}
    for key, value in settings.items():
        if key not in plain:
            raise ValueError(f"--set must name one of {', '.join(plain)}; got {key!r}.")
        now = plain[key]
        if isinstance(now, tuple):
            value = tuple(str(value).split(","))
        elif isinstance(now, bool):
            value = str(value).lower() in ("1", "true", "yes")
        elif isinstance(now, (int, float)) != isinstance(value, (int, float)) and now is not None:
            raise ValueError(f"{key} must be like {now!r}; got {value!r}.")
        changed[key] = value
    return dataclasses.replace(preset, **changed)


def claim(folder: Path, what: Mapping[str, Any]) -> None:
    """Note in a folder what runs there.

    Raises:
        ValueError: if it holds states of another run.
    """
    path = folder / "recipe.json"
    text = json.dumps(dict(what), indent=2, sort_keys=True) + "\n"
    if path.exists() and path.read_text() != text:
        raise ValueError(
            f"{folder} holds another run: {path} says {path.read_text().strip()}. Give another "
            "--out, or delete it."
        )
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
