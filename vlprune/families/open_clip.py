"""open_clip's CLIP: two towers of `ResidualAttentionBlock` around `nn.MultiheadAttention`.

The attention itself is declared in `pytorch.py`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from vlprune.layout import BlockLayout, Family, HalfLayout
from vlprune.registry import FAMILIES


def example_inputs(model: Any, batch: int) -> tuple[Tensor, Tensor]:
    """Return noise images [batch, 3, height, width] and random token ids [batch, context]."""
    generator = torch.Generator().manual_seed(0)
    size = model.visual.image_size
    height, width = size if isinstance(size, (tuple, list)) else (size, size)
    image = torch.randn(batch, 3, height, width, generator=generator)
    text = torch.randint(1, model.vocab_size, (batch, model.context_length), generator=generator)
    return image, text


def describe(model: Any) -> dict[str, Any] | None:
    """Return the arguments of `open_clip.CLIP` for a plain ViT tower and text transformer."""
    visual, text = model.visual, model.transformer
    plain = type(visual).__name__ == "VisionTransformer" and type(text).__name__ == "Transformer"
    if not plain or not len(text.resblocks) or not len(visual.transformer.resblocks):
        return None
    return {
        "embed_dim": visual.output_dim,
        "quick_gelu": type(text.resblocks[0].mlp.gelu).__name__ == "QuickGELU",
        "vision_cfg": _vision_config(visual),
        "text_cfg": _text_config(model),
    }


def _vision_config(visual: Any) -> dict[str, Any]:
    block = visual.transformer.resblocks[0]
    width = visual.transformer.width
    size, patch = visual.image_size, visual.patch_size
    return {
        "image_size": list(size) if isinstance(size, (tuple, list)) else size,
        "patch_size": patch[0] if isinstance(patch, (tuple, list)) else patch,
        "layers": len(visual.transformer.resblocks),
        "width": width,
        "head_width": width // block.attn.num_heads,
        "mlp_ratio": block.mlp.c_fc.out_features / width,
        "ls_init_value": _layer_scale(block),
        "pool_type": visual.pool_type,
        "final_ln_after_pool": visual.final_ln_after_pool,
        "no_ln_pre": isinstance(visual.ln_pre, nn.Identity),
        "output_tokens": visual.output_tokens,
    }


def _text_config(model: Any) -> dict[str, Any]:
    block = model.transformer.resblocks[0]
    width = model.transformer.width
    return {
        "context_length": model.context_length,
        "vocab_size": model.vocab_size,
        "width": width,
        "heads": block.attn.num_heads,
        "layers": len(model.transformer.resblocks),
        "mlp_ratio": block.mlp.c_fc.out_features / width,
        "ls_init_value": _layer_scale(block),
        "pool_type": model.text_pool_type,
        "eos_id": model.text_eos_id,
        "no_causal_mask": model.attn_mask is None,
        "proj_bias": isinstance(model.text_projection, nn.Linear)
        and model.text_projection.bias is not None,
    }


def _layer_scale(block: Any) -> float | None:
    return None if isinstance(block.ls_1, nn.Identity) else 1e-5


def build(arguments: dict[str, Any]) -> nn.Module:
    """Return `open_clip.CLIP(**arguments)` with random weights, in eval mode."""
    from open_clip.model import CLIP  # lazy: spares open_clip where no such model is used

    model: nn.Module = CLIP(**arguments)
    return model.eval()


def create(name: str, pretrained: str | bool = False, **arguments: Any) -> nn.Module:
    """Return `open_clip.create_model(name, pretrained)` in eval mode; `pretrained` is a tag."""
    import open_clip  # lazy: spares open_clip where no such model is used

    tag = pretrained if isinstance(pretrained, str) else None
    model: nn.Module = open_clip.create_model(name, pretrained=tag, **arguments)
    return model.eval()


FAMILIES.register("open_clip")(
    Family(
        models=("open_clip.model.CLIP",),
        towers=(("visual*", "vision"), ("*", "text")),
        example_inputs=example_inputs,
        describe=describe,
        build=build,
        create=create,
        blocks=(
            BlockLayout(
                cls="open_clip.transformer.ResidualAttentionBlock",
                halves=(
                    HalfLayout(
                        name="attention",
                        gate="output",
                        module="attn",
                        scopes=("attn", "ln_1", "ls_1", "ln_1_kv"),
                    ),
                    HalfLayout(
                        name="ffn", gate="output", module="mlp", scopes=("mlp", "ln_2", "ls_2")
                    ),
                ),
                bypass="vlprune.families._open_clip_classes:PartialResidualAttentionBlock",
                owner_empty="vlprune.families._open_clip_classes:EmptyTransformer",
            ),
        ),
    )
)
