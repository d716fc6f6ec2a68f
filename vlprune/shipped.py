"""The models that ship with their weights: how each is loaded, and the task that it was trained on.

All are small, trained on scenes by programs in `examples/`; their folders in `tasks/scenes/` hold a
card with what they reach on test scenes.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Protocol

from torch import nn

from vlprune.contracts import Task
from vlprune.tasks.captioning import Captioning
from vlprune.tasks.classification import Classification
from vlprune.tasks.question_answering import QuestionAnswering
from vlprune.tasks.reasoning import VisualReasoning
from vlprune.tasks.retrieval import Retrieval
from vlprune.tasks.scenes import data, labels, questions, statements
from vlprune.tasks.scenes.blip import blip_tokenizer, load_scenes_blip
from vlprune.tasks.scenes.deit import load_scenes_deit
from vlprune.tasks.scenes.items import Split
from vlprune.tasks.scenes.model import load_scenes_clip
from vlprune.tasks.scenes.segmenter import load_scenes_segmenter
from vlprune.tasks.segmentation import Segmentation


class MakeTask(Protocol):
    """Makes a task of scenes."""

    def __call__(
        self, split: Split, count: int, seed: int, batch_size: int, *, stream: bool = False
    ) -> Task:
        """Return the task on `count` scenes of a split.

        Args:
            split: "train" or "test".
            count: of scenes.
            seed: which scenes.
            batch_size: scenes in a batch.
            stream: make each batch when it is asked for: for training, on many scenes.
        """


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Shipped:
    """A model that ships.

    Attributes:
        load: makes it, trained, in eval mode.
        task: makes what it was trained for.
    """

    load: Callable[[], nn.Module]
    task: MakeTask


def _made(kind: Callable[..., Task], loader: Callable[..., Any], **options: Any) -> MakeTask:
    """A task of a kind, on what a loader of scenes gives."""

    def make(split: Split, count: int, seed: int, batch_size: int, *, stream: bool = False) -> Task:
        return kind(loader(split, count, seed, batch_size, stream=stream), **options)

    return make


def _blip(job: str, task: MakeTask) -> Shipped:
    return Shipped(load=functools.partial(load_scenes_blip, job), task=task)


_words = functools.partial(data.loader, tokenizer=blip_tokenizer())

SHIPPED: dict[str, Shipped] = {
    "scenes-clip": Shipped(load=load_scenes_clip, task=_made(Retrieval, data.loader)),
    "scenes-deit": Shipped(
        load=load_scenes_deit, task=_made(Classification, labels.classification_loader)
    ),
    "scenes-segmenter": Shipped(
        load=load_scenes_segmenter, task=_made(Segmentation, labels.segmentation_loader)
    ),
    "scenes-blip-retrieval": _blip("retrieval", _made(Retrieval, _words, matching=True)),
    "scenes-blip-vqa": _blip(
        "vqa",
        _made(QuestionAnswering, questions.question_loader, answers=questions.answer_tokens()),
    ),
    "scenes-blip-captioning": _blip("captioning", _made(Captioning, _words)),
    "scenes-blip-reasoning": _blip(
        "reasoning", _made(VisualReasoning, statements.statement_loader)
    ),
}
