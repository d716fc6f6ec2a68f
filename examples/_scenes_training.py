"""What the programs that train models on scenes share: fresh pictures, AdamW, the loop, the files.

Every step sees fresh scenes of the train items, flipped, turned, zoomed, dimmed and partly erased
at random.
"""

import argparse
import json
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from torch import Tensor, nn
from torch.nn import functional

from vlprune.tasks.scenes.data import Scenes, normalise
from vlprune.tasks.scenes.items import Items
from vlprune.tasks.scenes.layout import Layout, paint

WARMUP_STEPS = 100
NUM_TEST_SCENES = 1000


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


def fresh_layouts(scenes: Scenes, batch_size: int) -> Iterator[Layout]:
    """The scenes in order, a batch at a time."""
    for start in range(0, len(scenes), batch_size):
        yield scenes.layout(range(start, start + batch_size))


def picture(scenes: Scenes, layout: Layout, generator: torch.Generator) -> Tensor:
    """Images `[B, 3, 96, 96]` of a layout, every item changed in its own way."""
    pixels = scenes.items.images[layout.item[layout.present]].astype(np.float32)
    changed = augment(torch.from_numpy(pixels), generator).to(torch.uint8).numpy()
    return normalise(paint(layout, changed))


def labelled_batches(
    args: argparse.Namespace,
    label: Callable[[Layout, Items], Tensor],
    change: Callable[[Layout, Items, np.random.Generator], Layout] = lambda layout, *_: layout,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Fresh scenes for every step: images `[B, 3, 96, 96]` and what `label` says of them.

    `change` makes other layouts of those that were drawn.
    """
    scenes = Scenes("train", args.steps * args.batch_size, args.seed)
    generator = torch.Generator().manual_seed(args.seed)
    rng = np.random.default_rng(args.seed)
    for drawn in fresh_layouts(scenes, args.batch_size):
        layout = change(drawn, scenes.items, rng)
        yield picture(scenes, layout, generator), label(layout, scenes.items)


def build_optimizer(model: nn.Module, weight_decay: float) -> torch.optim.AdamW:
    """AdamW that decays matrices, and neither norms nor biases nor a logit scale."""
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    others = [p for p in model.parameters() if p.ndim < 2]
    groups: list[dict[str, Any]] = [{"params": matrices}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, betas=(0.9, 0.98), weight_decay=weight_decay)


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Linear warm-up, then a cosine down to zero."""
    if step < WARMUP_STEPS:
        return peak * (step + 1) / WARMUP_STEPS
    return peak * (1 + math.cos(math.pi * (step - WARMUP_STEPS) / (steps - WARMUP_STEPS))) / 2


def train(
    model: nn.Module,
    batches: Iterable[Any],
    losses_of: Callable[[Any], Mapping[str, Tensor]],
    args: argparse.Namespace,
    after_step: Callable[[], object] = lambda: None,
) -> float:
    """Trains in place on the sum of the losses of every batch; returns the minutes it took."""
    optimizer = build_optimizer(model, args.weight_decay)
    start = time.perf_counter()
    seen: list[dict[str, float]] = []
    for step, batch in enumerate(batches):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, args.steps, args.lr)
        losses = losses_of(batch)
        optimizer.zero_grad()
        torch.stack(list(losses.values())).sum().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        after_step()
        seen.append({name: float(loss.detach()) for name, loss in losses.items()})
        minutes = (time.perf_counter() - start) / 60
        if (step + 1) % 50 == 0:
            last = [found for found in seen[-50:] if found.keys() == losses.keys()]
            means = [f"{name} {np.mean([found[name] for found in last]):.3f}" for name in losses]
            print(f"step {step + 1}, {minutes:.1f} min: {', '.join(means)}", flush=True)
        if minutes > args.minutes:
            print(f"stopped at step {step + 1} of {args.steps}: {args.minutes} minutes are over")
            break
    return minutes


def save_half(model: nn.Module, folder: Path) -> None:
    """Writes the weights as float16, and rounds the model's own to them: what ships is measured."""
    weights = {name: tensor.half() for name, tensor in model.state_dict().items()}
    folder.mkdir(parents=True, exist_ok=True)
    safetensors.torch.save_file(weights, folder / "model.safetensors")
    model.load_state_dict(weights)
    model.eval()


def write_metrics(metrics: Mapping[str, float], folder: Path) -> None:
    """Writes `metrics.json` beside the weights, and prints it."""
    text = json.dumps({name: round(value, 2) for name, value in metrics.items()}, indent=2)
    (folder / "metrics.json").write_text(text + "\n")
    print(text)


def training_parser(
    description: str | None, out: Path, **defaults: float
) -> argparse.ArgumentParser:
    """The command line of every such program, with the program's own defaults."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--lr", type=float, help="peak learning rate")
    parser.add_argument("--weight-decay", type=float, default=0.05)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--minutes", type=float, default=55, help="stop after so many minutes")
    parser.add_argument("--out", type=Path, default=out, help="folder for the weights")
    parser.set_defaults(**defaults)
    return parser
