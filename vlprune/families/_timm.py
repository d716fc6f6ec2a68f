"""timm's models: example inputs, the arguments that make one again, and making it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vlprune.families._sizes import exact_ratio, first_rows
from vlprune.history import Fate


def example_inputs(model: Any, batch: int) -> tuple[Tensor]:
    """Return noise images [batch, channels, height, width] of the size that the model takes.

    A model that takes any size gets what it was made for, 256 at most.
    """
    config = getattr(model, "pretrained_cfg", None) or {}
    channels, *default = config.get("input_size") or (3, 224, 224)
    size = getattr(getattr(model, "patch_embed", None), "img_size", None)
    if size is None:
        fixed = config.get("fixed_input_size", False)
        size = default if fixed else [min(side, 256) for side in default]
    height, width = list(size) if isinstance(size, (list, tuple)) else [size, size]
    generator = torch.Generator().manual_seed(0)
    return (torch.randn(batch, channels, height, width, generator=generator),)


def describe(model: Any) -> dict[str, Any] | None:
    """Return architecture name and sizes, where timm wrote the name into the model."""
    name = (getattr(model, "pretrained_cfg", None) or {}).get("architecture")
    blocks: Any = getattr(model, "blocks", ())
    plain = type(model).__name__ == "VisionTransformer" and len(blocks) > 0
    block: Any = blocks[0] if plain else None
    if name is None or not hasattr(getattr(block, "mlp", None), "fc1"):
        return None
    return {
        "name": name,
        "arguments": {
            "num_classes": model.num_classes,
            "img_size": list(model.patch_embed.img_size),
            "embed_dim": model.embed_dim,
            "depth": len(model.blocks),
            "num_heads": block.attn.num_heads,
            "mlp_ratio": exact_ratio(block.mlp.fc1.out_features, model.embed_dim),
        },
    }


def build(arguments: dict[str, Any]) -> nn.Module:
    """Return the described model with random weights."""
    return create(arguments["name"], **arguments["arguments"])


def create(name: str, pretrained: str | bool = False, **arguments: Any) -> nn.Module:
    """Return `timm.create_model(name, ...)` in eval mode."""
    import timm  # lazy: spares timm where no timm model is used

    size = arguments.get("img_size")
    if size is not None and "pretrained_cfg_overlay" not in arguments:
        height, width = size if isinstance(size, (list, tuple)) else (size, size)
        arguments["pretrained_cfg_overlay"] = {"input_size": (3, height, width)}
    model: nn.Module = timm.create_model(name, pretrained=bool(pretrained), **arguments)
    return model.eval()


def stock(model: Any, fates: Mapping[str, Fate], arguments: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of a VisionTransformer with the depth and neurons of a cut one."""
    changed = dict(arguments["arguments"])
    neurons = first_rows(model.blocks, "mlp.fc1")
    changed["depth"] = len(model.blocks)
    if neurons is not None:
        changed["mlp_ratio"] = exact_ratio(neurons, model.embed_dim)
    return {**arguments, "arguments": changed}


def write(model: Any, arguments: dict[str, Any], folder: Path) -> str:
    """Write config.json and model.safetensors as `timm.create_model` reads a local folder."""
    from timm.models import save_for_hf  # lazy: spares timm where no timm model is used

    save_for_hf(model, str(folder), model_args=arguments["arguments"], safe_serialization=True)
    return 'timm.create_model("local-dir:FOLDER", pretrained=True)'
