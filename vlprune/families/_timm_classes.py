"""Classes that cut timm modules take on. Imported only when a plan needs one."""

from __future__ import annotations

from typing import Any

from timm.layers.attention import Attention
from timm.models.cait import TalkingHeadAttn
from timm.models.vision_transformer import Block
from torch import Tensor
from torch.nn import functional as F


class HeadlessAttention(Attention):  # type: ignore[misc]  # an untyped library
    """An attention that lost all its heads: its output bias."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """[B, T, D] -> [B, T, D]."""
        out: Tensor = self.proj_drop(self.proj(x[..., :0]))
        return out


class SplitAttention(Attention):  # type: ignore[misc]  # an untyped library
    """An attention whose queries and keys have another width than its values."""

    def forward(
        self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        """[B, T, D] -> [B, T, D]."""
        gate = None if self.gate is None else self.gate(x).sigmoid()
        product = self.qkv(x)
        values = self.proj.in_features  # H * E, of values
        scores = (product.shape[-1] - values) // 2
        query, key, value = (
            part.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)  # [B, H, T, E]
            for part in product.split([scores, scores, values], dim=-1)
        )
        mixed = F.scaled_dot_product_attention(
            self.q_norm(query),
            self.k_norm(key),
            value,
            attn_mask=attn_mask,
            dropout_p=self.attn_drop.p if self.training else 0.0,
            is_causal=is_causal,
            scale=self.scale,
        )
        x = self.norm(mixed.transpose(1, 2).flatten(2))
        x = x if gate is None else x * gate
        out: Tensor = self.proj_drop(self.proj(x))
        return out


class PartialBlock(Block):  # type: ignore[misc]  # an untyped library
    """A pre-norm block that lost its attention half, its FFN half, or both (None)."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """[B, T, D] -> [B, T, D]."""
        if self.attn is not None:
            x = x + self.drop_path1(self.ls1(self.attn(self.norm1(x), *args, **kwargs)))
        if self.mlp is not None:
            x = x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))
        return x


class CutTalkingHeadAttn(TalkingHeadAttn):  # type: ignore[misc]  # an untyped library
    """Talking heads that lost some: queries and keys of all heads stay, for they feed every one."""

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, D] -> [B, T, D]; the qkv rows are H queries, H keys and the kept values."""
        width = round(self.scale**-2)  # E
        heads, kept = self.proj_l.in_features, self.proj_w.out_features
        parts = self.qkv(x).split([heads * width, heads * width, kept * width], -1)
        query, key, value = (
            part.unflatten(-1, (-1, width)).transpose(1, 2) for part in parts
        )  # [B, H, T, E]
        scores = (query * self.scale) @ key.transpose(-2, -1)
        weights = self.proj_l(scores.permute(0, 2, 3, 1)).softmax(-2)  # [B, T, S, H]
        weights = self.attn_drop(self.proj_w(weights).permute(0, 3, 1, 2))
        out = (weights @ value).transpose(1, 2).flatten(2)  # [B, T, kept * E]
        mixed: Tensor = self.proj_drop(self.proj(out))
        return mixed
