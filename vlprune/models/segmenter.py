"""Segmenter: a timm vision transformer and a mask transformer that classifies every pixel.

Strudel et al., 2021, arXiv 2105.05633. Blocks of both are timm's `Block`, so that whatever prunes a
timm model prunes this one. Imports timm: only what builds a Segmenter imports this file.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn


class MaskDecoder(nn.Module):
    """Patches and one learned token per class, attending to each other (section 3.2).

    Args:
        patch_width: width of the patch tokens that come in.
        num_classes: C.
        width: D of the decoder.
        depth: number of blocks.
        num_heads: of every block.
        mlp_ratio: width of a block's FFN over D.
    """

    def __init__(
        self,
        patch_width: int,
        num_classes: int,
        *,
        width: int,
        depth: int = 2,
        num_heads: int = 6,
        mlp_ratio: float = 4.0,
    ):
        super().__init__()
        self.projection = nn.Linear(patch_width, width)
        self.class_tokens = nn.Parameter(torch.empty(1, num_classes, width))
        self.blocks = nn.Sequential(
            *(Block(width, num_heads, mlp_ratio=mlp_ratio, qkv_bias=True) for _ in range(depth))
        )
        self.norm = nn.LayerNorm(width)
        self.patch_projection = nn.Linear(width, width, bias=False)
        self.class_projection = nn.Linear(width, width, bias=False)
        self.mask_norm = nn.LayerNorm(num_classes)
        self.apply(_init_linear)
        nn.init.trunc_normal_(self.class_tokens, std=0.02)
        for projection in (self.patch_projection, self.class_projection):
            nn.init.normal_(projection.weight, std=width**-0.5)

    def forward(self, patches: Tensor) -> Tensor:
        """Patch tokens [B, T, patch width] -> class scores of every patch [B, T, C]."""
        count = patches.shape[1]
        tokens = self.class_tokens.expand(len(patches), -1, -1)
        x = torch.cat([self.projection(patches), tokens], dim=1)  # [B, T + C, D]
        x = self.norm(self.blocks(x))
        patches = F.normalize(self.patch_projection(x[:, :count]), dim=-1)
        classes = F.normalize(self.class_projection(x[:, count:]), dim=-1)
        masks: Tensor = self.mask_norm(patches @ classes.transpose(1, 2))
        return masks


class Segmenter(nn.Module):
    """Class scores of every pixel.

    Args:
        backbone: a timm vision transformer; its head is not used, so make it with num_classes=0.
        num_classes: C.
        decoder_width: D of the decoder; default: the backbone's.
        decoder_depth: number of its blocks.
        decoder_heads: of its blocks.
        decoder_mlp_ratio: width of their FFNs over D.

    Example:
        >>> import timm
        >>> vit = timm.create_model("deit_tiny_patch16_224", img_size=32, depth=1, num_classes=0)
        >>> Segmenter(vit, num_classes=5, decoder_heads=3)(torch.zeros(1, 3, 32, 32)).shape
        torch.Size([1, 5, 32, 32])
    """

    def __init__(
        self,
        backbone: VisionTransformer,
        num_classes: int,
        *,
        decoder_width: int | None = None,
        decoder_depth: int = 2,
        decoder_heads: int = 6,
        decoder_mlp_ratio: float = 4.0,
    ):
        super().__init__()
        self.arguments = {  # what it was made with besides its backbone, whatever is cut later
            "num_classes": num_classes,
            "decoder_width": decoder_width or backbone.embed_dim,
            "decoder_depth": decoder_depth,
            "decoder_heads": decoder_heads,
            "decoder_mlp_ratio": decoder_mlp_ratio,
        }
        self.backbone = backbone
        self.decoder = MaskDecoder(
            backbone.embed_dim,
            num_classes,
            width=decoder_width or backbone.embed_dim,
            depth=decoder_depth,
            num_heads=decoder_heads,
            mlp_ratio=decoder_mlp_ratio,
        )

    def forward(self, image: Tensor) -> Tensor:
        """Images [B, 3, H, W] -> class scores before the softmax [B, C, H, W]."""
        height, width = image.shape[-2:]
        rows, cols = self.backbone.patch_embed.dynamic_feat_size((height, width))
        tokens = self.backbone.forward_features(image)[:, self.backbone.num_prefix_tokens :]
        masks = self.decoder(tokens)
        masks = masks.transpose(1, 2).unflatten(-1, (rows, cols))  # [B, T, C] -> [B, C, h, w]
        return F.interpolate(masks, (height, width), mode="bilinear", align_corners=False)


def _init_linear(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
