"""The models that ship with their weights: how each is loaded, and the task that it was trained on.

All are small, trained on scenes by programs in `examples/`; their folders in `tasks/scenes/` hold a
card with what they reach on test scenes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from torch import nn

from vlprune.contracts import Task
from vlprune.tasks.retrieval import Retrieval
from vlprune.tasks.scenes import data
from vlprune.tasks.scenes.items import Split
from vlprune.tasks.scenes.model import load_scenes_clip


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Shipped:
    """One model that ships.

    Attributes:
        load: the trained model, float32, in eval mode.
        task: (split, scenes, seed, scenes a batch) to the task on fresh scenes.
    """

    load: Callable[[], nn.Module]
    task: Callable[[Split, int, int, int], Task]


def _retrieval(split: Split, count: int, seed: int, batch_size: int) -> Retrieval:
    return Retrieval(data.loader(split, count, seed, batch_size))


SHIPPED: dict[str, Shipped] = {
    "scenes-clip": Shipped(load=load_scenes_clip, task=_retrieval),
}
