"""EfficientVLM: half the layers, distilled; masks under a target sparsity, distilled; then cut.

1. halve: every second layer of every stack goes, the student starts from those that stay.
2. general distillation: the task's own loss and the teacher's logits, hidden states and attention
   probabilities, layer by layer (`Distillation`).
3. fine-tuning with the same losses while hard-concrete masks over all towers learn to meet one
   target sparsity (modal-adaptive, `metrics.HardConcrete`).
4. cut, which the authors never did, and fine-tuning of what is left where the preset has epochs.

The layer that student layer i of L came from is the teacher's layer ik + k - 1 of kL; there hidden
states and attentions are compared. Source: Wang et al., EfficientVLM, 2023 (2210.07795) and its
code (`GeneralDistill.py`, `Eff_*.py`, configs). Differences: the student's vision tower is halved
from the teacher's, not from CLIP's; general distillation runs on the given task, not on four
million pairs with boxes; warm-up of the target counts over the whole run; the mask of each fusion
layer acts on that layer.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from torch import nn

from vlprune.contracts import Task
from vlprune.copies import clone
from vlprune.dissect import dissect
from vlprune.metrics.hard_concrete import HardConcrete
from vlprune.pipeline import prune
from vlprune.plan import Plan, make_plan
from vlprune.pruner import record_of
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
from vlprune.recover.layerwise import Distillation, Part, Weights

GENERAL = Weights(
    task=0.6,
    kd=0.4,
    towers={"vision": Part(hidden=0.1), "text": Part(), "fusion": Part(), "decoder": Part()},
)
"""Of general distillation (`GeneralDistill.py`)."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Preset(Experiment):
    """An experiment.

    Attributes:
        sparsity: share that goes of the parameters of heads and neurons of the halved model.
        general: weights of general distillation.
        tuned: weights of fine-tuning.
        general_epochs: of general distillation; 0 leaves it out.
        search_epochs: of fine-tuning with masks.
        retrain_epochs: of fine-tuning after the cut.
        general_lr: highest learning rate of general distillation (AdamW).
        lr: of fine-tuning.
        mask_lr: of masks and multipliers.
        weight_decay: of all.
        halve: whether half of the layers go first.
        strategies: kinds of structures that masks are on.
    """

    sparsity: float = 0.25
    general: Weights = GENERAL
    tuned: Weights = GENERAL
    general_epochs: float = 0.0
    search_epochs: float = 10.0
    retrain_epochs: float = 0.0
    general_lr: float = 1e-4
    lr: float = 3e-5
    mask_lr: float = 0.01
    weight_decay: float = 0.01
    halve: bool = True
    strategies: tuple[str, ...] = ("head", "ffn")


def _tuned(task: float, logits: float, third: float, **towers: Part) -> Weights:
    """Weights of fine-tuning; `third` multiplies all towers."""
    parts = {
        name: Part(attention=third * part.attention, hidden=third * part.hidden)
        for name, part in towers.items()
    }
    return Weights(task=task, kd=1 - task, logits=logits, towers=parts)


_HALF = Part(attention=0.5, hidden=0.5)
_VQA = _tuned(0.6, 1.0, 1.0, text=Part(), vision=Part(hidden=0.2), fusion=_HALF, decoder=Part())
_RETRIEVAL = _tuned(0.5, 1.0, 0.33, text=Part(), vision=Part(hidden=0.2), fusion=_HALF)
_CAPTION = _tuned(0.7, 1.0, 1.0, vision=Part(hidden=0.1), decoder=Part())
_REASONING = Weights(
    task=0.8,
    kd=0.2,
    towers={
        "text": Part(),
        "vision": Part(attention=0.33, hidden=0.033),
        "fusion": Part(attention=0.165, hidden=0.165),
    },
)
_VISION = _tuned(0.5, 1.0, 1.0, vision=Part(hidden=0.2), decoder=Part())


def _shipped(name: str, tuned: Weights) -> Preset:
    return Preset(
        model=name,
        data=name,
        tuned=tuned,
        general_epochs=2,
        search_epochs=2,
        retrain_epochs=1,
        general_lr=1e-3,
        lr=5e-4,
        mask_lr=0.1,
    )


_TABLES = "the authors' Eff_*.py and configs; their model is X-VLM, which no library has"

PRESETS: dict[str, Preset] = {
    "xvlm-vqa": Preset(
        sparsity=0.35,
        tuned=_VQA,
        general_epochs=41,
        search_epochs=10,
        retrain_epochs=10,
        lr=5e-5,
        batch_size=128,
        image_size=480,
        source=_TABLES,
    ),
    "xvlm-retrieval-coco": Preset(
        tuned=_RETRIEVAL, general_epochs=41, batch_size=192, image_size=384, source=_TABLES
    ),
    "xvlm-nlvr2": Preset(
        tuned=_REASONING,
        general_epochs=41,
        mask_lr=0.1,
        batch_size=80,
        image_size=384,
        source=_TABLES,
    ),
    "xvlm-caption": Preset(
        tuned=_CAPTION,
        general_epochs=41,
        lr=1e-5,
        batch_size=256,
        image_size=384,
        source=_TABLES,
    ),
    "scenes-clip": _shipped("scenes-clip", _RETRIEVAL),
    "scenes-deit": _shipped("scenes-deit", _VISION),
    "scenes-segmenter": _shipped("scenes-segmenter", _VISION),
    "scenes-blip-retrieval": _shipped("scenes-blip-retrieval", _RETRIEVAL),
    "scenes-blip-vqa": _shipped("scenes-blip-vqa", _VQA),
    "scenes-blip-captioning": _shipped("scenes-blip-captioning", _CAPTION),
    "scenes-blip-reasoning": _shipped("scenes-blip-reasoning", _REASONING),
}


