"""Distillation of a cut dual encoder from the model that it was cut from.

Cross-modal: the similarities of a batch. Uni-modal: features, and the hidden states that layers
hand on, each student layer with the teacher layer that it came from; cutting keeps the widths
between layers, so nothing has to be projected.

Source: MoPE-CLIP (2403.07839), section 3.3; weights as in a public re-implementation (SparMoE-VL).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlprune.calls import tensors_of
from vlprune.pruner import record_of
from vlprune.tasks.retrieval import Retrieval


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Weights:
    """How much each part of the loss counts."""

    task: float = 1.0
    similarity: float = 1.0
    features: float = 1000.0
    hidden: float = 1.0


def layer_pairs(student: nn.Module, teacher: nn.Module) -> list[tuple[str, str]]:
    """Return (student path, teacher path) of layers that belong together.

    Read from the plans that the student was cut by since it was the teacher; stacks that no plan of
    layers names are paired one to one.
    """
    plans = record_of(student).plans[len(record_of(teacher).plans) :]
    stacks: dict[str, list[int]] = {}
    for path, module in teacher.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) > 1:
            stacks[path] = list(range(len(module)))
    for plan in plans:
        for row in plan.rows:
            if row.axis.removal == "delete" and row.axis.path in stacks:
                gone = {row.axis.layer(unit) for unit in row.removed}
                before = stacks[row.axis.path]
                stacks[row.axis.path] = [n for i, n in enumerate(before) if i not in gone]
    modules = dict(student.named_modules())
    return [
        (f"{path}.{now}", f"{path}.{then}")
        for path, layers in stacks.items()
        for now, then in enumerate(layers)
        if f"{path}.{now}" in modules
    ]


def distillation_loss(
    student: nn.Module,
    teacher: nn.Module,
    task: Retrieval,
    batch: tuple[Tensor, Tensor],
    weights: Weights = Weights(),
    pairs: list[tuple[str, str]] | None = None,
) -> Tensor:
    """Return the weighted loss of one batch, a scalar.

    task: symmetric InfoNCE. similarity: cross entropy of the student's similarity rows to the
    teacher's, both ways. features: mean squared error of features of length 1. hidden: mean squared
    error of what paired layers hand on, mean over layers.
    """
    pairs = layer_pairs(student, teacher) if pairs is None else pairs
    if not weights.hidden:
        pairs = []
    with torch.no_grad(), _listening(teacher, [path for _, path in pairs]) as wanted:
        expected = task.outputs(teacher, batch)
        before = task.logits(teacher, expected)
    with _listening(student, [path for path, _ in pairs]) as heard:
        outputs = task.outputs(student, batch)
    logits = task.logits(student, outputs)
    loss = weights.task * task.losses(student, outputs, task.targets(batch)).mean()
    rows = zip(before, logits, strict=True)
    similarity = [-(a.softmax(-1) * b.log_softmax(-1)).sum(-1).mean() for a, b in rows]
    loss = loss + weights.similarity * torch.stack(similarity).mean()
    features = [F.mse_loss(a, b) for a, b in zip(outputs, expected, strict=True)]
    loss = loss + weights.features * torch.stack(features).mean()
    hidden = [F.mse_loss(heard[a], wanted[b]) for a, b in pairs if a in heard and b in wanted]
    return loss + weights.hidden * torch.stack(hidden).mean() if hidden else loss


@contextmanager
def _listening(model: nn.Module, paths: list[str]) -> Iterator[dict[str, Tensor]]:
    """What the modules at `paths` answer, first tensors, filled in as the model runs."""
    heard: dict[str, Tensor] = {}

    def hook(path: str) -> Any:
        def listen(module: nn.Module, args: Any, output: Any) -> None:
            heard[path] = next(tensors_of(output))

        return listen

    handles = [model.get_submodule(p).register_forward_hook(hook(p)) for p in dict.fromkeys(paths)]
    try:
        yield heard
    finally:
        for handle in handles:
            handle.remove()


def distil(
    student: nn.Module,
    teacher: nn.Module,
    task: Retrieval,
    *,
    epochs: int = 1,
    lr: float = 2e-5,
    weight_decay: float = 3e-4,
    warm_up: float = 0.1,
    weights: Weights = Weights(),
    progress: Callable[[int, float], None] | None = None,
) -> nn.Module:
    """Train `student` in place on the batches of a task, and return it in eval mode.

    AdamW, linear warm-up over the share `warm_up` of the steps, then a cosine to zero; gradients
    clipped to norm 1. One process, one device, no autocast.

    Args:
        student: as `prune` returned it.
        teacher: the model that it was cut from; not trained.
        task: its batches are gone through `epochs` times.
        epochs: how often all batches are seen.
        lr: of AdamW, at its highest.
        weight_decay: of AdamW.
        warm_up: share of the steps in which the rate rises.
        weights: of the parts of the loss.
        progress: called with (step, loss).
    """
    batches = list(task.batches())
    total = epochs * len(batches)
    rise = max(int(warm_up * total), 1)
    optimiser = torch.optim.AdamW(student.parameters(), lr=lr, weight_decay=weight_decay)

    def rate(step: int) -> float:
        if step < rise:
            return (step + 1) / rise
        return 0.5 * (1 + math.cos(math.pi * (step - rise) / max(total - rise, 1)))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, rate)
    pairs = layer_pairs(student, teacher)
    teacher.eval()
    student.train()
    for step in range(total):
        loss = distillation_loss(
            student, teacher, task, batches[step % len(batches)], weights, pairs
        )
        optimiser.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimiser.step()
        schedule.step()
        if progress is not None:
            progress(step + 1, float(loss.detach()))
    return student.eval()
