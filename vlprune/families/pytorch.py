"""`torch.nn.MultiheadAttention`, wherever it stands (open_clip, torchvision, transformers pools).

The plain class cannot hold fewer heads and never calls `out_proj` as a module (pytorch#78109), so
gated and cut instances take on `ExplicitMultiheadAttention`: same parameters, same state-dict
keys, still an `nn.MultiheadAttention`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlprune.layout import AttentionLayout, Family
from vlprune.registry import FAMILIES


class ExplicitMultiheadAttention(nn.MultiheadAttention):
    """`nn.MultiheadAttention` written out: any number of heads, none included.

    Takes the place of the class of an existing instance. With no head left it returns the output
    bias. A mask [batch * heads, target, source] may still have the heads that it was made for.
    `add_zero_attn` is not supported.
    """

    kept_heads: tuple[int, ...]

    def after_swap(self) -> None:
        """Keep `nn.TransformerEncoderLayer` off its fused path, which assumes the full width."""
        self._qkv_same_embed_dim = False
        if "kept_heads" not in vars(self):
            self.kept_heads = tuple(range(self.num_heads))

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """See `nn.MultiheadAttention.forward`."""
        if query.dim() == 2:
            padding = None if key_padding_mask is None else key_padding_mask[None]
            batch = 0 if self.batch_first else 1
            out, weights = self.forward(
                query.unsqueeze(batch),
                key.unsqueeze(batch),
                value.unsqueeze(batch),
                key_padding_mask=padding,
                need_weights=need_weights,
                attn_mask=attn_mask,
                average_attn_weights=average_attn_weights,
                is_causal=is_causal,
            )
            return out.squeeze(batch), None if weights is None else weights[0]
        if not self.batch_first:
            query, key, value = (x.transpose(0, 1) for x in (query, key, value))
        q, k, v = self._project(query, key, value)
        mask = self._mask(q, k, attn_mask, key_padding_mask)
        if need_weights:
            mixed, weights = self._weighted(q, k, v, mask, average_attn_weights)
        else:
            rate = self.dropout if self.training else 0.0
            mixed, weights = self._attend(q, k, v, mask, rate), None
        out = self.out_proj(mixed.transpose(1, 2).flatten(2))  # [B, H, T, E] -> [B, T, H*E]
        return (out if self.batch_first else out.transpose(0, 1)), weights

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, rate: float) -> Tensor:
        if self.num_heads == 0:
            return q  # [B, 0, T, E]
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=rate)

    def _weighted(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, average: bool
    ) -> tuple[Tensor, Tensor]:
        scores = q @ k.transpose(-2, -1) * self.head_dim**-0.5
        weights = (scores if mask is None else scores + mask).softmax(-1)
        weights = F.dropout(weights, self.dropout, self.training)
        shown = weights.sum(1) / max(self.num_heads, 1) if average else weights
        return weights @ v, shown

    def _project(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[B, T, D] each -> [B, H, T, E] each."""
        inputs = (query, key, value)
        packed, bias = self._parameters["in_proj_weight"], self._parameters["in_proj_bias"]
        if packed is not None and query is key and key is value:
            parts = F.linear(query, packed, bias).chunk(3, dim=-1)
        else:
            separate = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
            weights = separate if packed is None else packed.chunk(3)
            biases = (None, None, None) if bias is None else bias.chunk(3)
            parts = tuple(map(F.linear, inputs, weights, biases))
        q, k, v = (
            x.reshape(*x.shape[:2], self.num_heads, self.head_dim).transpose(1, 2) for x in parts
        )
        return q, k, v

    def _mask(
        self, q: Tensor, k: Tensor, attn_mask: Tensor | None, padding: Tensor | None
    ) -> Tensor | None:
        """One additive mask that broadcasts to [B, H, T, S]."""
        masks = [] if attn_mask is None else [_additive(attn_mask, q.dtype)]
        if attn_mask is not None and attn_mask.dim() == 3:  # [B * H, T, S] -> [B, H, T, S]
            masks = [masks[0].reshape(q.shape[0], -1, *masks[0].shape[1:])]
            if masks[0].shape[1] != self.num_heads:
                masks = [masks[0][:, list(self.kept_heads)]]
        if padding is not None:
            masks.append(_additive(padding, q.dtype)[:, None, None, :])
        return sum(masks[1:], start=masks[0]) if masks else None


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    if mask.dtype != torch.bool:
        return mask.to(dtype)
    return torch.zeros_like(mask, dtype=dtype).masked_fill(mask, float("-inf"))


_EXPLICIT = "vlprune.families.pytorch:ExplicitMultiheadAttention"

FAMILIES.register("pytorch")(
    Family(
        attentions=(
            AttentionLayout(
                cls="torch.nn.modules.activation.MultiheadAttention",
                gate=_EXPLICIT,
                cut=_EXPLICIT,
                empty=_EXPLICIT,
                lists=("kept_heads",),
                refuse=(
                    ("bias_k", "a learned key token spans all heads"),
                    ("bias_v", "a learned value token spans all heads"),
                    ("add_zero_attn", "a zero token is added per head"),
                ),
            ),
        ),
    )
)
