"""Trains the small CLIP that ships with the scenes data set, from scratch, on two CPU cores.

Every step sees fresh scenes of the train items, flipped, turned, zoomed, dimmed and partly erased
at random; every eight of a batch share their classes, so that places must be learned too. The loss
is CLIP's symmetric InfoNCE. At the end the recalls on 1,000 test scenes are printed and written
beside the weights.
"""

import argparse
import json
import math
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from numpy.typing import NDArray
from open_clip.model import CLIP
from torch import Tensor
from torch.nn import functional

from vlprune.tasks.retrieval import Retrieval
from vlprune.tasks.scenes.data import Scenes, loader, normalise
from vlprune.tasks.scenes.layout import Layout, paint
from vlprune.tasks.scenes.model import SCENES_CLIP, build_scenes_clip

NUM_TEST_SCENES = 1000
WARMUP_STEPS = 100
GROUP_SIZE = 8
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


def share_classes(layout: Layout, labels: NDArray[np.uint8], rng: np.random.Generator) -> Layout:
    """The same cells, but every eight scenes in a row show the same classes, shuffled over them.

    Without such neighbours a batch is told apart by its classes alone, and neither tower ever
    learns the places.
    """
    num_scenes, num_slots = layout.cell.shape
    leader = np.arange(num_scenes) // GROUP_SIZE * GROUP_SIZE
    present = layout.present[leader]
    slots = np.arange(num_slots)
    # Present objects come first, in reading order; only they are shuffled.
    order = np.argsort(np.where(present, layout.cell, 9 + slots), axis=1)
    shuffle = np.argsort(np.where(present, rng.random(present.shape), 1 + slots), axis=1)
    shared = np.take_along_axis(labels[layout.item[leader]], shuffle, axis=1)
    of_class = np.stack([np.flatnonzero(labels == label) for label in np.unique(labels)])
    item = of_class[shared, rng.integers(of_class.shape[1], size=shared.shape)]
    cell = np.take_along_axis(layout.cell, order, axis=1)
    return replace(layout, present=present, cell=cell, item=item)


def train_batches(seed: int, steps: int, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Fresh scenes for every step: images `[B, 3, 96, 96]` and tokens `[B, 32]`."""
    scenes = Scenes("train", steps * batch_size, seed)
    generator = torch.Generator().manual_seed(seed)
    rng = np.random.default_rng(seed)
    for step in range(steps):
        drawn = scenes.layout(range(step * batch_size, (step + 1) * batch_size))
        layout = share_classes(drawn, scenes.items.labels, rng)
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


def widen_positions(model: CLIP) -> None:
    """Start positions and words as large as what patches bring.

    At open_clip's 0.01 to 0.1, beside bright patches, neither tower learnt places in 2,800 steps.
    """
    torch.nn.init.normal_(model.visual.positional_embedding, std=1.0)
    torch.nn.init.normal_(model.positional_embedding, std=0.1)
    torch.nn.init.normal_(model.token_embedding.weight, std=0.1)


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


def evaluate(model: CLIP) -> dict[str, float]:
    """Recalls at 1, 5 and 10 on test scenes, both ways, and their mean, in percent."""
    found = Retrieval(loader("test", NUM_TEST_SCENES, 0, 250)).recall(model)
    recalls = {f"image_to_text_recall@{k}": value for k, value in found.text.items()}
    recalls |= {f"text_to_image_recall@{k}": value for k, value in found.image.items()}
    return {"recall_mean": found.mean, **recalls}


def parse_args() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=1400)
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
    widen_positions(model)
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
