"""Classes that cut timm modules take on. Imported only when a plan needs one."""

from __future__ import annotations

from typing import Any

from timm.layers.attention import Attention
from timm.models.vision_transformer import Block
from torch import Tensor


class HeadlessAttention(Attention):  # type: ignore[misc]  # an untyped library
    """An attention that lost all its heads: its output bias."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """[B, T, D] -> [B, T, D]."""
        out: Tensor = self.proj_drop(self.proj(x[..., :0]))
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
