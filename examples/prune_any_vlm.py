"""Prune a vision-language model that no library and no table of vlprune's knows.

An image encoder, and a text decoder that looks at it, of PyTorch's own layers. What can go is found
by probing the module on example inputs; what cannot be proven is left whole and named.
"""

import torch
from torch import nn

import vlprune


class Captioner(nn.Module):
    """Logits of the next word for pictures [B, 3, 32, 32] and words [B, T]."""

    def __init__(self, width=32, words=60):
        super().__init__()
        options = {"d_model": width, "nhead": 4, "dim_feedforward": 64, "batch_first": True}
        self.patches = nn.Conv2d(3, width, 8, 8)
        self.words = nn.Embedding(words, width)
        self.image_encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(**options), 2)
        self.text_decoder = nn.TransformerDecoder(nn.TransformerDecoderLayer(**options), 2)
        self.head = nn.Linear(width, words)

    def forward(self, image, text):
        """Encode the picture, decode the text on it."""
        seen = self.image_encoder(self.patches(image).flatten(2).transpose(1, 2))
        return self.head(self.text_decoder(self.words(text), seen))


torch.manual_seed(0)
model = Captioner().eval()  # for real weights: your module
inputs = {"image": torch.randn(2, 3, 32, 32), "text": torch.randint(60, (2, 7))}

anatomy = vlprune.dissect(model, inputs)
print("found:", ", ".join(f"{axis.name} ({axis.units})" for axis in anatomy.axes))
for refusal in anatomy.refusals[:3]:
    print("left whole:", refusal.module, "-", refusal.reason)

scores = vlprune.score(model, "magnitude", anatomy=anatomy)
plan = vlprune.plan(scores, {"prunable_params": 0.5}, "isomorphic")
small = vlprune.prune(model, plan, inputs)  # proven on these inputs
print(plan)
print("answers:", tuple(small(**inputs).shape), "as before")
