"""The small DeiT that ships: timm's own class, trained to name the first item of a scene.

`scenes-deit/` holds its config, its weights (float16 on disk) and its card.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import safetensors.torch

if TYPE_CHECKING:
    from timm.models.vision_transformer import VisionTransformer

SCENES_DEIT = Path(__file__).parent / "scenes-deit"


def build_vit(name: str, arguments: dict[str, Any]) -> VisionTransformer:
    """A timm vision transformer with fresh random weights that knows its own picture size."""
    import timm  # lazy: spares timm, and the seconds of its import, to those who only read scenes

    size = arguments["img_size"]
    overlay = {"input_size": (3, size, size)}
    return timm.create_model(name, pretrained_cfg_overlay=overlay, **arguments)


def build_scenes_deit() -> VisionTransformer:
    """The architecture of `scenes-deit/config.json` with fresh random weights, in train mode."""
    return build_vit(**json.loads((SCENES_DEIT / "config.json").read_text()))


def load_scenes_deit() -> VisionTransformer:
    """The trained model, float32, in eval mode; its accuracy is in `scenes-deit/README.md`."""
    model = build_scenes_deit()
    # Copying into float32 parameters widens the float16 of the file.
    model.load_state_dict(safetensors.torch.load_file(SCENES_DEIT / "model.safetensors"))
    return model.eval()
