"""Scores in a loop of one's own, then training of the cut model in the same loop.

Nothing but PyTorch runs here: a metric listens while the gradients of a loss are made.
"""

import torch
from torch.nn.functional import cross_entropy

import vlprune
from vlprune.tasks import Classification
from vlprune.tasks.scenes import classification_loader

# For real weights: vlprune.create_model("timm:deit_small_patch16_224", pretrained=True)
model = vlprune.create_model("scenes-deit")
batches = [(batch["image"], batch["label"]) for batch in classification_loader("train", 128, 1, 32)]

with vlprune.metrics.Fisher(model) as fisher:
    for images, labels in batches:
        cross_entropy(model(images), labels).backward()  # the mean over the batch
        fisher.update()
        model.zero_grad()
test = Classification(classification_loader("test", 200, 1, 50))
plan = vlprune.plan(fisher.compute(), {"params": 0.6})
small = vlprune.prune(model, plan)
print(f"top-1: dense {test.measure(model):.1f} %, cut {test.measure(small):.1f} %")

optimizer = torch.optim.AdamW(small.parameters(), lr=3e-4)  # after pruning: parameters are new
small.train()
for epoch in range(3):
    losses = []
    for images, labels in batches:
        loss = cross_entropy(small(images), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    print(f"epoch {epoch}: loss {sum(losses) / len(losses):.3f}")
print(f"top-1: trained again {test.measure(small.eval()):.1f} %")
