"""A vision-language transformer that nobody declared, with names that say nothing.

Grouped keys and values, a packed gate in the feed-forward network, norms over cut features, a
query that pools, a bias that is made once for all layers, and cross attention of another width.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Chorus(nn.Module):
    """Attention: `singers` heads, which share `duos` rows of keys and values."""

    def __init__(self, width: int, source: int, singers: int, duos: int, breath: int):
        super().__init__()
        self.singers, self.duos, self.breath = singers, duos, breath
        self.ask = nn.Linear(width, singers * breath)
        self.offer = nn.Linear(source, 2 * duos * breath)
        self.hush = nn.LayerNorm(singers * breath)
        self.answer = nn.Linear(singers * breath, width)

    def forward(self, x: Tensor, source: Tensor, tilt: Tensor | None = None) -> Tensor:
        b, t, _ = x.shape
        q = self.ask(x).view(b, t, self.singers, self.breath).transpose(1, 2)
        k, v = self.offer(source).chunk(2, dim=-1)
        k, v = (p.view(b, -1, self.duos, self.breath).transpose(1, 2) for p in (k, v))
        k, v = (p.repeat_interleave(self.singers // self.duos, dim=1) for p in (k, v))
        scores = q @ k.transpose(-2, -1) / self.breath**0.5
        if tilt is not None:
            scores = scores + tilt
        mixed = (scores.softmax(-1) @ v).transpose(1, 2).reshape(b, t, -1)
        return self.answer(self.hush(mixed))


class Still(nn.Module):
    """A feed-forward network with its gate packed beside its values."""

    def __init__(self, width: int, steam: int):
        super().__init__()
        self.boil, self.drip = nn.Linear(width, 2 * steam), nn.Linear(steam, width)

    def forward(self, x: Tensor) -> Tensor:
        gate, value = self.boil(x).chunk(2, dim=-1)
        return self.drip(F.silu(gate) * value)


class Floor(nn.Module):
    """A block; the upper ones look across."""

    def __init__(self, width: int, source: int | None, duos: int = 4):
        super().__init__()
        self.rug, self.lamp = nn.LayerNorm(width), nn.LayerNorm(width)
        self.talk = Chorus(width, width, 4, duos, 6)
        self.window = None if source is None else Chorus(width, source, 4, 4, 5)
        self.kitchen = Still(width, 20)

    def forward(self, x: Tensor, tilt: Tensor | None = None, view: Tensor | None = None) -> Tensor:
        rugged = self.rug(x)
        x = x + self.talk(rugged, rugged, tilt)
        if self.window is not None and view is not None:
            x = x + self.window(x, view)
        return x + self.kitchen(self.lamp(x))


class Medley(nn.Module):
    """Heads that are mixed after the softmax: no head's values are its own."""

    def __init__(self, width: int):
        super().__init__()
        self.three, self.blend = nn.Linear(width, 3 * width), nn.Linear(4, 4)
        self.back = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        b, t, d = x.shape
        q, k, v = self.three(x).view(b, t, 3, 4, d // 4).permute(2, 0, 3, 1, 4)
        mixed = ((q @ k.transpose(-2, -1)).softmax(-1) @ v).transpose(1, 2)  # [B, T, H, E]
        mixed = self.blend(mixed.transpose(2, 3)).transpose(2, 3)
        return x + self.back(mixed.reshape(b, t, d))


class House(nn.Module):
    """Pictures [batch, tokens, 24] and words [batch, tokens] to one vector each."""

    def __init__(self) -> None:
        super().__init__()
        self.letters = nn.Embedding(30, 32)
        self.slope = nn.Parameter(torch.randn(4, 7, 7))
        self.cellar = nn.ModuleList([Floor(24, None) for _ in range(3)])
        self.attic = nn.ModuleList([Floor(32, 24, duos=2) for _ in range(2)])
        self.mess = nn.ModuleList([Medley(32)])
        self.door, self.knock = Chorus(32, 32, 4, 4, 8), nn.Parameter(torch.randn(1, 1, 32))

    def forward(self, picture: Tensor, words: Tensor) -> Tensor:
        for floor in self.cellar:
            picture = floor(picture)
        x = self.letters(words)
        for floor in self.attic:
            x = floor(x, tilt=self.slope, view=picture)
        for floor in self.mess:
            x = floor(x)
        return self.door(self.knock.expand(len(x), -1, -1), x)[:, 0]


def inputs() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    picture = torch.randn(2, 5, 24, generator=generator)
    return picture, torch.randint(30, (2, 7), generator=generator)
