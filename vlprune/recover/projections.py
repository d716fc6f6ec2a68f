"""The last projection before an output, found by turning it: where a map of features is folded in.

A parameter whose columns (or rows) are turned by a rotation, and which turns one output by the same
rotation and no other, is the projection that made it. Its bias turns with it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Projection:
    """A parameter [.., E, ..] that makes an output, and the dimension that becomes its features."""

    name: str
    dim: int


def find_projection(
    model: nn.Module, forward: Callable[[], Sequence[Tensor]], place: int
) -> Projection | None:
    """Return the parameter that makes the output number `place` [B, E], None where none does.

    Args:
        model: left as it was.
        forward: runs it on a batch.
        place: which of the outputs.
    """
    before = forward()
    size = before[place].shape[1]
    generator = torch.Generator().manual_seed(0)
    turn = torch.linalg.qr(torch.randn(size, size, generator=generator))[0]
    turn = turn.to(before[place].device, before[place].dtype)
    for name, parameter in reversed(list(model.named_parameters())):
        if any(step.isdigit() for step in name.split(".")) or parameter.dim() != 2:
            continue  # a layer's, or no matrix
        for dim in (0, 1):
            if parameter.shape[dim] != size:
                continue
            projection = Projection(name=name, dim=dim)
            kept = [tensor.clone() for tensor in _parts(model, projection)]
            fold(model, projection, turn)
            after = forward()
            for tensor, was in zip(_parts(model, projection), kept, strict=True):
                tensor.copy_(was)
            turned = [b @ turn.T if i == place else b for i, b in enumerate(before)]
            if all(_close(a, b) for a, b in zip(after, turned, strict=True)):
                return projection
    return None


def fold(model: nn.Module, projection: Projection, weight: Tensor) -> None:
    """Let the projection's output e become `weight` e, weight [E, E], in place."""
    matrix, *bias = _parts(model, projection)
    change = weight.double()
    turned = change @ matrix.double().movedim(projection.dim, 0)
    matrix.copy_(turned.movedim(0, projection.dim))
    for vector in bias:
        vector.copy_(change @ vector.double())


def _parts(model: nn.Module, projection: Projection) -> list[Tensor]:
    """The matrix, and the bias of its module where it has one along the same dimension."""
    owner, _, attribute = projection.name.rpartition(".")
    module = model.get_submodule(owner)
    parts = [getattr(module, attribute).data]
    bias = getattr(module, "bias", None)
    along = parts[0].shape[projection.dim : projection.dim + 1]
    if attribute == "weight" and isinstance(bias, Tensor) and bias.shape == along:
        parts.append(bias.data)
    return parts


def _close(one: Tensor, other: Tensor) -> bool:
    return bool((one - other).abs().max() <= 1e-3 * other.abs().max())
