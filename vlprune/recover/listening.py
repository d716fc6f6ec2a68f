"""What the inside of any model says as it runs: answers of layers, probabilities of attentions.

A module that attends calls one of three functions: a softmax over scores that it has made itself,
`scaled_dot_product_attention`, or torch's `multi_head_attention_forward`. Of the last two the
probabilities are computed beside the answer, masks and causality included.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle

from vlprune.calls import removing, tensors_of
from vlprune.intercepts import while_running

Heard: TypeAlias = dict[str, list[Tensor]]


@contextmanager
def listening_to_outputs(model: nn.Module, paths: Iterable[str]) -> Iterator[Heard]:
    """Yield what the modules at `paths` answer, filled in as they run.

    Path to first tensors, one for each time that the module ran; with gradients where the forward
    has them.

    Args:
        model: run by the caller.
        paths: such as those of layers.
    """
    heard: Heard = {path: [] for path in paths}

    def hook(rows: list[Tensor]) -> Any:
        return lambda module, args, output: rows.append(next(tensors_of(output)))

    handles = [
        model.get_submodule(path).register_forward_hook(hook(rows)) for path, rows in heard.items()
    ]
    with removing(handles):
        yield heard


@contextmanager
def listening_to_attention(model: nn.Module, paths: Iterable[str]) -> Iterator[Heard]:
    """Yield what the modules at `paths` attend to, filled in as they run.

    Path to probabilities [B, H, queries, keys], one for each time that an attention ran in the
    module; with gradients where the forward has them.

    Args:
        model: run by the caller.
        paths: modules that attend, such as the `path` of axes of heads.
    """
    heard: Heard = {path: [] for path in paths}
    handles: list[RemovableHandle] = []
    for path, rows in heard.items():
        handles += while_running(model.get_submodule(path), _Listener(rows))
    with removing(handles):
        yield heard


class _Listener(TorchFunctionMode):
    """Notes the probabilities of every attention that runs inside of it."""

    def __init__(self, heard: list[Tensor]):
        super().__init__()
        self._heard = heard

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name == "multi_head_attention_forward":
            wanted = {"need_weights": True, "average_attn_weights": False}
            answer, weights = func(*args, **{**kwargs, **wanted})
            self._heard.append(weights)
            return answer, None
        answer = func(*args, **kwargs)
        if name == "scaled_dot_product_attention":
            self._heard.append(_probabilities(*args, **kwargs))
        elif name == "softmax" and answer.dim() == 4:
            self._heard.append(answer)
        return answer


def _probabilities(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """What `scaled_dot_product_attention` multiplies values with, without dropout."""
    if enable_gqa:
        key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
    scores = query @ key.transpose(-2, -1) * (scale or 1 / math.sqrt(query.shape[-1]))
    if is_causal:
        causal = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
        scores = scores.masked_fill(~causal, float("-inf"))
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        scores = scores.masked_fill(~attn_mask, float("-inf"))
    elif attn_mask is not None:
        scores = scores + attn_mask
    return scores.softmax(-1)
