"""What all transformers families share: building from a config, examples, pre-norm halves."""

from __future__ import annotations

import copy
import importlib
from typing import Any

import torch
from torch import Tensor, nn

from vlprune.layout import HalfLayout, resolve

PRE_NORM_HALVES = (
    HalfLayout(
        name="attention",
        gate="output",
        module="self_attn",
        scopes=("self_attn", "layer_norm1"),
    ),
    HalfLayout(name="ffn", gate="output", module="mlp", scopes=("mlp", "layer_norm2")),
)


def describe(model: Any) -> dict[str, Any] | None:
    """Return class name and config, from which `build` makes the model again."""
    transformers = importlib.import_module("transformers")  # lazy: spares transformers
    cls = type(model)
    known = getattr(transformers, cls.__name__, None) is cls
    described = {
        "class": cls.__name__ if known else f"{cls.__module__}:{cls.__qualname__}",
        "config": plain(model.config.to_dict()),
        "attention": model.config._attn_implementation,
    }
    experts = getattr(model.config, "_experts_implementation", None)
    return described | ({"experts": experts} if experts else {})


def plain(value: Any) -> Any:
    """Return a config's dict with JSON values only; sets become lists."""
    if isinstance(value, dict):
        return {key: plain(entry) for key, entry in value.items()}
    if isinstance(value, (set, frozenset)):
        return sorted(value)
    return [plain(entry) for entry in value] if isinstance(value, (list, tuple)) else value


def build(arguments: dict[str, Any]) -> nn.Module:
    """Return the class of transformers with this config and random weights, in eval mode.

    Raises:
        LookupError: if transformers has no class of that name.
    """
    transformers = importlib.import_module("transformers")  # lazy: spares transformers
    name = arguments["class"]
    cls = resolve(name) if ":" in name else getattr(transformers, name, None)
    if cls is None or not hasattr(cls, "config_class"):
        raise LookupError(
            f"class must be a model of transformers {transformers.__version__}; "
            f"got {arguments['class']!r}."
        )
    config = cls.config_class.from_dict(copy.deepcopy(arguments["config"]))  # it changes its input
    options = {"attn_implementation": arguments["attention"]}
    if "experts" in arguments:
        options["experts_implementation"] = arguments["experts"]
    model: nn.Module = cls._from_config(config, **options)
    return model.eval()


def images(config: Any, batch: int, generator: torch.Generator) -> Tensor:
    """Return noise pixel values [batch, channels, size, size] for a vision config."""
    channels = getattr(config, "num_channels", 3)
    size = config.image_size
    return torch.randn(batch, channels, size, size, generator=generator)


def token_ids(config: Any, batch: int, length: int, generator: torch.Generator) -> Tensor:
    """Return random token ids [batch, length]; the last is the largest id (CLIP pools there)."""
    ids = torch.randint(3, config.vocab_size - 1, (batch, length), generator=generator)
    ids[:, -1] = getattr(config, "eos_token_id", None) or config.vocab_size - 1
    return ids


def create(name: str, pretrained: str | bool = True, **arguments: Any) -> nn.Module:
    """Return the model in a local folder or on the hub, of the class that its config names.

    Args:
        name: a folder or a hub name.
        pretrained: False takes the config only, with random weights.
        arguments: passed to `from_pretrained`.
    """
    transformers = importlib.import_module("transformers")  # lazy: spares transformers
    config = transformers.AutoConfig.from_pretrained(name)
    named = (config.architectures or [None])[0]
    cls = getattr(transformers, named) if named else transformers.AutoModel
    if pretrained:
        model: nn.Module = cls.from_pretrained(name, **arguments)
    else:
        model = cls(config) if named else cls.from_config(config)
    return model.eval()
