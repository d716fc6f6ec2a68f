"""A vision transformer whose attention can hold four heads and no other number."""

import torch.nn.functional as F
from torch import Tensor, nn


class Beam(nn.Module):
    """Attention with its sizes written into the code, and a matrix that is never called."""

    def __init__(self) -> None:
        super().__init__()
        self.mirror, self.lens = nn.Linear(24, 72), nn.Linear(24, 24)

    def forward(self, x: Tensor) -> Tensor:
        product = F.linear(x, self.mirror.weight, self.mirror.bias)
        q, k, v = product.reshape(len(x), -1, 3, 4, 6).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v)
        return self.lens(mixed.transpose(1, 2).reshape(len(x), -1, 24))


class Storey(nn.Module):
    """A block."""

    def __init__(self) -> None:
        super().__init__()
        self.dust, self.beam = nn.LayerNorm(24), Beam()
        self.grate, self.fan = (
            nn.LayerNorm(24),
            nn.Sequential(nn.Linear(24, 40), nn.GELU(), nn.Linear(40, 24)),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.beam(self.dust(x))
        return x + self.fan(self.grate(x))


class Lighthouse(nn.Module):
    """Ships [batch, tokens, 24] to logits [batch, 5]."""

    def __init__(self, storeys: int = 3) -> None:
        super().__init__()
        self.storeys = nn.ModuleList([Storey() for _ in range(storeys)])
        self.signal = nn.Linear(24, 5)

    def forward(self, ships: Tensor) -> Tensor:
        for storey in self.storeys:
            ships = storey(ships)
        return self.signal(ships.mean(1))
