"""What torch-pruning makes of a model by itself: the peer of the benches."""

from __future__ import annotations

import warnings
from typing import Any

import torch
import torch_pruning as tp
from torch import nn

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "qkv")


def cut_(model: nn.Module, example_inputs: Any, importance: Any, share: float) -> nn.Module:
    """Return `model`, of which torch-pruning keeps a share of every layer's heads and neurons.

    Args:
        model: of timm or transformers' CLIP; cut itself. Gradients are there where `importance`
            asks for them.
        example_inputs: as torch-pruning takes them.
        importance: one of torch-pruning's.
        share: to keep.
    """
    heads, ignored = {}, []
    for owner in model.modules():
        for name in PROJECTIONS:
            if hasattr(owner, name):
                heads[getattr(owner, name)] = owner.num_heads
    for name, module in model.named_modules():
        kept = isinstance(module, (nn.Linear, nn.Conv2d, nn.Embedding))
        if kept and module not in heads and not name.endswith("fc1"):
            ignored.append(module)  # its width is that of the residual stream
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pruner = tp.pruner.BasePruner(
            model,
            example_inputs,
            importance=importance,
            pruning_ratio=1 - share,
            num_heads=heads,
            prune_num_heads=True,
            prune_head_dims=False,
            head_pruning_ratio=1 - share,
            ignored_layers=ignored,
            output_transform=lambda out: (
                out
                if isinstance(out, torch.Tensor)
                else [out.logits_per_image, out.logits_per_text]
            ),
        )
        pruner.step()
    for module in model.modules():
        if hasattr(module, "q_proj"):
            module.num_heads = pruner.num_heads[module.q_proj]
            module.embed_dim = module.num_heads * module.head_dim
        if hasattr(module, "qkv"):
            module.num_heads = pruner.num_heads[module.qkv]
            module.attn_dim = module.num_heads * module.head_dim
    return model.eval()
