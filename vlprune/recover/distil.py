"""Distillation of a cut dual encoder from the model that it was cut from.

Cross-modal: the similarities of a batch. Uni-modal: features, and the hidden states that layers
hand on, each student layer with the teacher layer that it came from; cutting keeps the widths
between layers, so nothing has to be projected.

Source: MoPE-CLIP (2403.07839), section 3.3; weights as in a public re-implementation (SparMoE-VL).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from vlprune.anatomy import under
from vlprune.pruner import record_of
from vlprune.recover.finetune import Repeated, Training, fit
from vlprune.recover.listening import listening_to_outputs
from vlprune.recover.losses import FeatureMSE, SoftCrossEntropy
from vlprune.recover.teacher import Teacher
from vlprune.tasks.retrieval import Retrieval


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Weights:
    """How much each part of the loss counts."""

    task: float = 1.0
    similarity: float = 1.0
    features: float = 1000.0
    hidden: float = 1.0


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Ancestry:
    """Where the layers and heads of a cut model came from.

    Attributes:
        layers: (student path, teacher path) of layers that belong together.
        heads: teacher path of an attention to those of its heads that are left, where some went.
        stacks: teacher path of a stack to the numbers of its layers that are left.
    """

    layers: list[tuple[str, str]]
    heads: dict[str, tuple[int, ...]]
    stacks: dict[str, list[int]]

    def now(self, path: str) -> str | None:
        """Return the student's path of a module of the teacher, None where its layer went."""
        found = _layer_of(path, self.stacks)
        if found is None:
            return path
        stack, place, rest = found
        left = self.stacks[stack]
        return f"{stack}.{left.index(place)}{rest}" if place in left else None


def ancestry(student: nn.Module, teacher: nn.Module) -> Ancestry:
    """Return it from the plans that the student was cut by since it was the teacher.

    Stacks that no plan of layers names are paired one to one.
    """
    stacks: dict[str, list[int]] = {}
    for path, module in teacher.named_modules():
        if _is_stack(module):
            stacks[path] = list(range(len(module)))
    heads: dict[str, tuple[int, ...]] = {}
    for plan in record_of(student).plans[len(record_of(teacher).plans) :]:
        for row in plan.rows:
            if row.axis.kind == "head":
                then = _before(row.axis.path, stacks)
                known = heads.get(then, tuple(range(row.axis.units)))
                heads[then] = tuple(known[head] for head in row.keep)
        for row in plan.rows:
            if row.axis.removal == "delete" and row.axis.path in stacks:
                gone = {row.axis.layer(unit) for unit in row.removed}
                before = stacks[row.axis.path]
                stacks[row.axis.path] = [n for i, n in enumerate(before) if i not in gone]
    modules = dict(student.named_modules())
    layers = [
        (f"{path}.{now}", f"{path}.{then}")
        for path, left in stacks.items()
        for now, then in enumerate(left)
        if f"{path}.{now}" in modules
    ]
    return Ancestry(layers=layers, heads=heads, stacks=stacks)


def _is_stack(module: Any) -> bool:
    """Whether it holds layers of one kind: a list, or a sequence of equal classes (timm's)."""
    if not isinstance(module, (nn.ModuleList, nn.Sequential)) or len(module) < 2:
        return False
    alike = len({type(layer) for layer in module}) == 1 and any(module[0].children())
    return alike or isinstance(module, nn.ModuleList)


def _before(path: str, stacks: dict[str, list[int]]) -> str:
    """The teacher's path of a module whose stacks have lost layers."""
    found = _layer_of(path, stacks)
    if found is None:
        return path
    stack, place, rest = found
    return f"{stack}.{stacks[stack][place]}{rest}"


def _layer_of(path: str, stacks: dict[str, list[int]]) -> tuple[str, int, str] | None:
    """The stack that a module is in, the number of its layer there, and the rest of its path."""
    for stack in stacks:
        if under(path, stack):
            place, dot, rest = path[len(stack) + 1 :].partition(".")
            if place.isdigit():
                return stack, int(place), dot + rest
    return None


def layer_pairs(student: nn.Module, teacher: nn.Module) -> list[tuple[str, str]]:
    """Return (student path, teacher path) of layers that belong together, see `ancestry`."""
    return ancestry(student, teacher).layers


