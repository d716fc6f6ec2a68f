"""The small Segmenter that ships: a DeiT and a mask decoder that name the item of every cell.

`scenes-segmenter/` holds its config, its weights (float16 on disk) and its card.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import safetensors.torch

from vlprune.tasks.scenes.deit import build_vit

if TYPE_CHECKING:
    from vlprune.models.segmenter import Segmenter

SCENES_SEGMENTER = Path(__file__).parent / "scenes-segmenter"


def build_scenes_segmenter() -> Segmenter:
    """The architecture of `scenes-segmenter/config.json`, fresh random weights, in train mode."""
    # Lazy: spares timm, and the seconds that its import takes, to those who only read scenes.
    from vlprune.models.segmenter import Segmenter

    config = json.loads((SCENES_SEGMENTER / "config.json").read_text())
    return Segmenter(build_vit(**config.pop("backbone")), **config)


def load_scenes_segmenter() -> Segmenter:
    """The trained model, float32, in eval mode; its mIoU is in `scenes-segmenter/README.md`."""
    model = build_scenes_segmenter()
    # Copying into float32 parameters widens the float16 of the file.
    model.load_state_dict(safetensors.torch.load_file(SCENES_SEGMENTER / "model.safetensors"))
    return model.eval()
