"""Classes that cut transformers CLIP modules take on. Imported only when a plan needs one."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.models.clip.modeling_clip import CLIPAttention, CLIPEncoderLayer


class HeadlessCLIPAttention(CLIPAttention):  # type: ignore[misc]  # an untyped library
    """An attention that lost all its heads: its output bias."""

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        """[B, T, D] -> [B, T, D], no weights."""
        return self.out_proj(hidden_states[..., :0]), None


class PartialCLIPEncoderLayer(CLIPEncoderLayer):  # type: ignore[misc]  # an untyped library
    """A layer that lost its attention half, its FFN half, or both (None)."""

    def forward(self, hidden_states: Tensor, attention_mask: Tensor, **kwargs: Any) -> Tensor:
        """[B, T, D] -> [B, T, D]."""
        if self.self_attn is not None:
            branch, _ = self.self_attn(
                hidden_states=self.layer_norm1(hidden_states),
                attention_mask=attention_mask,
                **kwargs,
            )
            hidden_states = hidden_states + branch
        if self.mlp is not None:
            hidden_states = hidden_states + self.mlp(self.layer_norm2(hidden_states))
        return hidden_states
