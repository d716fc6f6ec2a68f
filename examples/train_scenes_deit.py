"""Trains the small DeiT that ships with the scenes data set: names the first item of a scene.

Starts from the backbone of the trained Segmenter (`train_scenes_segmenter.py`), which has learnt
items and places from every pixel; a class token alone learns them far slower. Every step sees fresh
scenes (`_scenes_training.py`); the loss is cross entropy. At the end the accuracy on 1,000 test
scenes is printed and written beside the weights.
"""

import argparse
from pathlib import Path

import safetensors.torch
import torch
from _scenes_training import (
    NUM_TEST_SCENES,
    labelled_batches,
    save_half,
    train,
    training_parser,
    write_metrics,
)
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor
from torch.nn import functional

from vlprune.tasks.classification import Classification
from vlprune.tasks.scenes.deit import SCENES_DEIT, build_scenes_deit
from vlprune.tasks.scenes.labels import classification_loader, first_classes
from vlprune.tasks.scenes.segmenter import SCENES_SEGMENTER


def load_backbone(model: VisionTransformer, folder: Path) -> None:
    """Takes over what a Segmenter has learnt; the head stays as it was drawn."""
    weights = safetensors.torch.load_file(folder / "model.safetensors")
    backbone = {
        name.removeprefix("backbone."): tensor.float()
        for name, tensor in weights.items()
        if name.startswith("backbone.")
    }
    left = model.load_state_dict(backbone, strict=False)
    assert left.missing_keys == ["head.weight", "head.bias"], left
    assert not left.unexpected_keys, left


def evaluate(model: VisionTransformer) -> dict[str, float]:
    """Accuracy on test scenes, in percent."""
    task = Classification(classification_loader("test", NUM_TEST_SCENES, 0, 250))
    return {"accuracy": task.measure(model)}


def parse_args() -> argparse.Namespace:
    """The command line."""
    parser = training_parser(__doc__, SCENES_DEIT, steps=5000, batch_size=64, lr=1e-3, threads=1)
    parser.add_argument("--backbone", type=Path, default=SCENES_SEGMENTER, help="its folder")
    return parser.parse_args()


def main() -> None:
    """Trains, saves, measures."""
    args = parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    model = build_scenes_deit().train()
    load_backbone(model, args.backbone)

    def losses_of(batch: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
        return {"class": functional.cross_entropy(model(batch[0]), batch[1])}

    minutes = train(model, labelled_batches(args, first_classes), losses_of, args)
    save_half(model, args.out)
    write_metrics({"minutes": minutes, **evaluate(model)}, args.out)


if __name__ == "__main__":
    main()
