"""Tiny random models of every family, a second each, without a download.

Weights are re-drawn so that a wrong cut shows: libraries start biases and tables at zero.
"""

from collections.abc import Callable

import open_clip.model
import timm
import torch
import transformers
from torch import nn

from vlprune.models.blip_reasoning import BlipForVisualReasoning
from vlprune.models.segmenter import Segmenter

VISION = {"num_attention_heads": 4, "num_hidden_layers": 3, "image_size": 32, "patch_size": 8}
TEXT = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "vocab_size": 60,
    "max_position_embeddings": 24,
}


def open_clip_clip(**vision: object) -> nn.Module:
    return open_clip.model.CLIP(
        32,
        {"layers": 3, "width": 32, "head_width": 8, "patch_size": 8, "image_size": 32, **vision},
        {"context_length": 12, "vocab_size": 50, "width": 32, "heads": 4, "layers": 2},
    )


def deit(**arguments: object) -> nn.Module:
    options = {"img_size": 32, "embed_dim": 48, "depth": 3, "num_heads": 3, "num_classes": 10}
    return timm.create_model("deit_tiny_patch16_224", **{**options, **arguments})


def segmenter() -> nn.Module:
    backbone = deit(num_classes=0)
    return Segmenter(backbone, 5, decoder_width=32, decoder_depth=2, decoder_heads=4)


def hf_clip() -> nn.Module:
    return transformers.CLIPModel(
        transformers.CLIPConfig(
            text_config={**TEXT, "eos_token_id": 59},
            vision_config={**VISION, "hidden_size": 40, "intermediate_size": 56},
            projection_dim=24,
        )
    )


def blip(name: str) -> nn.Module:
    # the answer decoder attends to the question encoder: their widths are one
    width = 32 if name == "BlipForQuestionAnswering" else 40
    cls = getattr(transformers, name, BlipForVisualReasoning)
    return cls(
        transformers.BlipConfig(
            text_config={
                **TEXT,
                "encoder_hidden_size": width,
                "projection_dim": 24,
                "bos_token_id": 57,
                "sep_token_id": 58,
                "eos_token_id": 2,
                "pad_token_id": 0,
            },
            vision_config={**VISION, "hidden_size": width, "intermediate_size": 56},
            projection_dim=24,
            image_text_hidden_size=24,
        )
    )


MAKERS: dict[str, Callable[[], nn.Module]] = {
    "open_clip": open_clip_clip,
    "deit": deit,
    "segmenter": segmenter,
    "hf_clip": hf_clip,
    "BlipModel": lambda: blip("BlipModel"),
    "BlipForImageTextRetrieval": lambda: blip("BlipForImageTextRetrieval"),
    "BlipForQuestionAnswering": lambda: blip("BlipForQuestionAnswering"),
    "BlipForConditionalGeneration": lambda: blip("BlipForConditionalGeneration"),
    "BlipForVisualReasoning": lambda: blip("BlipForVisualReasoning"),
}


def make(name: str, seed: int = 0) -> nn.Module:
    """Return the model called `name` in eval mode with drawn weights."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return redraw(MAKERS[name](), seed).eval()


@torch.no_grad()
def redraw(model: nn.Module, seed: int = 0) -> nn.Module:
    """Draw matrices from N(0, 1 / fan_in) and shift vectors, biases and norms by N(0, 0.3)."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.dim() > 1:
            parameter.copy_(noise / parameter.shape[-1] ** 0.5)
        else:
            parameter.add_(0.3 * noise)
    return model
