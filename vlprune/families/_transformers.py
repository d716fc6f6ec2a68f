"""What all transformers families share: building from a config, examples, pre-norm halves."""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor, nn

from vlprune.layout import HalfLayout

PRE_NORM_HALVES = (
    HalfLayout(
        name="attention",
        gate="output",
        module="self_attn",
        scopes=("self_attn", "layer_norm1"),
    ),
    HalfLayout(name="ffn", gate="output", module="mlp", scopes=("mlp", "layer_norm2")),
)


def linear_rows(*projections: str) -> tuple[tuple[str, int], ...]:
    """Return the rows of an attention whose query, key and value are linear layers of their own."""
    return tuple((f"{name}.{tensor}", 1) for name in projections for tensor in ("weight", "bias"))


def describe(model: Any) -> dict[str, Any] | None:
    """Return class name and config, from which `build` makes the model again."""
    return {
        "class": type(model).__name__,
        "config": model.config.to_dict(),
        "attention": model.config._attn_implementation,
    }


def build(arguments: dict[str, Any]) -> nn.Module:
    """Return the class of transformers with this config and random weights, in eval mode.

    Raises:
        LookupError: if transformers has no class of that name.
    """
    transformers = importlib.import_module("transformers")  # lazy: spares transformers
    cls = getattr(transformers, arguments["class"], None)
    if cls is None or not hasattr(cls, "config_class"):
        raise LookupError(
            f"class must be a model of transformers {transformers.__version__}; "
            f"got {arguments['class']!r}."
        )
    config = cls.config_class.from_dict(arguments["config"])
    model: nn.Module = cls._from_config(config, attn_implementation=arguments["attention"])
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
