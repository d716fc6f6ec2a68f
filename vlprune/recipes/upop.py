"""UPop: search masks of all towers together while the model trains, cut, train again.

1. search: the model is trained at a constant rate with `metrics.UPop` on it; at the end of the
   search masks are 0 or 1, so the searched model is the cut one.
2. cut: what the masks say goes; proven.
3. retrain: what is left is trained for as long, the rate falling by a cosine to 0.

`PRESETS` holds the paper's hyper-parameters as data, and presets for the models that ship, which
run here. Source: Shi et al., UPop, ICML 2023 (2301.13741), algorithm 1, appendix and scripts.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from vlprune.contracts import Task
from vlprune.copies import clone
from vlprune.dissect import dissect
from vlprune.metrics.upop import Rank, Units, UPop
from vlprune.pipeline import prune
from vlprune.recipes._stages import (
    Experiment,
    Outcome,
    Progress,
    Stage,
    count,
    planned_params,
    seconds_of,
    steps_of,
    train,
)
from vlprune.recover.finetune import Training


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """How long one compression takes.

    Attributes:
        search: epochs.
        retrain: epochs.
        interval: steps between two decisions of the search.
    """

    search: float
    retrain: float
    interval: int


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Preset(Experiment):
    """An experiment.

    Attributes:
        ratio: share that goes: of the units, weighted by kind, with `units="paper"`; of the
            parameters that the strategies can remove with "cost".
        schedules: ratio to how long it takes; the nearest counts.
        search_epochs: instead of the schedule's.
        retrain_epochs: instead of the schedule's.
        interval: instead of the schedule's.
        lr: highest learning rate of both trainings (AdamW).
        weight_decay: of both.
        units: see `metrics.UPop`.
        rank: see `metrics.UPop`.
        attention: what a dimension of heads counts against a neuron, with `units="paper"`.
        strategies: kinds of structures that may go.
    """

    ratio: float = 0.5
    schedules: Mapping[float, Schedule] = dataclasses.field(default_factory=dict)
    search_epochs: float | None = None
    retrain_epochs: float | None = None
    interval: int | None = None
    lr: float = 1e-5
    weight_decay: float = 0.05
    units: Units = "paper"
    rank: Rank | None = None
    attention: float = 36.0
    strategies: tuple[str, ...] = ("head_dim", "ffn")

    def schedule(self) -> Schedule:
        """Return how long it takes, of the nearest ratio that is known.

        Raises:
            ValueError: if the ratio is no share.
        """
        if not 0 < self.ratio < 1:
            raise ValueError(f"ratio must be a share between 0 and 1; got {self.ratio:g}.")
        near = self.schedules[min(self.schedules, key=lambda ratio: abs(ratio - self.ratio))]
        return Schedule(
            search=near.search if self.search_epochs is None else self.search_epochs,
            retrain=near.retrain if self.retrain_epochs is None else self.retrain_epochs,
            interval=near.interval if self.interval is None else self.interval,
        )


def _same(interval: int, **epochs: float) -> dict[float, Schedule]:
    """Search and retraining of equal length, by ratio in percent: r50=10."""
    return {
        float(name[1:]) / 100: Schedule(search=long, retrain=long, interval=interval)
        for name, long in epochs.items()
    }


def _shipped(name: str, **settings: Any) -> Preset:
    return Preset(
        model=name,
        data=name,
        lr=5e-4,
        units="cost",
        schedules=_same(5, r50=2, r75=3),
        **settings,
    )


_TABLES = "paper, appendix; the authors' scripts and configs"

PRESETS: dict[str, Preset] = {
    "blip-nlvr2": Preset(
        batch_size=256,
        image_size=384,
        lr=3e-6,
        schedules=_same(50, r50=15, r66=20, r75=23, r80=24, r90=27),
        source=_TABLES,
    ),
    "blip-caption": Preset(
        model="hf:Salesforce/blip-image-captioning-base",
        pretrained="yes",
        batch_size=256,
        image_size=384,
        lr=1e-5,
        schedules=_same(100, r50=5, r75=8),
        source=_TABLES,
    ),
    "blip-vqa": Preset(
        model="hf:Salesforce/blip-vqa-base",
        pretrained="yes",
        batch_size=256,
        image_size=480,
        lr=2e-5,
        schedules=_same(1000, r50=10, r75=15),
        source=_TABLES,
    ),
    "blip-retrieval-coco": Preset(
        model="hf:Salesforce/blip-itm-base-coco",
        pretrained="yes",
        batch_size=256,
        image_size=384,
        lr=1e-5,
        schedules=_same(200, r50=6, r75=9),
        source=_TABLES,
    ),
    "blip-retrieval-flickr": Preset(
        model="hf:Salesforce/blip-itm-base-flickr",
        pretrained="yes",
        batch_size=256,
        image_size=384,
        lr=1e-5,
        schedules=_same(50, r50=12, r75=18),
        source=_TABLES,
    ),
    "clip-retrieval-coco": Preset(
        model="open_clip:ViT-L-14-336",
        pretrained="openai",
        batch_size=256,
        image_size=336,
        lr=1e-5,
        weight_decay=0.2,
        schedules=_same(200, r50=6, r75=9),
        source=f"{_TABLES}; theirs also trains a momentum model with a queue",
    ),
    "clip-retrieval-flickr": Preset(
        model="open_clip:ViT-L-14-336",
        pretrained="openai",
        batch_size=256,
        image_size=336,
        lr=1e-5,
        weight_decay=0.2,
        schedules=_same(50, r50=12, r75=18),
        source=f"{_TABLES}; theirs also trains a momentum model with a queue",
    ),
    "deit-imagenet": Preset(
        model="timm:deit_small_patch16_224",
        pretrained="yes",
        batch_size=4096,
        image_size=224,
        lr=8e-4,  # 1e-4 for 512 images, in proportion
        attention=12.007,
        schedules={
            ratio: Schedule(search=60, retrain=300, interval=interval)
            for ratio, interval in ((0.1, 1600), (0.2, 1000), (0.3, 800), (0.4, 800), (0.5, 800))
        },
        source=_TABLES,
    ),
    "segmenter-ade20k": Preset(
        batch_size=64,
        lr=4e-3,
        attention=12.007,
        schedules={
            ratio: Schedule(search=16, retrain=64, interval=interval)
            for ratio, interval in ((0.1, 500), (0.15, 400), (0.2, 300), (0.3, 200))
        },
        source=_TABLES,
    ),
    "scenes-clip": _shipped("scenes-clip"),
    "scenes-deit": _shipped("scenes-deit"),
    "scenes-segmenter": _shipped("scenes-segmenter"),
    "scenes-blip-retrieval": _shipped("scenes-blip-retrieval"),
    "scenes-blip-vqa": _shipped("scenes-blip-vqa"),
    "scenes-blip-captioning": _shipped("scenes-blip-captioning"),
    "scenes-blip-reasoning": _shipped("scenes-blip-reasoning"),
}


def stages(
    model: nn.Module, task: Task, preset: Preset, *, timed: bool = True
) -> tuple[Stage, ...]:
    """Return what `run` will do.

    Args:
        model: that it would run on.
        task: that it would train on; its batches are counted.
        preset: of the experiment.
        timed: run a step to say how long all of them take.
    """
    search, retrain = _trainings(task, preset)
    step = seconds_of(model, task.loss, task, 1) if timed else float("nan")
    how, left = preset.schedule(), ""
    if preset.units == "cost":
        anatomy = dissect(model, task.example_inputs(model)).select(preset.strategies)
        left = f": {planned_params(anatomy, {'prunable_params': 1 - preset.ratio})}"
    of = "units, weighted by kind" if preset.units == "paper" else "parameters that may go"
    return (
        Stage(
            name="search",
            what=f"train at {preset.lr:g} with masks ({preset.units}), every {how.interval} steps "
            f"more of them, until {preset.ratio:.0%} of the {of} are masked",
            steps=search.steps,
            seconds=search.steps * step,
        ),
        Stage(name="cut", what=f"remove what is masked{left}; masked = cut is proven"),
        Stage(
            name="retrain",
            what=f"train what is left, from {preset.lr:g} to 0",
            steps=retrain.steps,
            seconds=retrain.steps * step,
        ),
    )


def run(
    model: nn.Module,
    task: Task,
    preset: Preset,
    *,
    folder: str | Path | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> Outcome:
    """Return `model` searched, cut and trained again.

    Args:
        model: left as it was.
        task: its loss and its batches, gone through again and again.
        preset: of the experiment.
        folder: for states; a run that was stopped goes on from there, to the same bits.
        seed: of the order of a shuffling loader, and of dropout.
        progress: called with the name of a stage, gives what is called with (step, steps).
    """
    search, retrain = _trainings(task, preset, seed)
    student = clone(model)
    inputs = task.example_inputs(student)
    goal: dict[str, Any] = (
        {"ratio": preset.ratio, "weights": {"head_dim": preset.attention, "ffn": 1.0}}
        if preset.units == "paper"
        else {"budget": {"prunable_params": 1 - preset.ratio}}
    )
    masks = UPop(
        student,
        dissect(student, inputs),
        steps=search.steps,
        interval=preset.schedule().interval,
        units=preset.units,
        rank=preset.rank,
        strategies=preset.strategies,
        **goal,
    )
    with masks:
        train(
            student,
            task.loss,
            task,
            search,
            "search",
            folder=folder,
            progress=progress,
            masks=masks,
        )
    plan = masks.plan()
    small = prune(student, plan, inputs)
    small = train(small, task.loss, task, retrain, "retrain", folder=folder, progress=progress)
    return Outcome(model=small, plans=(plan,))


def _trainings(task: Task, preset: Preset, seed: int = 0) -> tuple[Training, Training]:
    """How the search and the retraining go."""
    how, batches = preset.schedule(), count(task.batches())
    shared: dict[str, Any] = {"lr": preset.lr, "weight_decay": preset.weight_decay, "seed": seed}
    return (
        Training(steps=steps_of(how.search, batches), schedule="constant", warm_up=0.0, **shared),
        Training(steps=steps_of(how.retrain, batches), schedule="cosine", warm_up=0.0, **shared),
    )
