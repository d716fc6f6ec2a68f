"""What tasks with a value for every example share: right answers, their mean, token losses."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlprune.calls import quiet_eval
from vlprune.measures import ExampleTask
from vlprune.tasks._batches import first_of


def mean_value(task: ExampleTask, model: nn.Module) -> float:
    """Return the mean of all examples' values, each batch valued by itself."""
    with torch.no_grad(), quiet_eval(model):
        values = [
            task.values(task.outputs(model, batch), task.targets(batch)) for batch in task.batches()
        ]
    first_of(values, type(task).__name__)
    return float(torch.cat(values).double().mean())


def is_best(scores: Tensor, right: Tensor) -> Tensor:
    """Say whether the right one scores above all others [...], of scores [..., choices].

    Ties count against, and NaN is never right.
    """
    others = scores.scatter(-1, right[..., None], float("-inf"))
    best: Tensor = (scores.gather(-1, right[..., None]) > others).all(-1)
    return best


def token_losses(logits: Tensor, ids: Tensor, pad: int) -> Tensor:
    """Return minus the log-likelihood of every token but the first [B, T - 1]; of pads it is 0.

    Args:
        logits: of every token but the first [B, T - 1, V].
        ids: [B, T].
        pad: id of padding.
    """
    labels = ids[:, 1:].masked_fill(ids[:, 1:] == pad, -100)
    return F.cross_entropy(logits.transpose(1, 2), labels, reduction="none")


def started(model: Any, ids: Tensor) -> Tensor:
    """Return ids [B, T] whose first token is the decoder's own start, as `generate` has it."""
    start = ids.new_full((len(ids), 1), model.config.text_config.bos_token_id)
    return torch.cat([start, ids[:, 1:]], dim=1)
