"""Any model of transformers: example inputs by rule, towers by name, building from a config."""

from __future__ import annotations

from typing import Any

from vlprune.calls import Inputs
from vlprune.families import _transformers, _transformers_inputs
from vlprune.families import _transformers_stock as _stock
from vlprune.layout import Family
from vlprune.registry import FAMILIES


def example_inputs(model: Any, batch: int) -> Inputs:
    """Return keyword arguments for the model's forward: noise images, random ids, full masks."""
    return _transformers_inputs.make_inputs(model, batch)


# the first pattern that matches wins, so a tower may come twice
_TOWERS = (
    ("decoder", ("text_decoder*", "*language_model.decoder*")),
    (
        "fusion",
        (
            "*crossattention*",
            "*cross_attn*",
            "*cross_attention*",
            "*cross_modal*",
            "*encoder_attn*",
            "*encoder_decoder_attention*",
            "*multimodal_model*",
            "*x_layers*",
            "*qformer*",
            "*perceiver*",
            "*resampler*",
            "*projector*",
            "*connector*",
            "*aligner*",
            "*prompts_generator*",
            "vilt.*",
            "visual_bert.*",
        ),
    ),
    ("text", ("*language_model*", "*text_*")),
    (
        "vision",
        (
            "*vision*",
            "*visual*",
            "*image_*",
            "*video_*",
            "*vqmodel*",
            "*backbone*",
            "*pixel_level_module*",
            "*r_layers*",
            "encoder.encoder.*",
            "vit.*",
            "deit.*",
            "beit.*",
            "dinov2.*",
            "model.layer.*",
            "swin*",
            "segformer.*",
        ),
    ),
    ("decoder", ("decoder.*", "*.decoder.*", "*.dit.*", "*transformer_module*", "decode_head*")),
    ("text", ("*",)),
)

FAMILIES.register("transformers")(
    Family(
        models=("transformers.modeling_utils.PreTrainedModel",),
        towers=tuple((pattern, tower) for tower, patterns in _TOWERS for pattern in patterns),
        example_inputs=example_inputs,
        describe=_transformers.describe,
        build=_transformers.build,
        create=_transformers.create,
        stock=_stock.stock,
        write=_stock.write,
    )
)
