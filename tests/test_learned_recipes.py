"""UPop and EfficientVLM from end to end on tiny models, and by their presets."""

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import dissected
from test_ablation import pairs
from test_question_answering import task as questions
from torch import Tensor, nn

import vlprune
from vlprune import cli, recipes
from vlprune.copies import clone
from vlprune.cost import count_params
from vlprune.pruner import record_of
from vlprune.recipes import _stages, efficientvlm, upop
from vlprune.recover.distil import ancestry
from vlprune.recover.layerwise import Distillation, Part, Weights
from vlprune.recover.listening import listening_to_attention, listening_to_outputs
from vlprune.shipped import SHIPPED
from vlprune.store import read_certificate
from vlprune.tasks import Retrieval

UPOP = upop.Preset(
    ratio=0.5,
    schedules={0.5: upop.Schedule(search=3, retrain=2, interval=2)},
    lr=1e-3,
    units="cost",
)
SMALL = efficientvlm.Preset(
    sparsity=0.4,
    tuned=efficientvlm.PRESETS["xvlm-vqa"].tuned,
    general_epochs=1,
    search_epochs=3,
    retrain_epochs=1,
    lr=1e-3,
    mask_lr=0.3,
)


def weights(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def few() -> Retrieval:
    return Retrieval(pairs()[:4])


def test_upop_searches_cuts_and_trains_again() -> None:
    model, _ = dissected("open_clip")
    before = weights(model)
    done = upop.run(model, few(), UPOP)
    assert torch.equal(weights(model), before)
    (plan,) = done.plans
    assert plan.made_by["metric"] == "upop"
    units = vlprune.dissect(model).select(("head_dim", "ffn"))
    limit = vlprune.cost.absolute_budget(units, {"prunable_params": 0.5})["params"]
    assert count_params(done.model) == plan.planned.params <= limit
    assert limit - plan.planned.params < count_params(model) // 40  # within one unit
    assert record_of(done.model).relative_error < 1e-9
    cut_only = upop.run(model, few(), dataclasses.replace(UPOP, retrain_epochs=0.1))
    assert cut_only.plans == done.plans
    assert not torch.equal(weights(cut_only.model), weights(done.model))


def test_the_papers_units_and_ratio_are_a_preset_away() -> None:
    model, _ = dissected("deit")
    images = torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    task = vlprune.tasks.Classification([(images, torch.arange(8))])
    preset = dataclasses.replace(UPOP, units="paper", attention=12.0)
    (plan,) = upop.run(model, task, preset).plans
    gone = {"head_dim": 0, "ffn": 0}
    units = dict(gone)
    for row in plan.rows:
        if not row.axis.name.endswith(".v"):  # tied with .qk: one mask
            gone[row.axis.kind] += len(row.removed)
            units[row.axis.kind] += row.axis.units
    removed = 12 * gone["head_dim"] + gone["ffn"]
    total = 12 * units["head_dim"] + units["ffn"]
    assert removed == pytest.approx(0.5 * total, abs=12)


class Stop(Exception):  # a person's hand, not an error
    pass


@pytest.mark.parametrize(("stage", "at"), [("search", 7), ("retrain", 3)])
def test_a_stopped_recipe_goes_on_to_the_same_bits(stage: str, at: int, tmp_path: Path) -> None:
    model, _ = dissected("open_clip")
    straight = upop.run(model, few(), UPOP)

    def stop(name: str) -> Any:
        def tell(done: int, total: int) -> None:
            if (name, done) == (stage, at):
                raise Stop

        return tell

    _save_every(monkey := pytest.MonkeyPatch(), 2)
    try:
        with pytest.raises(Stop):
            upop.run(model, few(), UPOP, folder=tmp_path, progress=stop)
        again = upop.run(model, few(), UPOP, folder=tmp_path)
    finally:
        monkey.undo()
    assert again.plans == straight.plans
    assert torch.equal(weights(again.model), weights(straight.model))


def _save_every(monkey: pytest.MonkeyPatch, steps: int) -> None:
    original = _stages.fit
    monkey.setattr(_stages, "fit", lambda *a, **k: original(*a, **{"save_every": steps, **k}))


def test_efficientvlm_halves_distils_masks_and_cuts() -> None:
    model, _ = dissected("BlipForQuestionAnswering")
    task = questions()
    before = weights(model)
    done = efficientvlm.run(model, task, SMALL)
    assert torch.equal(weights(model), before)
    halving, masked = done.plans
    assert {row.axis.kind for row in halving.rows} == {"layer"}
    assert all(row.keep == tuple(range(1, row.axis.units, 2)) for row in halving.rows)
    assert masked.made_by["metric"] == "hard_concrete"
    assert {row.axis.tower for row in masked.rows} == {"vision", "text", "fusion", "decoder"}
    half = efficientvlm.halved(model, task)
    heads = vlprune.dissect(half).select(("head", "ffn"))
    limit = vlprune.cost.absolute_budget(heads, {"prunable_params": 0.6})["params"]
    assert count_params(done.model) == masked.planned.params <= limit
    assert count_params(done.model) < count_params(half) < count_params(model)
    assert record_of(done.model).relative_error < 1e-9


def test_the_loss_is_its_formula() -> None:
    model, _ = dissected("BlipForQuestionAnswering")
    task = questions()
    student = efficientvlm.halved(model, task)
    given = Weights(
        task=0.6,
        kd=0.4,
        logits=2.0,
        towers={"vision": Part(attention=3.0, hidden=0.2), "decoder": Part(hidden=0.0)},
    )
    (batch,) = task.batches()
    found = float(Distillation(student, model, task, given)(student, batch).detach())

    layers = {"vision_model.encoder.layers": 3, "text_decoder.bert.encoder.layer": 2}
    of = {s: [f"{s}.{i}" for i in range(n)] for s, n in layers.items()}
    inside = {"vision_model.encoder.layers": ("self_attn",)}
    heard = []
    for net in (student, model):
        paths = [p for rows in of.values() for p in rows if _has(net, p)]
        attentions = [
            f"{p}.{name}"
            for p in paths
            for name in inside.get(p.rpartition(".")[0], ("attention.self", "crossattention.self"))
        ]
        with (
            torch.no_grad(),
            listening_to_attention(net, attentions) as asked,
            listening_to_outputs(net, paths) as told,
        ):
            outputs = task.outputs(net, batch)
        heard.append((outputs, asked, told))
    (ours, asked, told), (theirs, asked_t, told_t) = heard
    kl = F.kl_div(
        ours[0].log_softmax(-1), theirs[0].log_softmax(-1), log_target=True, reduction="batchmean"
    )
    total = 2.0 * float(kl)
    # three vision layers: the second stays, paired with itself; it is not the last one
    vision, image = "vision_model.encoder.layers", "vision_model.encoder.layers.1"
    a, b = asked[f"{vision}.0.self_attn"][0], asked_t[f"{image}.self_attn"][0]
    total += 3.0 * float((a - b).square().mean()) * a.shape[-2]
    total += 0.2 * float((told[f"{vision}.0"][0] - told_t[image][0]).square().mean())
    decoder = "text_decoder.bert.encoder.layer"
    for name in ("attention.self", "crossattention.self"):
        a, b = asked[f"{decoder}.0.{name}"][0], asked_t[f"{decoder}.1.{name}"][0]
        total += float((a - b).square().mean()) * a.shape[-2]
    own = float(task.losses(student, ours, task.targets(batch)).mean())
    assert found == pytest.approx(0.6 * own + 0.4 * total, rel=1e-5)
    alone = Distillation(clone(model), model, task, given)
    same = float(alone(model, batch).detach())
    assert same == pytest.approx(0.6 * float(task.loss(model, batch).detach()), rel=1e-5)


def _has(model: nn.Module, path: str) -> bool:
    return path in dict(model.named_modules())


def test_heads_that_are_left_are_compared_with_themselves() -> None:
    model, anatomy = dissected("open_clip")
    layers = vlprune.make_plan(anatomy, {"visual.transformer.resblocks:layer": (0, 2)})
    once = vlprune.prune(model, layers)
    second = vlprune.dissect(once)
    name = "visual.transformer.resblocks.1.attn:head"
    twice = vlprune.prune(once, vlprune.make_plan(second, {name: (1, 3)}))
    third = vlprune.dissect(twice)
    thrice = vlprune.prune(twice, vlprune.make_plan(third, {name: (1,)}))
    then = "visual.transformer.resblocks.2.attn"
    assert ancestry(twice, model).heads == {then: (1, 3)}
    assert ancestry(thrice, model).heads == {then: (3,)}
    loss = Distillation(thrice, model, few(), efficientvlm.GENERAL)
    (pair,) = [pair for pair in loss.attentions if pair.heads]
    assert (pair.student, pair.teacher, pair.heads) == (name.removesuffix(":head"), then, (3,))
    (batch, *_) = few().batches()
    assert loss(thrice, batch).requires_grad


def test_blocks_of_timm_are_paired_and_its_mlps_are_not() -> None:
    model, anatomy = dissected("segmenter")
    keep = {"backbone.blocks:layer": (1,), "decoder.blocks:layer": (0, 1)}
    small = vlprune.prune(model, vlprune.make_plan(anatomy, keep))
    assert ancestry(small, model).layers == [
        ("backbone.blocks.0", "backbone.blocks.1"),
        ("decoder.blocks.0", "decoder.blocks.0"),
        ("decoder.blocks.1", "decoder.blocks.1"),
    ]


# -- presets ---------------------------------------------------------------------------------------


def test_presets_are_the_papers_tables() -> None:
    vqa = dataclasses.replace(upop.PRESETS["blip-vqa"], ratio=0.75)
    assert vqa.schedule() == upop.Schedule(search=15, retrain=15, interval=1000)
    assert (vqa.lr, vqa.attention, vqa.units) == (2e-5, 36.0, "paper")
    reasoning = dataclasses.replace(upop.PRESETS["blip-nlvr2"], ratio=0.9)
    assert reasoning.schedule() == upop.Schedule(search=27, retrain=27, interval=50)
    deit = dataclasses.replace(upop.PRESETS["deit-imagenet"], ratio=0.1)
    assert deit.schedule() == upop.Schedule(search=60, retrain=300, interval=1600)
    assert deit.attention == 12.007
    fewer = dataclasses.replace(deit, search_epochs=1.5, interval=7).schedule()
    assert fewer == upop.Schedule(search=1.5, retrain=300, interval=7)
    with pytest.raises(ValueError, match="ratio must be a share"):
        dataclasses.replace(deit, ratio=1.0).schedule()
    other = efficientvlm.PRESETS
    assert other["xvlm-vqa"].sparsity == 0.35
    assert other["xvlm-caption"].tuned.towers.keys() == {"vision", "decoder"}
    image = other["xvlm-retrieval-coco"].tuned.towers["vision"]
    assert (image.attention, image.hidden) == pytest.approx((0.33, 0.066))


@pytest.mark.parametrize("name", recipes.NAMES)
def test_every_shipped_model_has_a_preset(name: str) -> None:
    presets = recipes.load(name).PRESETS
    assert set(SHIPPED) <= set(presets)
    for preset in SHIPPED:
        assert presets[preset].model == presets[preset].data == preset
    with pytest.raises(ValueError, match="task must be given"):
        next(preset for preset in presets.values() if not preset.data).task()


def test_settings_change_plain_fields() -> None:
    preset = recipes.preset_of("efficientvlm", "scenes-clip")
    changed = recipes.change(preset, {"sparsity": 0.5, "halve": "no", "strategies": "ffn"})
    assert (changed.sparsity, changed.halve, changed.strategies) == (0.5, False, ("ffn",))
    with pytest.raises(ValueError, match="--set must name one of model, pretrained"):
        recipes.change(preset, {"tuned": 1})
    with pytest.raises(ValueError, match=r"lr must be like 0\.0005; got 'fast'"):
        recipes.change(preset, {"lr": "fast"})
    for name, what in (("upopp", "recipe must be one of"), ("upop", "preset of upop must be one")):
        with pytest.raises(LookupError, match=what):
            recipes.preset_of(name, "none")


# -- by the command line ---------------------------------------------------------------------------


def call(monkey: pytest.MonkeyPatch, capsys: Any, *arguments: str) -> tuple[int, str]:
    monkey.setattr(sys, "argv", ["vlprune", "recipe", *arguments])
    code = 0
    try:
        cli.main()
    except SystemExit as end:
        code = int(end.code or 0)
    said = capsys.readouterr()
    return code, said.out + said.err


QUICK = ("--set", "examples=64", "--set", "search_epochs=1", "--set", "retrain_epochs=0.5")


@pytest.mark.parametrize("name", recipes.NAMES)
def test_a_dry_run_says_what_it_will_cost(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: Any, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    arguments = (name, "--preset", "scenes-deit", "--dry-run", *QUICK, "--out", str(out))
    code, said = call(monkeypatch, capsys, *arguments)
    assert code == 0
    for word in ("search", "cut", "retrain", "params", "minutes", "not of the paper"):
        assert word in said
    assert not out.exists()


def test_a_recipe_runs_and_its_folder_is_its_own(
    monkeypatch: pytest.MonkeyPatch, capsys: Any, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    arguments = ("upop", "--preset", "scenes-deit", *QUICK, "--out", str(out))
    code, said = call(monkeypatch, capsys, *arguments)
    assert code == 0, said
    assert "on 1,000 test scenes (classification)" in said
    small = vlprune.from_pretrained(out / "model")
    assert f"achieved {count_params(small):,} params of 749,674" in said
    certificate = read_certificate(out / "model")
    assert not certificate.failed
    assert certificate.claim("masked = cut").verdict == "proven"
    assert json.loads((out / "recipe.json").read_text())["preset"] == "scenes-deit"
    code, said = call(monkeypatch, capsys, *arguments, "--set", "ratio=0.6")
    assert code == 2
    assert "holds another run" in said
    code, said = call(monkeypatch, capsys, "upop", "--preset", "blip-nlvr2")
    assert code == 2
    assert "model must be given: no library has that of 'blip-nlvr2'" in said
