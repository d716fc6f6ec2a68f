"""Distil a cut CLIP from the uncut one in a loop of accelerate's.

One process or many: `python examples/distil_with_accelerate.py`, or `accelerate launch` it.
"""

import torch
from accelerate import Accelerator

import vlprune
from vlprune.recover.losses import FeatureMSE, InfoNCE, SoftCrossEntropy
from vlprune.tasks import Retrieval
from vlprune.tasks.scenes import loader


def features(model, image, text):
    """Return the features of both towers, of length 1."""
    image, text, *_ = model(image, text)
    return torch.nn.functional.normalize(image, dim=-1), torch.nn.functional.normalize(text, dim=-1)


accelerator = Accelerator()
# For real weights: teacher = open_clip.create_model("ViT-B-32", pretrained="openai"), own pairs
teacher = vlprune.create_model("scenes-clip")
pairs = [(batch["image"], batch["text"]) for batch in loader("train", 256, 1, 64)]
test = Retrieval(loader("test", 200, 1, 100))

scores = vlprune.score(teacher, "taylor", Retrieval(pairs))
student = vlprune.prune(teacher, vlprune.plan(scores, {"prunable_params": 0.3}))  # before wrapping
before = test.measure(student)

optimizer = torch.optim.AdamW(student.parameters(), lr=3e-4)
data = torch.utils.data.DataLoader(pairs, batch_size=None, shuffle=True)
student, optimizer, data = accelerator.prepare(student.train(), optimizer, data)
teacher.to(accelerator.device)
contrast, similar, near = InfoNCE(), SoftCrossEntropy(), FeatureMSE()
for epoch in range(4):
    for image, text in data:
        with torch.no_grad():
            told = features(teacher, image, text)
        mine = features(student, image, text)
        scale = teacher.logit_scale.exp().detach()
        rows, aims = scale * mine[0] @ mine[1].T, scale * told[0] @ told[1].T
        loss = contrast(*mine, scale) + similar((rows, rows.T), (aims, aims.T))
        loss = loss + 100 * near(mine, told)
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
    accelerator.print(f"epoch {epoch}: loss {loss.item():.3f}")

small = accelerator.unwrap_model(student).eval().cpu()
dense = test.measure(teacher.cpu())
after = test.measure(small)
accelerator.print(f"recall mean: dense {dense:.1f}, cut {before:.1f}, distilled {after:.1f}")
