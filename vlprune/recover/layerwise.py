"""Distillation layer by layer: logits, hidden states and attention probabilities, tower by tower.

A student's layers and attentions are compared with those that they came from, whatever was cut: the
plans that it carries say which (`distil.ancestry`). For anyone's loop: the loss is a function of
the student and a batch.

Source: EfficientVLM (2210.07795), `GeneralDistill.py`; attention and hidden losses as in TinyBERT
(1909.10351), on probabilities instead of scores.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from vlprune.anatomy import Anatomy
from vlprune.dissect import dissect
from vlprune.recover.distil import Ancestry, ancestry
from vlprune.recover.listening import Heard, listening_to_attention, listening_to_outputs
from vlprune.recover.losses import AttentionMSE, FeatureMSE, LogitKL


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """How much one tower's layers count.

    Attributes:
        attention: of mean squared errors of probabilities times the number of queries, summed over
            layers.
        hidden: of mean squared errors of what layers hand on, summed over layers.
    """

    attention: float = 1.0
    hidden: float = 1.0


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Weights:
    """How much each part of the loss counts: task * own + kd * (logits * KL + sum of towers).

    Attributes:
        task: of the task's own loss.
        kd: of all that is distilled.
        logits: of the KL divergence to the teacher's logits, at temperature 1.
        towers: tower to its part; a tower that is not there counts nothing. The last hidden state
            of "vision" is left out, as in the authors' code.
    """

    task: float
    kd: float
    logits: float = 1.0
    towers: Mapping[str, Part]


class Distillation:
    """The loss of a student beside its teacher, a function of (student, batch) for any loop.

    Args:
        student: cut from the teacher.
        teacher: put into eval mode, not trained.
        task: gives outputs, losses and logits (`measures.ExampleTask`).
        weights: of the parts.
    """

    def __init__(self, student: nn.Module, teacher: nn.Module, task: Any, weights: Weights):
        self.teacher, self.task, self.weights = teacher.eval(), task, weights
        lineage = ancestry(student, teacher)
        theirs = dissect(teacher, task.example_inputs(teacher))
        self.attentions = [
            pair for pair in _attention_pairs(lineage, theirs) if self._part(pair.tower).attention
        ]
        self.hidden = [
            pair for pair in _hidden_pairs(lineage, theirs) if self._part(pair.tower).hidden
        ]

    def __call__(self, student: nn.Module, batch: Any) -> Tensor:
        """Return the loss of one batch, a scalar."""
        device = next(student.parameters()).device
        with torch.no_grad():
            before, asked, told = self._heard(self.teacher.to(device), batch, "teacher")
            expected = self.task.logits(self.teacher, before)
        outputs, attentions, hidden = self._heard(student, batch, "student")
        logits = self.task.logits(student, outputs)
        own = self.task.losses(student, outputs, self.task.targets(batch)).mean()
        kl = torch.stack([LogitKL()(s, t) for s, t in zip(logits, expected, strict=True)]).mean()
        distilled = self.weights.logits * kl
        for pair in self.attentions:
            weight = self._part(pair.tower).attention
            heads = None if pair.heads is None else [pair.heads]
            for s, t in _both(attentions[pair.student], asked[pair.teacher]):
                error = AttentionMSE()([s], [t], heads)
                distilled = distilled + weight * error * s.shape[-2]
        for pair in self.hidden:
            weight = self._part(pair.tower).hidden
            for s, t in _both(hidden[pair.student], told[pair.teacher]):
                distilled = distilled + weight * FeatureMSE()([s], [t])
        loss: Tensor = self.weights.task * own + self.weights.kd * distilled
        return loss

    def _part(self, tower: str) -> Part:
        return self.weights.towers.get(tower, Part(attention=0.0, hidden=0.0))

    def _heard(
        self, model: nn.Module, batch: Any, side: str
    ) -> tuple[tuple[Tensor, ...], Heard, Heard]:
        """Outputs, attentions and hidden states of one forward of the teacher or the student."""
        attentions = [getattr(pair, side) for pair in self.attentions]
        layers = [getattr(pair, side) for pair in self.hidden]
        with (
            listening_to_attention(model, attentions) as asked,
            listening_to_outputs(model, layers) as told,
        ):
            outputs = tuple(self.task.outputs(model, batch))
        return outputs, asked, told


def _both(ours: list[Tensor], theirs: list[Tensor]) -> Iterable[tuple[Tensor, Tensor]]:
    """Run by run; a half that went never runs, and is not compared."""
    return zip(ours, theirs, strict=True) if ours else ()


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """Two modules that belong together.

    Attributes:
        tower: that they are in.
        student: path.
        teacher: path.
        heads: of an attention: the teacher's heads that the student has, in order; None: all.
    """

    tower: str
    student: str
    teacher: str
    heads: tuple[int, ...] | None = None


def _attention_pairs(lineage: Ancestry, theirs: Anatomy) -> list[Pair]:
    """Attentions of the teacher that have heads left, each with what it is now."""
    found = []
    for axis in theirs.axes:
        now = lineage.now(axis.path) if axis.kind == "head" else None
        heads = lineage.heads.get(axis.path)
        if now is not None and heads != ():
            found.append(Pair(tower=axis.tower, student=now, teacher=axis.path, heads=heads))
    return found


def _hidden_pairs(lineage: Ancestry, theirs: Anatomy) -> list[Pair]:
    """Layers of the student, each with the one that it came from; not the last of vision."""
    stacks = {axis.path: axis for axis in theirs.axes if axis.kind == "layer"}
    found = []
    for now, then in lineage.layers:
        stack, _, place = then.rpartition(".")
        if stack in stacks:
            axis = stacks[stack]
            last = axis.layer(axis.units - 1)
            if axis.tower != "vision" or int(place) != last:
                found.append(Pair(tower=axis.tower, student=now, teacher=then))
    return found
