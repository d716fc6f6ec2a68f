"""Segmenter: a timm backbone and a mask decoder of timm's blocks (`models/segmenter.py`)."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from vlprune.families import _timm
from vlprune.layout import Family
from vlprune.registry import FAMILIES


def example_inputs(model: Any, batch: int) -> tuple[Tensor]:
    """Return noise images [batch, channels, height, width] of the size of the backbone."""
    return _timm.example_inputs(model.backbone, batch)


def describe(model: Any) -> dict[str, Any] | None:
    """Return the backbone's description and the decoder's sizes; None where timm tells nothing."""
    backbone = _timm.describe(model.backbone)
    return None if backbone is None else {"backbone": backbone, **model.arguments}


def build(arguments: dict[str, Any]) -> nn.Module:
    """Return the described model with random weights."""
    from vlprune.models.segmenter import Segmenter  # lazy: spares timm where none is used

    rest = {name: value for name, value in arguments.items() if name != "backbone"}
    return Segmenter(_timm.build(arguments["backbone"]), **rest).eval()


FAMILIES.register("segmenter")(
    Family(
        models=("vlprune.models.segmenter.Segmenter",),
        towers=(("backbone*", "vision"), ("*", "decoder")),
        example_inputs=example_inputs,
        describe=describe,
        build=build,
    )
)
