"""transformers' BLIP: fused-qkv vision, BERT-like text with cross attention, a text decoder.

Four models: `BlipModel`, `BlipForImageTextRetrieval`, `BlipForQuestionAnswering`,
`BlipForConditionalGeneration`, and our `BlipForVisualReasoning` of the same towers. Text layers are
post-norm: their halves end in a LayerNorm.
"""

from __future__ import annotations

from typing import Any

import torch

from vlprune.calls import Inputs
from vlprune.families import _transformers
from vlprune.families import _transformers_stock as _stock
from vlprune.layout import AttentionLayout, BlockLayout, Family, HalfLayout
from vlprune.registry import FAMILIES

_MODELING = "transformers.models.blip.modeling_blip"
_TEXT = "transformers.models.blip.modeling_blip_text"
_CLASSES = "vlprune.families._hf_blip_classes"
_REASONING = "vlprune.models.blip_reasoning.BlipForVisualReasoning"


def example_inputs(model: Any, batch: int) -> Inputs:
    """Return pixel values and token ids; for retrieval both heads, for reasoning two pictures."""
    generator = torch.Generator().manual_seed(0)
    config = model.config
    ids = _transformers.token_ids(config.text_config, batch, 8, generator)
    inputs: dict[str, Any] = {
        "pixel_values": _transformers.images(config.vision_config, batch, generator),
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
    }
    kind = type(model).__name__
    if kind == "BlipForImageTextRetrieval":
        return [{**inputs, "use_itm_head": True}, {**inputs, "use_itm_head": False}]
    if kind == "BlipForQuestionAnswering":
        answers = _transformers.token_ids(config.text_config, batch, 5, generator)
        inputs |= {"decoder_input_ids": answers, "decoder_attention_mask": torch.ones_like(answers)}
        inputs["labels"] = answers  # without labels the answer reaches no output
    if kind == "BlipForVisualReasoning":
        right = _transformers.images(config.vision_config, batch, generator)
        inputs["pixel_values"] = torch.stack([inputs["pixel_values"], right], dim=1)
    return [inputs]


FAMILIES.register("hf_blip")(
    Family(
        models=(
            f"{_MODELING}.BlipModel",
            f"{_MODELING}.BlipForImageTextRetrieval",
            f"{_MODELING}.BlipForQuestionAnswering",
            f"{_MODELING}.BlipForConditionalGeneration",
            _REASONING,
        ),
        towers=(
            ("vision_model*", "vision"),
            ("text_decoder*", "decoder"),
            ("*.crossattention*", "fusion"),
            ("*", "text"),
        ),
        example_inputs=example_inputs,
        describe=_transformers.describe,
        build=_transformers.build,
        create=_transformers.create,
        stock=_stock.stock,
        write=_stock.write,
        attentions=(
            AttentionLayout(
                cls=f"{_MODELING}.BlipAttention",
                cut=f"{_CLASSES}:CutBlipAttention",
                dims=f"{_CLASSES}:CutBlipAttention",
                empty=f"{_CLASSES}:HeadlessBlipAttention",
            ),
            AttentionLayout(
                cls=f"{_TEXT}.BlipTextSelfAttention",
                empty=f"{_CLASSES}:HeadlessBlipTextSelfAttention",
            ),
        ),
        blocks=(
            BlockLayout(
                cls=f"{_MODELING}.BlipEncoderLayer",
                halves=_transformers.PRE_NORM_HALVES,
                bypass=f"{_CLASSES}:PartialBlipEncoderLayer",
            ),
            BlockLayout(
                cls=f"{_TEXT}.BlipTextLayer",
                halves=(
                    HalfLayout(
                        name="attention", gate="skip", module="attention", scopes=("attention",)
                    ),
                    HalfLayout(
                        name="cross_attention",
                        gate="skip",
                        module="crossattention",
                        scopes=("crossattention",),
                    ),
                    HalfLayout(
                        name="ffn",
                        gate="skip",
                        module="output",
                        scopes=("output", "intermediate"),
                        argument=1,
                        keyword="input_tensor",
                    ),
                ),
                bypass=f"{_CLASSES}:PartialBlipTextLayer",
            ),
        ),
    )
)
