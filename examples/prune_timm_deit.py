"""Prune a DeiT of timm: heads and neurons in one ranking, saved and loaded again bit-equal.

Runs offline in seconds on the small DeiT that ships, trained on scenes (72 classes).
"""

import tempfile

import torch

import vlprune
from vlprune.tasks import Classification
from vlprune.tasks.scenes import classification_loader

# For real weights: model = timm.create_model("deit_small_patch16_224", pretrained=True)
model = vlprune.create_model("scenes-deit")
# and your own lists or loaders of images [B, 3, 224, 224] and labels [B].
train = Classification(classification_loader("train", 256, 1, 64))
test = Classification(classification_loader("test", 256, 1, 64))

small = vlprune.compress(model, train, {"params": 0.6})

print(f"top-1: dense {test.measure(model):.1f} %, cut and repaired {test.measure(small):.1f} %")
dense_params, params = (sum(p.numel() for p in m.parameters()) for m in (model, small))
print(f"parameters: {dense_params:,} -> {params:,}")
print("heads by layer:", [block.attn.num_heads for block in small.blocks])
with tempfile.TemporaryDirectory() as folder:
    vlprune.save_pretrained(small, f"{folder}/deit")
    loaded = vlprune.from_pretrained(f"{folder}/deit")
images = next(iter(test.batches()))[0]
print("loaded again, equal:", torch.equal(small(images), loaded(images)))
