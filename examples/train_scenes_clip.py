"""Trains the small CLIP that ships with the scenes data set, from scratch, on two CPU cores.

Every step sees fresh scenes (`_scenes_training.py`); every eight of a batch share their classes, so
that places must be learned too. The loss is CLIP's symmetric InfoNCE. At the end the recalls on
1,000 test scenes are printed and written beside the weights.
"""

import argparse
import math
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import torch
from _scenes_training import (
    NUM_TEST_SCENES,
    fresh_layouts,
    picture,
    save_half,
    train,
    training_parser,
    write_metrics,
)
from numpy.typing import NDArray
from open_clip.model import CLIP
from torch import Tensor
from torch.nn import functional

from vlprune.tasks.retrieval import Retrieval
from vlprune.tasks.scenes.data import Scenes, loader
from vlprune.tasks.scenes.layout import Layout
from vlprune.tasks.scenes.model import SCENES_CLIP, build_scenes_clip

GROUP_SIZE = 8
MAX_LOGIT_SCALE = math.log(100)


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
    for drawn in fresh_layouts(scenes, batch_size):
        layout = share_classes(drawn, scenes.items.labels, rng)
        images = picture(scenes, layout, generator)
        captions = [scene.caption for scene in scenes.scenes_of(layout)]
        yield images, scenes.tokenizer.tokenize(captions)


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


def evaluate(model: CLIP) -> dict[str, float]:
    """Recalls at 1, 5 and 10 on test scenes, both ways, and their mean, in percent."""
    found = Retrieval(loader("test", NUM_TEST_SCENES, 0, 250)).recall(model)
    recalls = {f"image_to_text_recall@{k}": value for k, value in found.text.items()}
    recalls |= {f"text_to_image_recall@{k}": value for k, value in found.image.items()}
    return {"recall_mean": found.mean, **recalls}


def parse_args() -> argparse.Namespace:
    """The command line."""
    return training_parser(__doc__, SCENES_CLIP, steps=1400, lr=2e-3).parse_args()


def main() -> None:
    """Trains, saves, measures."""
    args = parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    model = build_scenes_clip()
    widen_positions(model)
    minutes = train(
        model,
        train_batches(args.seed, args.steps, args.batch_size),
        lambda batch: {"contrast": contrastive_loss(model, *batch)},
        args,
        after_step=lambda: model.logit_scale.data.clamp_(0, MAX_LOGIT_SCALE),
    )
    save_half(model, args.out)
    write_metrics({"minutes": minutes, **evaluate(model)}, args.out)


if __name__ == "__main__":
    main()
