"""open_clip: every model config that ships with it, with small sizes and its own flags."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vlprune.zoo.entries import Entry

WIDTH = 32  # of the joint embedding
VISION = {"layers": 3, "width": 64, "head_width": 16, "image_size": 32, "patch_size": 8}
TEXT = {"layers": 2, "width": 48, "heads": 4, "vocab_size": 100, "context_length": 12}

PLAIN_TRUNK = {"embed_dim": 64, "depth": 2, "num_heads": 4}
TRUNKS: dict[str, dict[str, Any]] = {  # how the timm towers are made small, by name
    "swin": {"embed_dim": 32, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4},
    "vitamin": {"depth": 2},
    "vit_base_mci": {"depth": 2},
    "convnext": {"depths": [1, 1, 2, 1], "dims": [16, 32, 48, 64]},
    "fastvit_mci3": {"layers": [1, 1, 1, 1, 1], "embed_dims": [16, 16, 32, 64, 64]},
    "fastvit_mci4": {"layers": [1, 1, 1, 1, 1], "embed_dims": [16, 16, 32, 64, 64]},
    "fastvit": {"layers": [1, 1, 1, 1], "embed_dims": [16, 32, 64, 64]},
}

BERT = {
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 100,
    "max_position_embeddings": 20,
    "pad_token_id": 1,
}
HF_CONFIGS: dict[str, dict[str, Any]] = {  # small text towers of the same architectures
    "roberta": {"model_type": "roberta", **BERT},
    "xlm-roberta": {"model_type": "xlm-roberta", **BERT},
    "mt5": {
        "model_type": "mt5",
        "architectures": ["MT5ForConditionalGeneration"],
        "d_model": 48,
        "d_kv": 12,
        "d_ff": 80,
        "num_layers": 2,
        "num_heads": 4,
        "vocab_size": 100,
        "feed_forward_proj": "gated-gelu",
        "pad_token_id": 0,
    },
    "nllb": {
        "model_type": "m2m_100",
        "d_model": 48,
        "encoder_layers": 2,
        "decoder_layers": 2,
        "encoder_attention_heads": 4,
        "decoder_attention_heads": 4,
        "encoder_ffn_dim": 80,
        "decoder_ffn_dim": 80,
        "vocab_size": 100,
        "max_position_embeddings": 20,
        "pad_token_id": 1,
    },
}


def entries() -> Iterator[Entry]:
    """Yield an entry for every config that open_clip lists."""
    import open_clip  # lazy: spares open_clip where no such model is used

    for name in open_clip.list_models():
        config = open_clip.get_model_config(name)
        yield Entry(
            name=f"open_clip/{name}",
            family="open_clip",
            arguments=_small(config),
            group=_group(config),
        )


def left_out() -> dict[str, str]:
    """Return the configs that have no entry, and why: none."""
    return {}


def _group(config: dict[str, Any]) -> str:
    vision, text = config["vision_cfg"], config["text_cfg"]
    if "hf_model_name" in text:
        return "hf text"
    if "multimodal_cfg" in config:
        return "coca"
    if "timm_model_name" in vision:
        return f"timm {vision['timm_model_name'].partition('_')[0]}"
    return "resnet" if isinstance(vision["layers"], list) else "vit"


def _small(config: dict[str, Any]) -> dict[str, Any]:
    config = json.loads(json.dumps(config))  # a copy of its own
    vision, text = config["vision_cfg"], config["text_cfg"]
    custom = config.pop("custom_text", False) or "hf_model_name" in text
    arguments = {**config, "class": "CustomTextCLIP" if custom else "CLIP", "embed_dim": WIDTH}
    if "multimodal_cfg" in config:
        arguments["class"] = "CoCa"
        arguments["multimodal_cfg"] = {**config["multimodal_cfg"], **_small_text(TEXT)}
        arguments["multimodal_cfg"].update(width=48, heads=4, layers=2, context_length=12)
        arguments["embed_dim"] = 48  # its decoder attends to image tokens of its own width
    arguments["vision_cfg"] = _small_vision(vision, arguments)
    if "multimodal_cfg" in config:
        arguments["vision_cfg"].update(width=48, head_width=12, attn_pooler_queries=8)
    arguments["text_cfg"] = {**text, **_small_text(text)}
    if "hf_model_name" in text:
        kind = next(k for k in HF_CONFIGS if Path(text["hf_model_name"]).name.startswith(k))
        arguments["hf_config"] = HF_CONFIGS[kind]
        arguments["text_cfg"]["hf_model_pretrained"] = False
    return arguments


def _small_text(text: dict[str, Any]) -> dict[str, Any]:
    sizes = {key: value for key, value in TEXT.items() if key in text}
    if "eos_id" in text:
        sizes["eos_id"] = 2
    return sizes


def _small_vision(vision: dict[str, Any], arguments: dict[str, Any]) -> dict[str, Any]:
    if "timm_model_name" in vision:
        name = vision["timm_model_name"]
        found = next((size for start, size in TRUNKS.items() if name.startswith(start)), None)
        sizes = dict(PLAIN_TRUNK if found is None else found)
        if not name.startswith(("convnext", "fastvit")):
            sizes["img_size"] = 56 if "patch14" in name else 128 if "patch32" in name else 64
        arguments["timm_arguments"] = sizes
        image = sizes.get("img_size", 64)
        return {**vision, "timm_model_pretrained": False, "image_size": image}
    if isinstance(vision["layers"], list):
        return {**vision, "layers": [1, 1, 1, 1], "width": 16, "image_size": 64}
    pooler = {"attn_pooler_heads": 4} if "attn_pooler_heads" in vision else {}
    return {**vision, **VISION, **pooler}
