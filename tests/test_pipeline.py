"""The verbs: models by name, scoring without side effects, verification of what was cut."""

from pathlib import Path

import pytest
import torch
import zoo
from conftest import dissected, inputs_of, random_keep
from torch import nn

import vlprune
from vlprune.calls import calls_of, run, tensors_of
from vlprune.dissect import default_inputs
from vlprune.errors import LawError, UnknownNameError
from vlprune.pruner import record_of
from vlprune.tasks import Retrieval


@pytest.mark.parametrize("name", ["hf_clip", "BlipForQuestionAnswering"])
def test_a_folder_of_transformers_is_a_model(name: str, tmp_path: Path) -> None:
    model = zoo.make(name)
    model.save_pretrained(tmp_path)
    loaded = vlprune.create_model(f"hf:{tmp_path}")
    assert type(loaded) is type(model)
    assert not loaded.training
    with torch.no_grad():
        for call in calls_of(default_inputs(model)):
            pairs = zip(tensors_of(run(model, call)), tensors_of(run(loaded, call)), strict=True)
            assert all(torch.allclose(a, b, rtol=1e-5, atol=1e-6) for a, b in pairs)
    vlprune.save_pretrained(loaded, tmp_path / "whole")  # compares bits, though weights are mapped
    anatomy = vlprune.dissect(loaded)
    small = vlprune.prune(loaded, vlprune.make_plan(anatomy, random_keep(anatomy, 0)))
    vlprune.save_pretrained(small, tmp_path / "cut")
    assert vlprune.verify(model, vlprune.from_pretrained(tmp_path / "cut")) <= 1e-9


def test_timm_models_take_their_own_arguments() -> None:
    model = vlprune.create_model("timm:deit_tiny_patch16_224", img_size=32, depth=2, num_classes=7)
    assert len(model.blocks) == 2
    assert record_of(model).source["arguments"]["arguments"]["num_classes"] == 7


def test_open_clip_models_are_found_by_name_and_built_again_from_what_they_say(
    tmp_path: Path,
) -> None:
    model = vlprune.create_model("open_clip:ViT-S-32-alt")
    anatomy = vlprune.dissect(model)
    keep = {a.name: tuple(range(1 + i % 3)) for i, a in enumerate(anatomy.select(("head",)).axes)}
    small = vlprune.prune(model, vlprune.make_plan(anatomy, keep))
    vlprune.save_pretrained(small, tmp_path / "small")  # loads it once and compares the outputs


@pytest.mark.parametrize("spec", ["nonsense", "open_clip:", "nobody:ViT-B-32", "no/such/folder"])
def test_a_name_of_nothing_is_refused(spec: str) -> None:
    with pytest.raises(UnknownNameError, match="must be open_clip:NAME, timm:NAME, hf:FOLDER"):
        vlprune.create_model(spec)


@pytest.mark.parametrize("spec", ["open_clip:ViT-B-99", "timm:deit_huge"])
def test_a_name_that_the_library_does_not_know_is_told_in_one_line(spec: str) -> None:
    with pytest.raises(UnknownNameError, match="could not create") as caught:
        vlprune.create_model(spec)
    assert len(str(caught.value)) < 400


def test_verify_tells_a_trained_or_foreign_model() -> None:
    model, anatomy = dissected("deit")
    small = vlprune.prune(model, vlprune.make_plan(anatomy, random_keep(anatomy, 1)))
    assert vlprune.verify(model, small, inputs_of(model)) <= 1e-9
    with torch.no_grad():
        small.head.bias.add_(0.1)
    with pytest.raises(LawError, match="first at module 'head'"):
        vlprune.verify(model, small, inputs_of(model))
    with pytest.raises(ValueError, match="was never cut"):
        vlprune.verify(model, model)


def test_scoring_keeps_train_mode_and_gradients() -> None:
    model = zoo.make("deit").train()
    model.head.weight.grad = torch.ones_like(model.head.weight)
    task = vlprune.tasks.CallableTask(
        [torch.randn(2, 3, 32, 32)], lambda m, batch: m(batch).square().mean()
    )
    vlprune.score(model, "fisher", task)
    assert all(module.training for module in model.modules())
    assert torch.equal(model.head.weight.grad, torch.ones_like(model.head.weight))
    assert model.blocks[0].attn.qkv.weight.grad is None


def test_a_plan_says_who_made_it() -> None:
    model, anatomy = dissected("deit")
    scores = vlprune.score(model, "random", anatomy=anatomy, seed=3)
    plan = vlprune.plan(scores, {"macs": 0.7}, "uniform")
    assert plan.made_by["metric"] == "random"
    assert plan.made_by["settings"] == {"seed": 3}
    assert plan.made_by["allocation"] == "uniform"
    assert plan.made_by["versions"]["torch"] == torch.__version__.partition("+")[0]
    assert plan.planned.macs <= 0.7 * plan.dense.macs


def test_a_model_of_many_forwards_is_checked_on_all() -> None:
    model, anatomy = dissected("BlipForImageTextRetrieval")
    inputs = default_inputs(model, batch=2)
    assert [entry["use_itm_head"] for entry in inputs] == [True, False]
    axis = "text_encoder.encoder.layer.0.crossattention.self:head"
    plan = vlprune.make_plan(anatomy, {axis: (0,)})
    small = vlprune.prune(model, plan, inputs)
    with torch.no_grad():
        small.text_proj.bias.add_(1)  # only the second forward reaches it
    assert isinstance(small, nn.Module)
    with pytest.raises(LawError, match="text_proj"):
        vlprune.verify(model, small, inputs)
    assert vlprune.verify(model, small, inputs[:1]) <= 1e-9


def test_compress_lets_what_stays_stand_in_for_removed_layers() -> None:
    model, _ = dissected("open_clip")
    torch.manual_seed(0)
    task = Retrieval([(torch.randn(8, 3, 32, 32), torch.randint(1, 40, (8, 12))) for _ in range(4)])
    small = vlprune.compress(model, task, {"params": 0.8}, strategies=("layer",), verify=False)
    repairs = record_of(small).repairs
    assert any(repair.ridge is not None and repair.kept == repair.of for repair in repairs)
