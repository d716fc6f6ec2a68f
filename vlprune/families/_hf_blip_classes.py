"""Classes that cut transformers BLIP modules take on. Imported only when a plan needs one."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.models.blip.modeling_blip import BlipAttention, BlipEncoderLayer
from transformers.models.blip.modeling_blip_text import BlipTextLayer, BlipTextSelfAttention


class CutBlipAttention(BlipAttention):  # type: ignore[misc]  # an untyped library
    """Vision attention with any number of heads, of any widths; the stock class reads its input."""

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """[B, T, D] -> [B, T, D] and attention probabilities [B, H, T, T]."""
        product = self.qkv(hidden_states)
        values = self.projection.in_features
        scores = (product.shape[-1] - values) // 2
        query, key, value = (
            part.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)  # [B, H, T, E]
            for part in product.split([scores, scores, values], dim=-1)
        )
        scores = query @ key.transpose(-1, -2) * self.scale
        weights = self.dropout(scores.softmax(-1))
        context = (weights @ value).transpose(1, 2).flatten(2)  # [B, T, H * E]
        return self.projection(context), weights


class HeadlessBlipAttention(BlipAttention):  # type: ignore[misc]  # an untyped library
    """Vision attention that lost all its heads: its output bias."""

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> tuple[Tensor, None]:
        """[B, T, D] -> [B, T, D], no weights."""
        return self.projection(hidden_states[..., :0]), None


class PartialBlipEncoderLayer(BlipEncoderLayer):  # type: ignore[misc]  # an untyped library
    """A vision layer that lost its attention half, its FFN half, or both (None)."""

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        """[B, T, D] -> [B, T, D]."""
        if self.self_attn is not None:
            branch, _ = self.self_attn(hidden_states=self.layer_norm1(hidden_states), **kwargs)
            hidden_states = branch + hidden_states
        if self.mlp is not None:
            hidden_states = self.mlp(self.layer_norm2(hidden_states)) + hidden_states
        return hidden_states


def _hold_place(cache: Any, hidden_states: Tensor, layer: int) -> None:
    """Put one feature per token into the self-attention cache, which counts tokens by layer 0."""
    if cache is not None:
        cache = getattr(cache, "self_attention_cache", cache)
        place = hidden_states[:, None, :, :1]  # [B, 1, T, 1]
        cache.update(place, place, layer)


class HeadlessBlipTextSelfAttention(BlipTextSelfAttention):  # type: ignore[misc]  # an untyped library
    """Text attention that lost all its heads: an empty context."""

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        cache: Any = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        """[B, T, D] -> [B, T, 0], no weights."""
        if encoder_hidden_states is None:
            _hold_place(cache, hidden_states, self.layer_idx)
        return hidden_states[..., :0], None


class PartialBlipTextLayer(BlipTextLayer):  # type: ignore[misc]  # an untyped library
    """A text layer that lost its self-attention, cross-attention or FFN part (None)."""

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        cache: Any = None,
        **kwargs: Any,
    ) -> Tensor:
        """[B, T, D] -> [B, T, D]."""
        if self.attention is not None:
            hidden_states, _ = self.attention(
                hidden_states, attention_mask=attention_mask, cache=cache
            )
        else:
            _hold_place(cache, hidden_states, self.layer_num)
        if encoder_hidden_states is not None and self.crossattention is not None:
            hidden_states, _ = self.crossattention(
                hidden_states,
                attention_mask=encoder_attention_mask,
                encoder_hidden_states=encoder_hidden_states,
                cache=cache,
            )
        if self.output is None:
            return hidden_states
        out: Tensor = self.feed_forward_chunk(hidden_states)
        return out
