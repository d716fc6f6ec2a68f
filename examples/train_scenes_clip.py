"""Trains the small CLIP that ships with the scenes data set, from scratch, on two CPU cores.

Every step sees fresh scenes of the train items, flipped, turned, zoomed, dimmed and partly erased
at random; the loss is CLIP's symmetric InfoNCE. At the end the recalls on 1,000 test scenes are
printed and written beside the weights.
"""

import argparse
import json
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from open_clip.model import CLIP
from torch import Tensor
from torch.nn import functional

from vlprune.tasks.scenes.data import Scenes, normalise
from vlprune.tasks.scenes.layout import paint
from vlprune.tasks.scenes.model import SCENES_CLIP, build_scenes_clip

NUM_TEST_SCENES = 1000
WARMUP_STEPS = 100
MAX_LOGIT_SCALE = math.log(100)


def augment(pixels: Tensor, generator: torch.Generator) -> Tensor:
    """Item pictures `[items, 28, 28]`, 0 to 255, each changed in its own way."""

    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(len(pixels), generator=generator)

    flip = torch.where(uniform(0, 1) < 0.5, -1.0, 1.0)
    angle, zoom_x, zoom_y = uniform(-0.15, 0.15), uniform(0.85, 1.15), uniform(0.85, 1.15)
    rows = [
        [flip * zoom_x * angle.cos(), -zoom_y * angle.sin(), uniform(-0.1, 0.1)],
        [flip * zoom_x * angle.sin(), zoom_y * angle.cos(), uniform(-0.1, 0.1)],
    ]
    matrix = torch.stack([torch.stack(row, dim=-1) for row in rows], dim=1)  # [items, 2, 3]
    grid = functional.affine_grid(matrix, [len(pixels), 1, 28, 28], align_corners=False)
    moved = functional.grid_sample(pixels.unsqueeze(1), grid, align_corners=False).squeeze(1)
    # One item in four loses a rectangle of up to 12 x 12 pixels.
    across = torch.arange(28)
    top, left = uniform(0, 22)[:, None], uniform(0, 22)[:, None]
    height = uniform(-36, 12).clamp(min=0)[:, None]
    rows_gone = (across >= top) & (across < top + height)
    cols_gone = (across >= left) & (across < left + uniform(4, 12)[:, None])
    moved = moved.masked_fill(rows_gone[:, :, None] & cols_gone[:, None, :], 0)
    return (moved * uniform(0.6, 1.3)[:, None, None]).clamp(0, 255)


def train_batches(seed: int, steps: int, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Fresh scenes for every step: images `[B, 3, 96, 96]` and tokens `[B, 32]`."""
    scenes = Scenes("train", steps * batch_size, seed)
    generator = torch.Generator().manual_seed(seed)
    for step in range(steps):
        layout = scenes.layout(range(step * batch_size, (step + 1) * batch_size))
        pixels = scenes.items.images[layout.item[layout.present]].astype(np.float32)
        changed = augment(torch.from_numpy(pixels), generator).to(torch.uint8).numpy()
        captions = [scene.caption for scene in scenes.scenes_of(layout)]
        yield normalise(paint(layout, changed)), scenes.tokenizer.tokenize(captions)


def contrastive_loss(model: CLIP, images: Tensor, tokens: Tensor) -> Tensor:
    """Symmetric InfoNCE over the batch (Radford et al., 2021, arXiv 2103.00020, figure 3)."""
    image_features, text_features, scale = model(images, tokens)
    logits = scale * image_features @ text_features.T
    pairs = torch.arange(len(logits))
    both = functional.cross_entropy(logits, pairs) + functional.cross_entropy(logits.T, pairs)
    return both / 2


def build_optimizer(model: CLIP, weight_decay: float) -> torch.optim.AdamW:
    """AdamW that decays matrices, and neither norms nor biases nor the logit scale."""
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    others = [p for p in model.parameters() if p.ndim < 2]
    groups: list[dict[str, Any]] = [{"params": matrices}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, betas=(0.9, 0.98), weight_decay=weight_decay)


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Linear warm-up, then a cosine down to zero."""
    if step < WARMUP_STEPS:
        return peak * (step + 1) / WARMUP_STEPS
    return peak * (1 + math.cos(math.pi * (step - WARMUP_STEPS) / (steps - WARMUP_STEPS))) / 2


def train(model: CLIP, args: argparse.Namespace) -> float:
    """Trains in place; returns the minutes it took."""
    optimizer = build_optimizer(model, args.weight_decay)
    start = time.perf_counter()
    losses: list[float] = []
    for step, batch in enumerate(train_batches(args.seed, args.steps, args.batch_size)):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, args.steps, args.lr)
        loss = contrastive_loss(model, *batch)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        model.logit_scale.data.clamp_(0, MAX_LOGIT_SCALE)
        losses.append(loss.item())
        minutes = (time.perf_counter() - start) / 60
        if (step + 1) % 50 == 0:
            print(
                f"step {step + 1}: loss {np.mean(losses[-50:]):.3f}, {minutes:.1f} min", flush=True
            )
        if minutes > args.minutes:
            print(f"stopped at step {step + 1} of {args.steps}: {args.minutes} minutes are over")
            break
    return minutes


def recall(scores: Tensor, correct: Tensor, k: int) -> float:
    """Percent of queries (rows) with a correct candidate among the first k; ties count against."""
    best = scores.masked_fill(~correct, -math.inf).amax(dim=1, keepdim=True)
    num_ahead = ((scores >= best) & ~correct).sum(dim=1)
    return 100 * (num_ahead < k).double().mean().item()


@torch.inference_mode()
def evaluate(model: CLIP, count: int = NUM_TEST_SCENES) -> dict[str, float]:
    """Recalls at 1, 5 and 10 on test scenes, both ways, and their mean."""
    scenes = Scenes("test", count, seed=0)
    chunks = [range(start, min(start + 250, count)) for start in range(0, count, 250)]
    pairs = [model(*scenes.batch(chunk))[:2] for chunk in chunks]
    images, texts = (torch.cat(features) for features in zip(*pairs, strict=True))
    caption_ids = torch.from_numpy(np.unique(scenes.captions, return_inverse=True)[1])
    correct = caption_ids[:, None] == caption_ids
    scores = images @ texts.T
    found = {}
    for k in (1, 5, 10):
        found[f"image_to_text_recall@{k}"] = recall(scores, correct, k)
        found[f"text_to_image_recall@{k}"] = recall(scores.T, correct, k)
    return {"recall_mean": sum(found.values()) / len(found), **found}


def parse_args() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=2800)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--lr", type=float, default=2e-3, help="peak learning rate")
    parser.add_argument("--weight-decay", type=float, default=0.05)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--minutes", type=float, default=55, help="stop after so many minutes")
    parser.add_argument("--out", type=Path, default=SCENES_CLIP, help="folder for the weights")
    return parser.parse_args()


def main() -> None:
    """Trains, saves, measures."""
    args = parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    model = build_scenes_clip()
    minutes = train(model, args)
    weights = {name: tensor.half() for name, tensor in model.state_dict().items()}
    args.out.mkdir(parents=True, exist_ok=True)
    safetensors.torch.save_file(weights, args.out / "model.safetensors")
    model.load_state_dict(weights)  # What is measured is what ships: rounded to float16.
    metrics = {"minutes": minutes, **evaluate(model.eval())}
    metrics = {name: round(value, 2) for name, value in metrics.items()}
    (args.out / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")
    print(json.dumps(metrics, indent=2))


if __name__ == "__main__":
    main()
