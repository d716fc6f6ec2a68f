"""timm vision transformers (ViT, DeiT): `Attention` with a fused qkv, pre-norm `Block`.

timm's `Attention` computes with fewer heads once `num_heads` and `attn_dim` follow; only an
attention without any head takes on a class of ours.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from vlprune.layout import AttentionLayout, BlockLayout, Family, HalfLayout
from vlprune.registry import FAMILIES


def example_inputs(model: Any, batch: int) -> tuple[Tensor]:
    """Return noise images [batch, channels, height, width] of the size that the model takes."""
    size, channels = model.patch_embed.img_size, model.patch_embed.proj.in_channels
    return (torch.randn(batch, channels, *size, generator=torch.Generator().manual_seed(0)),)


def describe(model: Any) -> dict[str, Any] | None:
    """Return architecture name and sizes, where timm wrote the name into the model."""
    name = (getattr(model, "pretrained_cfg", None) or {}).get("architecture")
    if name is None or not len(model.blocks):
        return None
    block = model.blocks[0]
    return {
        "name": name,
        "arguments": {
            "num_classes": model.num_classes,
            "img_size": list(model.patch_embed.img_size),
            "embed_dim": model.embed_dim,
            "depth": len(model.blocks),
            "num_heads": block.attn.num_heads,
            "mlp_ratio": block.mlp.fc1.out_features / model.embed_dim,
        },
    }


def build(arguments: dict[str, Any]) -> nn.Module:
    """Return the described model with random weights."""
    return create(arguments["name"], **arguments["arguments"])


def create(name: str, pretrained: str | bool = False, **arguments: Any) -> nn.Module:
    """Return `timm.create_model(name, ...)` in eval mode."""
    import timm  # lazy: spares timm where no timm model is used

    model: nn.Module = timm.create_model(name, pretrained=bool(pretrained), **arguments)
    return model.eval()


FAMILIES.register("timm")(
    Family(
        models=("timm.models.vision_transformer.VisionTransformer",),
        towers=(("*", "vision"),),
        example_inputs=example_inputs,
        describe=describe,
        build=build,
        create=create,
        attentions=(
            AttentionLayout(
                cls="timm.layers.attention.Attention",
                heads="num_heads",
                head_dim="head_dim",
                rows=(("qkv.weight", 3), ("qkv.bias", 3), ("gate.weight", 1), ("gate.bias", 1)),
                out="proj",
                knobs=(("num_heads", 1), ("attn_dim", "head_dim")),
                empty="vlprune.families._timm_classes:HeadlessAttention",
                refuse=(("norm", "a norm over all heads would change its statistics"),),
            ),
        ),
        blocks=(
            BlockLayout(
                cls="timm.models.vision_transformer.Block",
                halves=(
                    HalfLayout(
                        name="attention",
                        gate="output",
                        module="attn",
                        scopes=("attn", "norm1", "ls1", "drop_path1"),
                    ),
                    HalfLayout(
                        name="ffn",
                        gate="output",
                        module="mlp",
                        scopes=("mlp", "norm2", "ls2", "drop_path2"),
                    ),
                ),
                bypass="vlprune.families._timm_classes:PartialBlock",
            ),
        ),
    )
)
