"""Prune a CLIP of open_clip: both towers lose heads and neurons to one budget, and are repaired.

Runs offline in seconds on a tiny CLIP with random weights, on random pairs.
"""

import open_clip
import torch

import vlprune
from vlprune.tasks import Retrieval

torch.manual_seed(0)
# For real weights: model = open_clip.create_model("ViT-B-32", pretrained="openai")
model = open_clip.model.CLIP(
    32,
    {"layers": 3, "width": 48, "head_width": 12, "patch_size": 8, "image_size": 32},
    {"context_length": 12, "vocab_size": 99, "width": 32, "heads": 4, "layers": 2},
).eval()
# and your own list or loader of images [B, 3, 224, 224] and token ids [B, 77].
pairs = [(torch.randn(16, 3, 32, 32), torch.randint(1, 99, (16, 12))) for _ in range(4)]
task = Retrieval(pairs)

scores = vlprune.score(model, "reconstruction", task)
plan = vlprune.plan(scores, {"params": 0.6})
small = vlprune.repair(model, plan, task)

print(plan)
print(f"recall mean: dense {task.measure(model):.1f}, repaired {task.measure(small):.1f}")
print(f"parameters: {sum(p.numel() for p in small.parameters()):,}")
print(f"features of an image: {tuple(small.encode_image(pairs[0][0]).shape)}, as before")
