"""MoPE-CLIP from top to bottom on a tiny CLIP, and the distillation that it ends in."""

import functools

import pytest
import torch
import torch.nn.functional as F
import zoo
from conftest import dissected
from test_ablation import pairs
from torch import nn

import vlprune
from vlprune.cost import count_params
from vlprune.pruner import record_of
from vlprune.recipes.mope_clip import (
    ALL,
    DEPTH,
    WIDTH,
    Step,
    finetuning_stage,
    pretraining_stage,
    run,
)
from vlprune.recover.distil import Weights, distil, distillation_loss, layer_pairs
from vlprune.tasks import Retrieval

TASK = Retrieval(pairs())
QUICK = {"measure": "kl", "num_groups": 4}


def layers(model: nn.Module) -> tuple[int, int]:
    return len(model.visual.transformer.resblocks), len(model.transformer.resblocks)


def test_finetuning_takes_width_then_depth_scored_again() -> None:
    model, _ = dissected("open_clip")
    taught: list[tuple[int, nn.Module]] = []

    def recover(student: nn.Module, teacher: nn.Module) -> nn.Module:
        taught.append((count_params(student), teacher))
        return distil(student, teacher, TASK, lr=1e-3)

    before = {name: t.clone() for name, t in model.state_dict().items()}
    done = finetuning_stage(model, TASK, width=0.5, depth=0.8, recover=recover, **QUICK)
    width, depth = done.plans
    assert {row.axis.kind for row in width.rows} == set(WIDTH)
    assert {row.axis.kind for row in depth.rows} == set(DEPTH)
    assert width.planned.params <= 0.5 * width.dense.params + 0.5 * _fixed(width)
    assert depth.dense.params == width.planned.params  # what the first step left is scored again
    assert [params for params, _ in taught] == [width.planned.params, depth.planned.params]
    assert all(teacher is model for _, teacher in taught)
    assert count_params(done.model) == depth.planned.params
    assert len(record_of(done.model).plans) == 2
    assert all(torch.equal(before[name], t) for name, t in model.state_dict().items())


def _fixed(plan: vlprune.Plan) -> int:
    """Parameters that no axis of a plan can remove."""
    _, anatomy = dissected("open_clip")
    chosen = anatomy.select(WIDTH)
    return vlprune.price(chosen, {axis.name: () for axis in chosen.axes}).params


@pytest.mark.parametrize("tower", ["vision", "text"])
def test_finetuning_of_one_tower_leaves_the_other(tower: str) -> None:
    model, _ = dissected("open_clip")
    done = finetuning_stage(model, TASK, width=0.5, depth=1.0, towers=(tower,), **QUICK)
    assert {row.axis.tower for plan in done.plans for row in plan.rows} == {tower}
    assert count_params(done.model) < count_params(model)


def test_pretraining_takes_turns_and_distils_at_the_end() -> None:
    model, _ = dissected("open_clip")
    calls: list[int] = []

    def recover(student: nn.Module, teacher: nn.Module) -> nn.Module:
        calls.append(len(record_of(student).plans))
        return student

    done = pretraining_stage(model, TASK, width=0.5, depth=0.6, recover=recover, **QUICK)
    kinds = [{row.axis.kind for row in plan.rows} for plan in done.plans]
    assert kinds == [set(WIDTH), set(DEPTH)] * 2
    assert calls == [4]
    vision, text = layers(done.model)
    assert 1 <= vision <= 3
    assert 1 <= text <= 2
    assert vision + text < 5


def test_order_and_one_shot_are_arguments() -> None:
    model, _ = dissected("open_clip")
    width, depth = Step(strategies=WIDTH, keep=0.6), Step(strategies=DEPTH, keep=0.7)
    once = Step(strategies=ALL, keep=0.45)
    for steps in ((depth, width), (once,)):
        done = run(model, TASK, steps, **QUICK)
        assert len(done.plans) == len(steps)
        small = vlprune.verify(model, done.model) if len(steps) == 1 else 0.0
        assert small <= 1e-9


def test_layers_are_paired_with_those_they_came_from() -> None:
    model, anatomy = dissected("open_clip")
    keep = {"visual.transformer.resblocks:layer": (0, 2), "transformer.resblocks:layer": (1,)}
    once = vlprune.prune(model, vlprune.make_plan(anatomy, keep))
    assert set(layer_pairs(once, model)) == {
        ("visual.transformer.resblocks.0", "visual.transformer.resblocks.0"),
        ("visual.transformer.resblocks.1", "visual.transformer.resblocks.2"),
        ("transformer.resblocks.0", "transformer.resblocks.1"),
    }
    again = vlprune.dissect(once)
    second = {"visual.transformer.resblocks:layer": (1,)}
    twice = vlprune.prune(once, vlprune.make_plan(again, second))
    assert ("visual.transformer.resblocks.0", "visual.transformer.resblocks.2") in layer_pairs(
        twice, model
    )
    assert ("visual.transformer.resblocks.0", "visual.transformer.resblocks.1") in layer_pairs(
        twice, once
    )


def test_each_part_of_the_loss_is_its_formula() -> None:
    model, anatomy = dissected("open_clip")
    keep = {"visual.transformer.resblocks:layer": (0, 2)}
    student = vlprune.prune(model, vlprune.make_plan(anatomy, keep))
    batch = next(iter(TASK.batches()))
    nothing = {"task": 0.0, "similarity": 0.0, "features": 0.0, "hidden": 0.0}
    part = functools.partial(distillation_loss, student, model, TASK, batch)
    with torch.no_grad():
        image, text = TASK.outputs(student, batch)
        image_, text_ = TASK.outputs(model, batch)
        scale = model.logit_scale.exp()
        student_rows, teacher_rows = scale * image @ text.T, scale * image_ @ text_.T
        assert part(Weights(**{**nothing, "task": 2.0})) == pytest.approx(
            2 * float(TASK.loss(student, batch))
        )
        both = [
            F.cross_entropy(s, t.softmax(-1))
            for s, t in ((student_rows, teacher_rows), (student_rows.T, teacher_rows.T))
        ]
        expected = float(sum(both)) / 2
        assert float(part(Weights(**{**nothing, "similarity": 1.0}))) == pytest.approx(
            expected, rel=1e-4
        )
        expected = (F.mse_loss(image, image_) + F.mse_loss(text, text_)) / 2
        assert float(part(Weights(**{**nothing, "features": 10.0}))) == pytest.approx(
            10 * float(expected), rel=1e-4
        )
        assert float(part(Weights(**nothing))) == 0.0
        assert float(part(Weights(**{**nothing, "hidden": 1.0}))) > 0
        same = distillation_loss(model, model, TASK, batch, Weights(**{**nothing, "hidden": 1.0}))
        assert float(same) == 0.0


def test_distilling_brings_a_student_closer_to_its_teacher() -> None:
    model = zoo.make("open_clip")
    anatomy = vlprune.dissect(model).select(WIDTH)
    scores = vlprune.score(model, "mope", TASK, anatomy=anatomy, **QUICK)
    student = vlprune.prune(model, vlprune.plan(scores, {"prunable_params": 0.5}))
    losses: list[float] = []
    before = {name: t.clone() for name, t in model.state_dict().items()}
    distil(student, model, TASK, epochs=8, lr=1e-3, progress=lambda _, loss: losses.append(loss))
    assert len(losses) == 8 * 3
    assert sum(losses[-3:]) < 0.7 * sum(losses[:3])
    assert not student.training
    assert all(torch.equal(before[name], t) for name, t in model.state_dict().items())