def distillation_loss(
    student: nn.Module,
    teacher: nn.Module | Teacher,
    task: Retrieval,
    batch: tuple[Tensor, Tensor],
    weights: Weights = Weights(),
    pairs: list[tuple[str, str]] | None = None,
) -> Tensor:
    """Return the weighted loss of one batch, a scalar.

    task: symmetric InfoNCE. similarity: cross entropy of the student's similarity rows to the
    teacher's, both ways. features: mean squared error of features of length 1. hidden: mean squared
    error of what paired layers hand on, mean over layers.

    Args:
        student: trained.
        teacher: the model that it was cut from, or its answers (`teacher_of`).
        task: gives features and logits.
        batch: of it.
        weights: of the parts.
        pairs: layers that belong together; default: `layer_pairs`, for which the teacher must be a
            module.
    """
    if not isinstance(teacher, Teacher):
        pairs = layer_pairs(student, teacher) if pairs is None else pairs
        teacher = teacher_of(teacher, task, pairs if weights.hidden else [], limit=0)
    pairs = pairs if pairs and weights.hidden else []
    expected = teacher(batch)
    with listening_to_outputs(student, [path for path, _ in pairs]) as heard:
        outputs = task.outputs(student, batch)
    logits = task.logits(student, outputs)
    both = range(len(outputs))
    loss: Tensor = weights.task * task.losses(student, outputs, task.targets(batch)).mean()
    before = [expected[f"logits.{i}"] for i in range(len(logits))]
    loss = loss + weights.similarity * SoftCrossEntropy()(logits, before)
    features = FeatureMSE()(outputs, [expected[f"output.{i}"] for i in both])
    loss = loss + weights.features * features
    hidden = [(heard[a][-1], expected[b]) for a, b in pairs if heard[a] and b in expected]
    if hidden:
        loss = loss + weights.hidden * FeatureMSE()(*zip(*hidden, strict=True))
    return loss


def teacher_of(
    model: nn.Module,
    task: Retrieval,
    pairs: list[tuple[str, str]],
    *,
    folder: str | Path | None = None,
    limit: int = 2 * 2**30,
) -> Teacher:
    """Return what a teacher gives for each batch: outputs, logits, hidden states of paired layers.

    Args:
        model: the teacher.
        task: gives outputs and logits.
        pairs: (student path, teacher path).
        folder: where answers are kept; None: in memory.
        limit: bytes of them.
    """
    paths = [path for _, path in pairs]

    def answer(model: nn.Module, batch: Any) -> dict[str, Tensor]:
        with listening_to_outputs(model, paths) as heard:
            outputs = task.outputs(model, batch)
        found = {f"output.{i}": t for i, t in enumerate(outputs)}
        found |= {f"logits.{i}": t for i, t in enumerate(task.logits(model, outputs))}
        return found | {path: rows[-1] for path, rows in heard.items() if rows}

    return Teacher(model, answer, folder=folder, limit=limit, settings={"hidden": paths})


def distil(
    student: nn.Module,
    teacher: nn.Module,
    task: Retrieval,
    *,
    epochs: int = 1,
    weights: Weights = Weights(),
    training: Training | None = None,
    folder: str | Path | None = None,
    cache: str | Path | None = None,
    cache_limit: int = 2 * 2**30,
    progress: Callable[[int, float], None] | None = None,
    **settings: Any,
) -> nn.Module:
    """Train `student` in place on the batches of a task, and return it in eval mode.

    Args:
        student: as `prune` or `repair` returned it.
        teacher: the model that it was cut from; not trained.
        task: its batches are gone through again and again.
        epochs: how often all batches are seen, where `training` does not say how many steps.
        weights: of the parts of the loss.
        training: how, see `finetune.fit`; default: `epochs` and `settings` of it.
        folder: for states, to go on from where it was stopped.
        cache: folder for what the teacher gives; default: memory.
        cache_limit: bytes of that; 0 computes it in every epoch.
        progress: called with (step, loss).
        settings: of `Training`: lr, weight_decay, warm_up, precision, ...
    """
    if training is None:
        count = sum(1 for _ in task.batches()) if "steps" not in settings else 0
        training = Training(**{"steps": max(epochs * count, 1), **settings})
    pairs = layer_pairs(student, teacher) if weights.hidden else []
    answers = teacher_of(teacher, task, pairs, folder=cache, limit=cache_limit)

    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return distillation_loss(model, answers, task, batch, weights, pairs)

    return fit(student, loss, Repeated(task), training, folder=folder, progress=progress)
