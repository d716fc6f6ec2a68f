"""What tasks ask of models: predictions of one tower, features of two, their temperature."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from vlprune.calls import Inputs


def device_of(model: nn.Module) -> torch.device:
    """Return the device that a model's first parameter is on."""
    return next(model.parameters()).device


def predictions_of(model: nn.Module, image: Tensor, task: str) -> Tensor:
    """Return the scores that a model gives for images: its answer, or `.logits` of it.

    Raises:
        TypeError: if the answer is neither.
    """
    answer = model(image)
    scores = getattr(answer, "logits", answer)  # an answer of transformers holds them
    if not isinstance(scores, Tensor):
        raise TypeError(
            f"model must answer an image with scores or with .logits; {type(model).__name__} gave "
            f"{type(answer).__name__} to {task}. Wrap it in a module that does."
        )
    return scores


def encode_image(model: Any, image: Tensor) -> Tensor:
    """Return image features [B, E] of an open_clip or transformers dual encoder, as they come.

    Raises:
        TypeError: if the model has no such method.
    """
    if hasattr(model, "encode_image"):
        features: Tensor = model.encode_image(image)
        return features
    if hasattr(model, "get_image_features"):
        return _pooled(model.get_image_features(pixel_values=image))
    raise _no_encoder(model)


def encode_text(model: Any, text: Tensor) -> Tensor:
    """Return text features [B, E] of an open_clip or transformers dual encoder, as they come.

    Raises:
        TypeError: if the model has no such method.
    """
    if hasattr(model, "encode_text"):
        features: Tensor = model.encode_text(text)
        return features
    if hasattr(model, "get_text_features"):
        return _pooled(model.get_text_features(text))
    raise _no_encoder(model)


def pair_inputs(model: nn.Module, image: Tensor, text: Tensor) -> Inputs:
    """Return inputs of a dual encoder, by the keywords of transformers where it is its model."""
    if hasattr(model, "get_image_features"):
        return {"pixel_values": image, "input_ids": text}
    return image, text


def logit_scale(model: nn.Module) -> Tensor:
    """Return what a dual encoder multiplies cosines with; CLIP's start where it has none."""
    scale = getattr(model, "logit_scale", None)
    return scale.detach().exp() if isinstance(scale, Tensor) else torch.tensor(1 / 0.07)


def wide(scores: Tensor) -> Tensor:
    """Return scores in float32 or better: losses of half precision are none."""
    return scores if scores.dtype == torch.float64 else scores.float()


def _pooled(features: Any) -> Tensor:
    found: Tensor = getattr(features, "pooler_output", features)
    return found


def _no_encoder(model: Any) -> TypeError:
    return TypeError(
        f"model must have encode_image and encode_text; {type(model).__name__} has not. "
        "Give Retrieval(loader, encode=...), or wrap it in a module that has."
    )
