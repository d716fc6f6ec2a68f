"""The small CLIP that ships: open_clip's own class, trained on scenes by an example program.

`scenes-clip/` holds its config, its weights (float16 on disk) and its card.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import safetensors.torch

if TYPE_CHECKING:
    from open_clip.model import CLIP

SCENES_CLIP = Path(__file__).parent / "scenes-clip"


def build_scenes_clip() -> CLIP:
    """The architecture of `scenes-clip/config.json` with fresh random weights, in train mode."""
    # Lazy: spares open_clip, and the seconds that its import takes, to those who only read scenes.
    from open_clip.model import CLIP

    return CLIP(**json.loads((SCENES_CLIP / "config.json").read_text()))


def load_scenes_clip() -> CLIP:
    """The trained model, float32, in eval mode; its recalls are in `scenes-clip/README.md`."""
    model = build_scenes_clip()
    # Copying into float32 parameters widens the float16 of the file.
    model.load_state_dict(safetensors.torch.load_file(SCENES_CLIP / "model.safetensors"))
    return model.eval()
