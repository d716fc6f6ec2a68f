"""`torch.nn.MultiheadAttention`, wherever it stands (open_clip, torchvision, transformers pools).

The plain class cannot hold fewer heads and never calls `out_proj` as a module (pytorch#78109), so
gated and cut instances take on `ExplicitMultiheadAttention`: same parameters, same state-dict
keys, still an `nn.MultiheadAttention`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlprune.layout import AttentionLayout, Family
from vlprune.registry import FAMILIES

ProductHook: TypeAlias = Callable[[Any, Any, Tensor], Tensor]


class _Handle:
    """Removes a hook, and leaves nothing behind."""

    def __init__(self, module: nn.Module, entry: tuple[str, ProductHook]):
        self._module, self._entry = module, entry

    def remove(self) -> None:
        """Remove the hook."""
        hooks: Any = self._module.product_hooks
        hooks.remove(self._entry)
        if not hooks:
            del self._module.product_hooks


class ExplicitMultiheadAttention(nn.MultiheadAttention):
    """`nn.MultiheadAttention` written out: any number of heads, none included, of any widths.

    Takes the place of the class of an existing instance. Heads may have fewer dimensions for
    queries and keys, or for values; the scores are scaled as before. With no head left it returns
    the output bias. A mask [batch * heads, target, source] may still have the heads that it was
    made for. `add_zero_attn` is not supported.
    """

    kept_heads: tuple[int, ...]
    product_hooks: list[tuple[str, ProductHook]]

    def register_product_hook(self, weight: str, hook: ProductHook) -> _Handle:
        """Let `hook` change what is multiplied by the parameter `weight`, biases included."""
        entry = (weight, hook)
        self.__dict__.setdefault("product_hooks", []).append(entry)
        return _Handle(self, entry)

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
            return q.new_zeros(*q.shape[:3], v.shape[-1])  # [B, 0, T, E]
        scale = self.head_dim**-0.5
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=rate, scale=scale)

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
        values = self.out_proj.weight.shape[1]  # H * E, of values
        if packed is not None:
            widths = [(packed.shape[0] - values) // 2] * 2 + [values]
        else:
            widths = [self.q_proj_weight.shape[0], self.k_proj_weight.shape[0], values]
        if packed is not None and query is key and key is value:
            product = self._hooked("in_proj_weight", F.linear(query, packed, bias))
            parts = torch.split(product, widths, dim=-1)
        else:
            separate = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
            weights = separate if packed is None else torch.split(packed, widths)
            biases = (None, None, None) if bias is None else torch.split(bias, widths)
            parts = self._hooked_parts(tuple(map(F.linear, inputs, weights, biases)), widths)
        q, k, v = (
            x.reshape(*x.shape[:2], self.num_heads, x.shape[2] // max(self.num_heads, 1))
            for x in parts
        )  # [B, T, H, E]
        return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)

    def _hooked(self, weight: str, product: Tensor) -> Tensor:
        for name, hook in vars(self).get("product_hooks", ()):
            if name == weight:
                product = hook(self, None, product)
        return product

    def _hooked_parts(self, parts: tuple[Tensor, ...], widths: Sequence[int]) -> tuple[Tensor, ...]:
        """Products of three inputs through the hooks; those of a packed matrix see all its rows."""
        if "product_hooks" not in vars(self):
            return parts
        if self._parameters["in_proj_weight"] is None:
            names = ("q_proj_weight", "k_proj_weight", "v_proj_weight")
            return tuple(map(self._hooked, names, parts))
        hooked = []
        for place, part in enumerate(parts):
            before, after = sum(widths[:place]), sum(widths[place + 1 :])
            whole = self._hooked("in_proj_weight", F.pad(part, (before, after)))
            hooked.append(whole[..., before : before + widths[place]])
        return tuple(hooked)

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
                dims=_EXPLICIT,
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
