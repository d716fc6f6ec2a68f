"""The class that a cut `Beam` takes on."""

import torch.nn.functional as F
from torch import Tensor

from lighthouse.model import Beam


class CutBeam(Beam):
    """Any number of heads of six features."""

    def forward(self, x: Tensor) -> Tensor:
        parts = self.mirror(x).unflatten(-1, (3, -1, 6))  # [B, T, 3, H, E]
        query, key, value = parts.permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(query, key, value)
        return self.lens(mixed.transpose(1, 2).flatten(2))
