"""Classes that cut open_clip modules take on. Imported only when a plan needs one."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from open_clip.modified_resnet import AttentionPool2d
from open_clip.transformer import ResidualAttentionBlock, Transformer
from torch import Tensor, nn


def _remember_dtype(module: nn.Module) -> None:
    """Keep an empty buffer that follows `.to(dtype)`: open_clip asks a block for its dtype."""
    first = next((p for p in module.parameters() if p.is_floating_point()), None)
    dtype = torch.get_default_dtype() if first is None else first.dtype
    device = None if first is None else first.device
    module.register_buffer("weight_dtype", torch.empty(0, dtype=dtype, device=device), False)


class PartialResidualAttentionBlock(ResidualAttentionBlock):  # type: ignore[misc]  # an untyped library
    """A block that lost its attention half, its FFN half, or both (None)."""

    def after_swap(self) -> None:
        """Remember the dtype of the weights, before they go."""
        _remember_dtype(self)

    def get_weight_dtype(self) -> torch.dtype:
        """The dtype of the weights that are, or were, here."""
        dtype: torch.dtype = self.weight_dtype.dtype
        return dtype

    def forward(
        self,
        q_x: Tensor,
        k_x: Tensor | None = None,
        v_x: Tensor | None = None,
        attn_mask: Tensor | None = None,
    ) -> Tensor:
        """[B, T, D] -> [B, T, D]."""
        x = q_x
        if self.attn is not None:
            if hasattr(self, "ln_1_kv"):
                k_x, v_x = (None if t is None else self.ln_1_kv(t) for t in (k_x, v_x))
            branch = self.attention(q_x=self.ln_1(x), k_x=k_x, v_x=v_x, attn_mask=attn_mask)
            x = x + self.ls_1(branch)
        if self.mlp is not None:
            x = x + self.ls_2(self.mlp(self.ln_2(x)))
        return x


class EmptyTransformer(Transformer):  # type: ignore[misc]  # an untyped library
    """A transformer that lost all its blocks."""

    def after_swap(self) -> None:
        """Remember the dtype of the weights, before they go."""
        _remember_dtype(self)

    def get_cast_dtype(self) -> torch.dtype:
        """The dtype of the weights that were here."""
        dtype: torch.dtype = self.weight_dtype.dtype
        return dtype


class ExplicitAttentionPool2d(AttentionPool2d):  # type: ignore[misc]  # an untyped library
    """The pool of CLIP's ResNets, written out: any number of heads but none, of any widths."""

    def after_swap(self) -> None:
        """Remember the features per head that the scores are scaled by."""
        if "head_dim" not in vars(self):
            self.head_dim = self.positional_embedding.shape[-1] // self.num_heads

    def forward(self, x: Tensor) -> Tensor:
        """[B, D, height, width] -> [B, output]."""
        x = x.flatten(2).transpose(1, 2)  # [B, T, D]
        x = torch.cat([x.mean(1, keepdim=True), x], dim=1) + self.positional_embedding
        query, key, value = (
            project(part).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)  # [B, H, T, E]
            for project, part in ((self.q_proj, x[:, :1]), (self.k_proj, x), (self.v_proj, x))
        )
        scale = self.head_dim**-0.5 if "head_dim" in vars(self) else None
        mixed = F.scaled_dot_product_attention(query, key, value, scale=scale)
        pooled: Tensor = self.c_proj(mixed.transpose(1, 2).flatten(2)[:, 0])
        return pooled
