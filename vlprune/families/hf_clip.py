"""transformers' CLIP: separate q, k and v projections; heads are read off the tensors."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vlprune.families import _transformers
from vlprune.families import _transformers_stock as _stock
from vlprune.layout import AttentionLayout, BlockLayout, Family
from vlprune.registry import FAMILIES


def example_inputs(model: Any, batch: int) -> dict[str, Tensor]:
    """Return pixel values [batch, 3, size, size] and token ids [batch, positions]."""
    generator = torch.Generator().manual_seed(0)
    text = model.config.text_config
    length = min(16, text.max_position_embeddings)
    return {
        "input_ids": _transformers.token_ids(text, batch, length, generator),
        "pixel_values": _transformers.images(model.config.vision_config, batch, generator),
    }


FAMILIES.register("hf_clip")(
    Family(
        models=("transformers.models.clip.modeling_clip.CLIPModel",),
        towers=(("vision_model*", "vision"), ("*", "text")),
        example_inputs=example_inputs,
        describe=_transformers.describe,
        build=_transformers.build,
        create=_transformers.create,
        stock=_stock.stock,
        write=_stock.write,
        attentions=(
            AttentionLayout(
                cls="transformers.models.clip.modeling_clip.CLIPAttention",
                empty="vlprune.families._hf_clip_classes:HeadlessCLIPAttention",
            ),
        ),
        blocks=(
            BlockLayout(
                cls="transformers.models.clip.modeling_clip.CLIPEncoderLayer",
                halves=_transformers.PRE_NORM_HALVES,
                bypass="vlprune.families._hf_clip_classes:PartialCLIPEncoderLayer",
            ),
        ),
    )
)
