"""What the recipes share: presets, the stages that are shown before they run, and the outcome."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

from rich.table import Table
from torch import nn

from vlprune.anatomy import Anatomy
from vlprune.contracts import Task
from vlprune.copies import clone
from vlprune.cost import absolute_budget, dense_cost
from vlprune.plan import Plan
from vlprune.recover.finetune import Loss, Masks, Repeated, Training, fit
from vlprune.shipped import SHIPPED

Progress = Callable[[str], Callable[[int, int], None]]
"""Called with a stage's name, gives what is called with (done, total)."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Experiment:
    """What every preset of a recipe says.

    Attributes:
        model: as `create_model` takes it; "" where no library has it: give your own.
        pretrained: weights of it, as the command line takes them; "" for those that ship.
        data: name of the model that ships whose task is used; "": give your own task.
        batch_size: examples of a step, over all processes; of shipped data, in each of them.
        image_size: height and width of pictures; 0: the model's.
        examples: scenes in an epoch, where `data` ships.
        source: where the numbers are from.
    """

    model: str = ""
    pretrained: str = ""
    data: str = ""
    batch_size: int = 32
    image_size: int = 0
    examples: int = 3200
    source: str = "chosen here for the shipped model; not of the paper"

    def task(self, seed: int = 0) -> Task:
        """Return the shipped task that it trains on.

        Raises:
            ValueError: if it has no data of its own.
        """
        if not self.data:
            raise ValueError(
                "task must be given: this preset has the paper's data, which does not ship. Give "
                "--task module:function that returns a task on your own copy."
            )
        make = SHIPPED[self.data].task
        return make("train", self.examples, seed, self.batch_size, stream=True)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """A part of a recipe, as it is shown before it runs.

    Attributes:
        name: of it.
        what: is done, in words.
        steps: of training.
        seconds: that they take here, extrapolated from one step; nan where that was not tried.
    """

    name: str
    what: str
    steps: int = 0
    seconds: float = 0.0


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What a recipe made: the model, and the plan of every step."""

    model: nn.Module
    plans: tuple[Plan, ...]


def table(stages: Iterable[Stage], title: str, caption: str) -> Table:
    """Return what will happen, a row for each stage, with the minutes that it takes here."""
    found = Table(title=title, caption=caption)
    found.add_column("stage")
    found.add_column("what")
    for name in ("steps", "minutes"):
        found.add_column(name, justify="right")
    for stage in stages:
        steps = f"{stage.steps:,}" if stage.steps else ""
        minutes = f"{stage.seconds / 60:.1f}" if stage.steps else ""
        found.add_row(stage.name, stage.what, steps, minutes)
    return found


class Recipe(Protocol):
    """A module of `recipes` that the command line can run."""

    PRESETS: dict[str, Any]

    def stages(
        self, model: nn.Module, task: Task, preset: Any, *, timed: bool = True
    ) -> tuple[Stage, ...]:
        """Return what `run` will do."""

    def run(
        self,
        model: nn.Module,
        task: Task,
        preset: Any,
        *,
        folder: Any = None,
        seed: int = 0,
        progress: Progress | None = None,
    ) -> Outcome:
        """Do it."""


def planned_params(anatomy: Anatomy, budget: Mapping[str, float]) -> str:
    """Return in words what a budget leaves."""
    left, dense = absolute_budget(anatomy, budget)["params"], dense_cost(anatomy).params
    return f"{left:,} of {dense:,} params stay at most"


def steps_of(epochs: float, batches: int) -> int:
    """Return the steps of so many epochs, at least one."""
    return max(math.ceil(epochs * batches), 1)


def count(batches: Iterable[Any]) -> int:
    """Return how many batches there are, by going through them."""
    return sum(1 for _ in batches)


def seconds_of(model: nn.Module, loss: Loss, task: Task, steps: int) -> float:
    """Return the seconds of so many training steps, from one forward and backward of a copy."""
    student = clone(model).train()
    batch = next(iter(task.batches()))
    begin = 0.0
    for _ in range(2):  # the first warms up
        begin = time.perf_counter()
        loss(student, batch).backward()  # type: ignore[no-untyped-call]
    return steps * (time.perf_counter() - begin)


def train(
    student: nn.Module,
    loss: Loss,
    task: Task,
    training: Training,
    name: str,
    *,
    folder: str | Path | None,
    progress: Progress | None,
    masks: Masks | None = None,
) -> nn.Module:
    """Train one stage of a recipe in place, with states of its own, and return the model.

    Args:
        student: see `finetune.fit`.
        loss: see there.
        task: gives the batches.
        training: how.
        name: of the stage, and of its folder.
        folder: of the recipe's states; None for none.
        progress: of the recipe.
        masks: attached by the caller.
    """
    tell = progress(name) if progress else None

    def after(step: int, value: float) -> None:
        if tell is not None:
            tell(step, training.steps)

    return fit(
        student,
        loss,
        Repeated(task),
        training,
        masks=masks,
        folder=None if folder is None else Path(folder) / name,
        progress=after,
    )
