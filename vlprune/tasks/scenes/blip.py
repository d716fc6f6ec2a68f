"""Four small BLIP models that ship: transformers' own classes and our reasoner, trained on scenes.

They were trained together and share one vision tower, one text encoder and one text decoder, so one
file in `scenes-blip/` holds the weights (float16) of all; each model takes what it has. Beside it
lie its config and its card.
"""

from __future__ import annotations

import functools
import importlib
import json
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import nn

from vlprune.tasks.scenes.tokenizer import Tokenizer
from vlprune.tasks.scenes.words import scene_words

SCENES_BLIP = Path(__file__).parent / "scenes-blip"

CLASSES = {
    "retrieval": "transformers:BlipForImageTextRetrieval",
    "vqa": "transformers:BlipForQuestionAnswering",
    "captioning": "transformers:BlipForConditionalGeneration",
    "reasoning": "vlprune.models.blip_reasoning:BlipForVisualReasoning",
}
"""What each model is for, and its class."""


@functools.cache
def blip_tokenizer() -> Tokenizer:
    """The tokenizer of all four: captions, questions, answers and statements."""
    return Tokenizer(scene_words())


def build_scenes_blip(job: str) -> Any:
    """The architecture of `scenes-blip/config.json` with fresh random weights, in train mode.

    Args:
        job: "retrieval", "vqa", "captioning" or "reasoning".
    """
    # Lazy: spares transformers to those who only read scenes.
    config = importlib.import_module("transformers").BlipConfig.from_dict(
        json.loads((SCENES_BLIP / "config.json").read_text())
    )
    module, _, name = CLASSES[job].partition(":")
    return getattr(importlib.import_module(module), name)(config)


def load_scenes_blip(job: str, folder: Path = SCENES_BLIP) -> nn.Module:
    """A trained model, float32, in eval mode; `scenes-blip/README.md` says what it reaches.

    Args:
        job: "retrieval", "vqa", "captioning" or "reasoning".
        folder: Of the weights.
    """
    model: nn.Module = build_scenes_blip(job)
    take_weights(model, folder)
    model.tie_weights()  # type: ignore[operator]  # of transformers
    return model.eval()


def take_weights(model: nn.Module, folder: Path) -> None:
    """Load what a model has of the weights of all four, in place."""
    state = safetensors.torch.load_file(folder / "model.safetensors")
    own = {name: state[name] for name in model.state_dict() if name in state}
    # Copying into float32 parameters widens the float16 of the file; tied ones are there once.
    missing = model.load_state_dict(own, strict=False).missing_keys
    tied = getattr(model, "_tied_weights_keys", None) or {}
    assert set(missing) <= set(tied), missing
