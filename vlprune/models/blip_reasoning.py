"""BLIP that judges a statement about two pictures, from transformers' own BLIP towers.

transformers has BLIP for captions, questions and retrieval, and none for reasoning about pairs of
pictures. Imported only where such a model is made or loaded, since it needs transformers.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import BlipConfig
from transformers.modeling_outputs import SequenceClassifierOutput
from transformers.models.blip.modeling_blip import BlipPreTrainedModel, BlipVisionModel
from transformers.models.blip.modeling_blip_text import BlipTextModel


class BlipForVisualReasoning(BlipPreTrainedModel):  # type: ignore[misc]  # an untyped library
    """Says whether a statement about two pictures is true.

    Each picture goes through the vision tower; a learned vector is added that says which of the two
    it is; the text encoder attends to the tokens of both, and a head of two layers reads its first
    token.

    Source:
        BLIP (Li et al., 2022, arXiv 2201.12086, section 5.4, figure 5). There every text layer has
        a cross attention per picture and a layer that merges both; here one attends to both
        pictures' tokens at once, so that the towers are transformers' own.

    Args:
        config: of the towers, as for transformers' BLIP models.
    """

    config: BlipConfig
    config_class = BlipConfig  # else transformers takes the annotation, which is a string here

    def __init__(self, config: BlipConfig):
        super().__init__(config)
        width = config.text_config.hidden_size
        self.vision_model = BlipVisionModel(config.vision_config)
        self.text_encoder = BlipTextModel(config.text_config, add_pooling_layer=False)
        self.picture_embedding = nn.Embedding(2, config.vision_config.hidden_size)
        self.reasoning_head = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 2))
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """Return the word embeddings."""
        embeddings: nn.Module = self.text_encoder.get_input_embeddings()
        return embeddings

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the word embeddings."""
        self.text_encoder.set_input_embeddings(value)

    def forward(
        self,
        input_ids: Tensor,
        pixel_values: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        **kwargs: Any,
    ) -> SequenceClassifierOutput:
        """Return logits [B, 2], false and true, and with labels their cross-entropy.

        Args:
            input_ids: the statements [B, T].
            pixel_values: left and right pictures [B, 2, 3, H, W].
            attention_mask: 0 where a statement is padded [B, T].
            labels: 1 where it is true, else 0 [B].
            kwargs: passed to the towers.
        """
        pictures = self.vision_model(pixel_values.flatten(0, 1), **kwargs).last_hidden_state
        logits = self.judge(pictures.unflatten(0, (-1, 2)), input_ids, attention_mask, **kwargs)
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        return SequenceClassifierOutput(loss=loss, logits=logits)

    def judge(
        self,
        pictures: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """Return logits [B, 2] from the vision tower's tokens of both pictures [B, 2, T, D]."""
        which = torch.arange(2, device=pictures.device)
        both = (pictures + self.picture_embedding(which)[:, None]).flatten(1, 2)  # [B, 2 * T, D]
        text = self.text_encoder(
            input_ids=input_ids,
            attention_mask=attention_mask,
            encoder_hidden_states=both,
            encoder_attention_mask=torch.ones(both.shape[:2], dtype=torch.long, device=both.device),
            **kwargs,
        )
        logits: Tensor = self.reasoning_head(text.last_hidden_state[:, 0])
        return logits
