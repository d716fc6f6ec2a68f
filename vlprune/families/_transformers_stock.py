"""What a class of transformers can hold of a plan: config values, and per_layer_config.

Which entry of a config says a size is read off its name and value; whether a class listens to it
is tried by `plain.py`, which builds the class and compares.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from vlprune.errors import PlanError
from vlprune.history import Fate

_NAMES = {
    "ffn": re.compile(r"intermediate|ffn|mlp_dim|inner|d_ff"),
    "layer": re.compile(r"layers$|depth"),
}
_HEADS, _GROUPS, _WIDTH = "num_attention_heads", "num_key_value_heads", "head_dim"


def stock(model: Any, fates: Mapping[str, Fate], arguments: dict[str, Any]) -> dict[str, Any]:
    """Return class and config of a stock model with the sizes of a cut one.

    Where the layers of a config differ, they are written into its `per_layer_config`.

    Raises:
        PlanError: if an axis belongs to a config that its class has twice.
    """
    changed = copy.deepcopy(arguments)
    owners: dict[tuple[str, ...], list[Fate]] = {}
    for fate in fates.values():
        owners.setdefault(_config_of(model, fate, arguments["config"]), []).append(fate)
    for place, members in owners.items():
        config = changed["config"]
        for step in place:
            config = config[step]
        _write_layers(config, [fate for fate in members if fate.axis.kind == "layer"])
        for kind in ("head", "ffn"):
            _write_sizes(config, kind, [fate for fate in members if fate.axis.kind == kind])
    return changed


def write(model: Any, arguments: dict[str, Any], folder: Path) -> str:
    """Write what `from_pretrained` of the model's class reads.

    Raises:
        PlanError: if the class is not one of transformers.
    """
    if ":" in arguments["class"]:
        raise PlanError(
            f"the class must be one of transformers to be saved plain; {arguments['class']} is "
            "not. Save it with vlprune.save_pretrained."
        )
    model.save_pretrained(folder)
    return f'transformers.{arguments["class"]}.from_pretrained("FOLDER")'


def _config_of(model: nn.Module, fate: Fate, config: dict[str, Any]) -> tuple[str, ...]:
    """Where in the config of the whole model the one lies that the axis's modules were made by."""
    path = fate.name.rpartition(":")[0]
    while path and getattr(model.get_submodule(path), "config", None) is None:
        path = path.rpartition(".")[0]
    own: Any = model.get_submodule(path).config
    if type(own) is type(model.config):
        return ()
    found = [
        (name,)
        for name, part in config.items()
        if isinstance(part, dict) and part.get("model_type") == own.model_type
    ]
    if len(found) != 1:
        raise PlanError(
            f"axis {fate.name!r} must belong to one config of {type(model).__name__}; "
            f"{len(found)} are of type {own.model_type!r}. Save it with vlprune.save_pretrained."
        )
    return found[0]


def _write_layers(config: dict[str, Any], fates: Sequence[Fate]) -> None:
    """Set the number of layers; lists with an entry a layer lose those of the removed."""
    for fate in fates:
        kept, units = fate.keep, fate.axis.units
        for name, value in list(config.items()):
            if value == units and type(value) is int and _NAMES["layer"].search(name):
                config[name] = len(kept)
            elif isinstance(value, list) and len(value) == units and "layer" in name:
                config[name] = [value[layer] for layer in kept]


def _write_sizes(config: dict[str, Any], kind: str, fates: Sequence[Fate]) -> None:
    if not fates:
        return
    units = fates[0].axis.units
    layers: dict[int, dict[str, int]] = {}
    for fate in fates:
        layers.setdefault(fate.depth, {}).update(_sizes(config, kind, units, len(fate.keep)))
    values = list(layers.values())
    counts = {v for name, v in config.items() if _NAMES["layer"].search(name)}
    if all(value == values[0] for value in values) and len(layers) in counts:
        config.update(values[0])
        return
    per_layer = config.setdefault("per_layer_config", {})
    for layer, sizes in ((layer, sizes) for layer, sizes in layers.items() if sizes):
        per_layer.setdefault(str(layer), {}).update(sizes)


def _sizes(config: Mapping[str, Any], kind: str, units: int, kept: int) -> dict[str, int]:
    """Entries of a config that say how many units of a kind there are, with those kept."""
    if kind == "ffn":
        names = [name for name, v in config.items() if v == units and _NAMES["ffn"].search(name)]
        return dict.fromkeys(names, kept)
    heads, groups = config.get(_HEADS), config.get(_GROUPS)
    if not config.get(_WIDTH) or heads is None:
        return {}  # its heads are as wide as its features divided by their number
    if groups == units:
        return {_HEADS: kept * (heads // groups), _GROUPS: kept}
    return {_HEADS: kept} if heads == units else {}
