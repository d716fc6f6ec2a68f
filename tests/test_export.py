"""Plain folders load without this package; programs compute what the model computes."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from conftest import dissected, inputs_of, random_keep
from torch import nn

import vlprune
from vlprune.calls import calls_of, run, tensors_of
from vlprune.cost import count_params, dense_cost, least_cost, price
from vlprune.errors import BudgetError, CheckpointError, LawError, PlanError
from vlprune.export import files_of, to_onnx, to_torch_export
from vlprune.history import fates_of
from vlprune.plain import plain_plan, restriction, stock_groups, to_plain
from vlprune.pruner import attach_record, record_of
from vlprune.shipped import SHIPPED

KINDS = ("head", "ffn", "layer")
STOCK = [
    "deit",
    "open_clip",
    pytest.param("hf_clip", marks=pytest.mark.slow),
    pytest.param("BlipForImageTextRetrieval", marks=pytest.mark.slow),
    pytest.param("BlipForQuestionAnswering", marks=pytest.mark.slow),
]

CLEAN = """
import sys
sys.modules["vlprune"] = None  # importing it raises
import torch, {library}
calls = torch.load({inputs!r})
model = {load}.eval()
with torch.no_grad():
    torch.save([model(*args, **kwargs) for args, kwargs in calls], {outputs!r})