def halved(model: nn.Module, task: Task) -> nn.Module:
    """Return `model` with every second layer of every stack, those of odd number from 0.

    Args:
        model: left as it was.
        task: gives an example to trace.
    """
    inputs = task.example_inputs(model)
    layers = dissect(model, inputs).select(("layer",))
    keep = {axis.name: tuple(range(1, axis.units, 2)) or (0,) for axis in layers.axes}
    return prune(model, make_plan(layers, keep), inputs)


def stages(model: nn.Module, task: Any, preset: Preset, *, timed: bool = True) -> tuple[Stage, ...]:
    """Return what `run` will do.

    Args:
        model: that it would run on.
        task: that it would train on; its batches are counted.
        preset: of the experiment.
        timed: run a step of every training to say how long all of them take.
    """
    general, search, retrain = _trainings(task, preset)
    student = halved(model, task) if preset.halve else model

    def seconds(weights: Weights) -> float:
        if not timed:
            return float("nan")
        return seconds_of(student, Distillation(student, clone(model), task, weights), task, 1)

    tuned = seconds(preset.tuned)
    anatomy = dissect(student, task.example_inputs(student)).select(preset.strategies)
    left = planned_params(anatomy, {"prunable_params": 1 - preset.sparsity})
    found = []
    if preset.halve:
        found.append(Stage(name="halve", what="every second layer of every stack goes"))
    if general is not None:
        found.append(
            Stage(
                name="general",
                what=f"distil logits, hidden states and attention at {general.lr:g}",
                steps=general.steps,
                seconds=general.steps * seconds(preset.general),
            )
        )
    found += [
        Stage(
            name="search",
            what=f"fine-tune and distil at {search.lr:g} under masks that learn to remove "
            f"{preset.sparsity:.0%} of the parameters of heads and neurons",
            steps=search.steps,
            seconds=search.steps * tuned,
        ),
        Stage(name="cut", what=f"remove what is masked: {left}; masked = cut is proven"),
    ]
    if retrain is not None:
        found.append(
            Stage(
                name="retrain",
                what=f"fine-tune and distil what is left, from {retrain.lr:g} to 0",
                steps=retrain.steps,
                seconds=retrain.steps * tuned,
            )
        )
    return tuple(found)


def run(
    model: nn.Module,
    task: Any,
    preset: Preset,
    *,
    folder: str | Path | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> Outcome:
    """Return `model` halved, distilled, cut under masks and distilled again.

    Args:
        model: fine-tuned on the task; the teacher, left as it was.
        task: gives outputs, losses and logits (`measures.ExampleTask`).
        preset: of the experiment.
        folder: for states; a run that was stopped goes on from there, to the same bits.
        seed: of masks, of the order of a shuffling loader, and of dropout.
        progress: called with the name of a stage, gives what is called with (step, steps).
    """
    general, search, retrain = _trainings(task, preset, seed)
    teacher = clone(model)
    student = halved(model, task) if preset.halve else clone(model)
    inputs = task.example_inputs(student)

    how: Any = {"folder": folder, "progress": progress}
    plans: list[Plan] = [*record_of(student).plans[len(record_of(model).plans) :]]
    if general is not None:
        loss = Distillation(student, teacher, task, preset.general)
        student = train(student, loss, task, general, "general", **how)
    masks = HardConcrete(
        student,
        dissect(student, inputs),
        budget={"prunable_params": 1 - preset.sparsity},
        steps=search.steps,
        lr=preset.mask_lr,
        seed=seed,
        min_units=1,
        strategies=preset.strategies,
    )
    loss = Distillation(student, teacher, task, preset.tuned)
    with masks:
        train(student, loss, task, search, "search", masks=masks, **how)
    plans.append(masks.plan())
    small = prune(student, plans[-1], inputs)
    if retrain is not None:
        loss = Distillation(small, teacher, task, preset.tuned)
        small = train(small, loss, task, retrain, "retrain", **how)
    return Outcome(model=small, plans=tuple(plans))


def _trainings(
    task: Task, preset: Preset, seed: int = 0
) -> tuple[Training | None, Training, Training | None]:
    """How general distillation, the search and the retraining go."""
    batches = count(task.batches())

    def training(epochs: float, lr: float) -> Training:
        return Training(
            steps=steps_of(epochs, batches),
            lr=lr,
            weight_decay=preset.weight_decay,
            schedule="linear",
            seed=seed,
        )

    return (
        training(preset.general_epochs, preset.general_lr) if preset.general_epochs else None,
        training(preset.search_epochs, preset.lr),
        training(preset.retrain_epochs, preset.lr) if preset.retrain_epochs else None,
    )