assert not [name for name in sys.modules if name.startswith("vlprune.")]
"""


def scored(model: nn.Module, anatomy: vlprune.Anatomy) -> vlprune.Scores:
    chosen = anatomy.select(KINDS)
    return vlprune.score(model, "random", anatomy=chosen, strategies=KINDS, seed=3)


def load_in_a_clean_process(plain: vlprune.plain.Plain, small: nn.Module, folder: Path) -> None:
    """Load a plain folder where this package cannot be imported, and compare the answers."""
    calls = [(call.args, dict(call.kwargs)) for call in calls_of(inputs_of(small))]
    torch.save(calls, folder / "in.pt")
    code = CLEAN.format(
        library=plain.load.partition(".")[0],
        load=plain.load,
        inputs=str(folder / "in.pt"),
        outputs=str(folder / "out.pt"),
    )
    subprocess.run([sys.executable, "-I", "-c", code], check=True, cwd=folder, timeout=120)
    got = list(tensors_of(torch.load(folder / "out.pt", weights_only=False)))
    with torch.no_grad():
        expected = list(tensors_of([run(small, call) for call in calls_of(inputs_of(small))]))
    assert len(got) == len(expected) > 0
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


# -- plain -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", STOCK)
def test_a_plain_plan_is_held_by_the_stock_class(name: str, tmp_path: Path) -> None:
    model, anatomy = dissected(name)
    plan = plain_plan(scored(model, anatomy), {"prunable_params": 0.7}, model)
    assert plan.planned.params < plan.dense.params
    small = vlprune.prune(model, plan)
    plain = to_plain(small, tmp_path / "plain")
    assert plain.params == count_params(small) == plan.planned.params
    assert plain.relative_error == 0
    for row in plan.rows:
        assert row.axis.kind != "head" or not row.removed


@pytest.mark.parametrize(
    "name",
    [
        "deit",
        *(
            pytest.param(name, marks=pytest.mark.slow)
            for name in SHIPPED
            if name not in ("scenes-segmenter", "scenes-blip-reasoning")
        ),
    ],
)
def test_plain_models_load_without_this_package(name: str, tmp_path: Path) -> None:
    model = vlprune.create_model(name) if name in SHIPPED else dissected(name)[0]
    scores = vlprune.score(model, "magnitude", strategies=("ffn",))
    plan = plain_plan(scores, {"params": 0.8}, model)
    small = vlprune.prune(model, plan)
    plain = to_plain(small, tmp_path / "plain")
    assert str(tmp_path / "plain") in plain.load
    load_in_a_clean_process(plain, small, tmp_path)


@pytest.mark.slow
def test_text_encoder_and_decoder_of_one_config_lose_units_together() -> None:
    model, anatomy = dissected("BlipForQuestionAnswering")
    groups = {axes[0].kind: axes for axes in stock_groups(model, anatomy) if len(axes) > 3}
    assert {axis.tower for axis in groups["ffn"]} == {"text", "decoder"}


def test_a_plain_plan_keeps_the_best_units_and_equally_many() -> None:
    model, anatomy = dissected("deit")
    scores = scored(model, anatomy.select(("ffn",)))
    plan = plain_plan(scores, {"params": 0.8}, model)
    assert len({len(row.keep) for row in plan.rows}) == 1
    for row in plan.rows:
        values = scores.values[row.axis.name]
        assert min(values[u] for u in row.keep) >= max(values[u] for u in row.removed)
    more = {row.axis.name: (*row.keep, row.removed[0]) for row in plan.rows}
    assert price(scores.anatomy, more).params > 0.8 * plan.dense.params  # met within one set


def test_a_plain_budget_that_cannot_be_met_is_refused() -> None:
    model, anatomy = dissected("deit")
    scores = scored(model, anatomy)
    least = least_cost(scores.anatomy).params / dense_cost(scores.anatomy).params
    with pytest.raises(BudgetError, match=r"asks for .* params; these axes can reach"):
        plain_plan(scores, {"params": least * 0.5}, model)
    heads = vlprune.score(model, "random", anatomy=anatomy, strategies=("head",), seed=0)
    with pytest.raises(PlanError, match="must be able to lose some of head; it can hold none"):
        plain_plan(heads, {"params": 0.9}, model)


def test_the_restriction_has_a_price_and_a_measure() -> None:
    model = vlprune.create_model("scenes-deit")
    task = SHIPPED["scenes-deit"].task("test", 64, 0, 64)
    scores = vlprune.score(model, "magnitude", strategies=("ffn",))
    plan = plain_plan(scores, {"params": 0.7}, model)
    cost = restriction(scores, plan, model, task)
    assert 0 < cost.plain <= cost.free < 1
    small = vlprune.prune(model, plan, verify=False)
    assert cost.measures[1] == pytest.approx(task.measure(small), abs=1e-6)
    assert f"measure {cost.measures[1]:.2f} (free {cost.measures[0]:.2f})" in str(cost)


@pytest.mark.parametrize("name", ["deit", "open_clip", "hf_clip"])
def test_what_a_stock_class_cannot_hold_is_refused_by_axis(name: str, tmp_path: Path) -> None:
    model, anatomy = dissected(name)
    axes = [axis for axis in anatomy.axes if axis.kind == "ffn" and axis.tower == "vision"]
    uneven = {axis.name: tuple(range(10 + i)) for i, axis in enumerate(axes)}
    small = vlprune.prune(model, vlprune.make_plan(anatomy, uneven), verify=False)
    with pytest.raises(PlanError, match=r"vision ffn 10 11 12 of \d+.*vlprune plan SCORES --plain"):
        to_plain(small, tmp_path / "plain")
    heads = {axis.name: (0,) for axis in anatomy.axes if axis.kind == "head"}
    small = vlprune.prune(model, vlprune.make_plan(anatomy, heads), verify=False)
    with pytest.raises(PlanError, match=r"it keeps .*vision head 1 1 1 of \d"):
        to_plain(small, tmp_path / "plain")
    assert not (tmp_path / "plain").exists()


def test_classes_of_no_library_are_refused(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match=r"must be of a library that loads it by itself; vlprune\."):
        to_plain(dissected("segmenter")[0], tmp_path / "plain")
    with pytest.raises(PlanError, match="the class must be one of transformers"):
        to_plain(dissected("BlipForVisualReasoning")[0], tmp_path / "plain")


def test_a_folder_that_holds_something_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years")
    with pytest.raises(CheckpointError, match="must be new or empty"):
        to_plain(dissected("deit")[0], tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_a_source_that_forgets_something_is_caught(tmp_path: Path) -> None:
    model, anatomy = dissected("open_clip")
    plan = plain_plan(scored(model, anatomy), {"prunable_params": 0.7}, model)
    small = vlprune.prune(model, plan)
    source = json.loads(json.dumps(record_of(small).source))
    source["arguments"]["quick_gelu"] = True
    attach_record(small, dataclasses.replace(record_of(small), source=source))
    with pytest.raises(LawError, match="must compute what the cut model computes"):
        to_plain(small, tmp_path / "plain")
    assert not (tmp_path / "plain").exists()


# -- heads and per_layer_config, where a class takes them ------------------------------------------


def llama() -> nn.Module:
    config = transformers.LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        vocab_size=40,
        max_position_embeddings=32,
    )
    return transformers.LlamaForCausalLM(config).eval()


def test_heads_go_where_a_config_has_their_width(tmp_path: Path) -> None:
    model = llama()
    anatomy = vlprune.dissect(model)
    keep = {axis.name: (1,) for axis in anatomy.axes if axis.kind == "head"}
    keep |= {axis.name: tuple(range(20)) for axis in anatomy.axes if axis.kind == "ffn"}
    small = vlprune.prune(model, vlprune.make_plan(anatomy, keep))
    assert to_plain(small, tmp_path / "plain").relative_error == 0
    config = json.loads((tmp_path / "plain" / "config.json").read_text())
    assert (config["num_attention_heads"], config["num_key_value_heads"]) == (2, 1)
    assert (config["head_dim"], config["intermediate_size"]) == (8, 20)


def test_per_layer_config_is_tried_and_refused_where_a_class_does_not_read_it(tmp_path) -> None:
    model = llama()
    anatomy = vlprune.dissect(model)
    ffns = [axis.name for axis in anatomy.axes if axis.kind == "ffn"]
    keep = {name: tuple(range(20 + i)) for i, name in enumerate(ffns)}
    small = vlprune.prune(model, vlprune.make_plan(anatomy, keep), verify=False)
    with pytest.raises(PlanError, match=r"AmbiguousGlobalPerLayerAttributeError.*ffn 20 21 of 48"):
        to_plain(small, tmp_path / "plain")


# -- history ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["deit", pytest.param("BlipForQuestionAnswering", marks=pytest.mark.slow)]
)
def test_fates_count_what_two_cuts_left(name: str) -> None:
    model, anatomy = dissected(name)
    small = model
    for seed in (1, 2):
        anatomy = vlprune.dissect(small)
        small = vlprune.prune(
            small, vlprune.make_plan(anatomy, random_keep(anatomy, seed, KINDS)), verify=False
        )
    sizes = {tensor: value.shape for tensor, value in small.state_dict().items()}
    seen = 0
    for fate in fates_of(record_of(small).plans).values():
        assert len(fate.keep) <= fate.axis.units
        if fate.axis.kind == "ffn":
            tensor, dim, size = fate.tensors[0]
            assert sizes[tensor][dim] == len(fate.keep) * size
            seen += 1
    assert seen == len(
        [n for n in sizes if n.endswith(("fc1.weight", "intermediate.dense.weight"))]
    )


# -- programs --------------------------------------------------------------------------------------


def halved(name: str) -> nn.Module:
    model, anatomy = dissected(name)
    return vlprune.prune(model, vlprune.make_plan(anatomy, random_keep(anatomy, 1, ("ffn",))))


@pytest.mark.parametrize("write", [to_torch_export, pytest.param(to_onnx, marks=pytest.mark.slow)])
def test_a_program_computes_the_same_for_any_batch(write, tmp_path: Path) -> None:
    done = write(halved("deit"), tmp_path / "program")
    assert done.relative_error <= 1e-5
    assert done.any_batch
    assert (tmp_path / "program").stat().st_size > 10_000


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["scenes-clip", "scenes-deit", "scenes-blip-retrieval", "scenes-blip-vqa"]
)
def test_shipped_models_export(name: str, tmp_path: Path) -> None:
    model = vlprune.create_model(name)
    for write in (to_torch_export, to_onnx):
        files = files_of(model, tmp_path / "m.bin")
        assert len(files) == (2 if name == "scenes-blip-retrieval" else 1)
        for path, inputs in files:
            done = write(model, path, example_inputs=inputs)
            print(name, write.__name__, done)
            assert done.relative_error <= 1e-4


def test_a_program_that_differs_is_removed(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("vlprune.export._error", lambda *_: 0.5)
    with pytest.raises(
        LawError, match=r"must answer as the model does, to 0\.0001; got a relative"
    ):
        to_torch_export(halved("deit"), tmp_path / "m.pt2")
    assert not (tmp_path / "m.pt2").exists()


def test_several_forwards_are_refused(tmp_path: Path) -> None:
    x = torch.randn(2, 3, 32, 32)
    with pytest.raises(ValueError, match="example_inputs must be of one forward"):
        to_torch_export(dissected("deit")[0], tmp_path / "m.pt2", example_inputs=[(x,), (x,)])


def test_without_onnx_the_extra_is_named(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(ImportError, match=r"pip install 'vlprune\[onnx\]'"):
        to_onnx(dissected("deit")[0], tmp_path / "m.onnx")
