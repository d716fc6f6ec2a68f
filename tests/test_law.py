"""The law of the house: masked = cut, for every family, strategy and plan; faults are caught."""

import copy
import os

import pytest
import torch
import zoo
from conftest import dissected, inputs_of, random_keep
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from torch import nn

import vlprune
from vlprune.anatomy import under
from vlprune.calls import calls_of, run, tensors_of
from vlprune.cost import count_macs, count_params, shapes_after
from vlprune.cutting import cut_
from vlprune.dissect import default_inputs
from vlprune.errors import LawError
from vlprune.law import check_masked_equals_cut, relative_error
from vlprune.plan import PlanRow
from vlprune.pruner import record_of
from vlprune.registry import STRATEGIES

KINDS = [*STRATEGIES, "all"]
PLANS = int(os.environ.get("LAW_PLANS", "2"))  # random ones of each model and kind, anew every run
LAWS = settings(max_examples=PLANS, deadline=None, suppress_health_check=list(HealthCheck))


def outputs(model: nn.Module, inputs: object) -> list[torch.Tensor]:
    with torch.no_grad():
        return [t for call in calls_of(inputs) for t in tensors_of(run(model, call))]


def selected(kind: str) -> tuple[str, ...]:
    return () if kind == "all" else (kind,)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", list(zoo.MAKERS))
@LAWS
@given(seed=st.integers(0, 10**6))
@example(seed=0)
def test_masked_model_computes_what_the_cut_model_computes(name: str, kind: str, seed: int) -> None:
    model, anatomy = dissected(name)
    packed = kind == "head_dim_per_head" and name == "open_clip"
    if packed or kind == "expert":
        # nn.MultiheadAttention calls no projection as a module; mixtures are in test_experts.py
        assert kind not in anatomy.kinds
        return
    assert set(selected(kind)) <= set(anatomy.kinds)
    plan = vlprune.make_plan(anatomy, random_keep(anatomy, seed, selected(kind)))
    small = vlprune.prune(model, plan, inputs_of(model))
    error = record_of(small).relative_error
    assert error is not None
    assert error <= 1e-9
    planned = vlprune.price(anatomy, plan.keep)
    assert planned.params == count_params(small)
    assert planned.macs == count_macs(small, default_inputs(model))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("extreme", ["one unit left", "as few as may be"])
def test_extreme_plans_obey_the_law(
    tiny: tuple[nn.Module, vlprune.Anatomy], kind: str, extreme: str
) -> None:
    model, anatomy = tiny
    axes = anatomy.select(selected(kind) or anatomy.kinds).axes
    keep = {
        a.name: (a.units - 1,) if extreme == "one unit left" else tuple(range(a.least))
        for a in axes
    }
    small = vlprune.prune(model, vlprune.make_plan(anatomy, keep), inputs_of(model))
    assert record_of(small).relative_error <= 1e-9


def test_keeping_everything_changes_no_bit(tiny: tuple[nn.Module, vlprune.Anatomy]) -> None:
    model, anatomy = tiny
    keep = {axis.name: tuple(range(axis.units)) for axis in anatomy.axes}
    small = vlprune.prune(model, vlprune.make_plan(anatomy, keep), inputs_of(model))
    assert [type(m) for m in small.modules()] == [type(m) for m in model.modules()]
    for before, after in zip(
        outputs(model, inputs_of(model)), outputs(small, inputs_of(model)), strict=True
    ):
        assert torch.equal(before, after)


def test_requested_is_removed(tiny: tuple[nn.Module, vlprune.Anatomy]) -> None:
    model, anatomy = tiny
    keep = random_keep(anatomy, 3, ("head", "ffn", "sublayer"))  # layers would renumber the names
    small = vlprune.prune(model, vlprune.make_plan(anatomy, keep), inputs_of(model))
    expected = {n: s for n, s in shapes_after(anatomy, keep).items() if s is not None}
    named = [*small.named_parameters(), *small.named_buffers()]
    got = {name: tuple(t.shape) for name, t in named if name != "weight_dtype"}
    assert {n: s for n, s in got.items() if not n.endswith(".weight_dtype")} == expected


@pytest.mark.parametrize("seed", [0, *(pytest.param(n, marks=pytest.mark.slow) for n in (1, 2))])
def test_two_cuts_compose(tiny: tuple[nn.Module, vlprune.Anatomy], seed: int) -> None:
    model, anatomy = tiny
    kinds = ("head", "ffn")
    first = random_keep(anatomy, seed, kinds)
    once = vlprune.prune(model, vlprune.make_plan(anatomy, first), inputs_of(model))
    again = vlprune.dissect(once)
    second = random_keep(again, seed + 100, kinds)
    twice = vlprune.prune(once, vlprune.make_plan(again, second), inputs_of(model))
    assert record_of(twice).relative_error <= 1e-9
    assert len(record_of(twice).plans) == 2
    composed = {
        name: tuple(units[i] for i in second[name]) if name in second else units
        for name, units in first.items()
    }
    direct = vlprune.prune(model, vlprune.make_plan(anatomy, composed), inputs_of(model))
    assert twice.state_dict().keys() == direct.state_dict().keys()
    for name, tensor in direct.state_dict().items():
        assert torch.equal(tensor, twice.state_dict()[name]), name


@pytest.mark.parametrize("first", [("head_dim",), ("head_dim_per_head",), ("head", "head_dim")])
@pytest.mark.parametrize("name", ["deit", "hf_clip"])
def test_what_lost_dimensions_is_cut_again_or_named(name: str, first: tuple[str, ...]) -> None:
    model, anatomy = dissected(name)
    plan = vlprune.make_plan(anatomy, random_keep(anatomy, 3, first))
    once = vlprune.prune(model, plan, inputs_of(model))
    again = vlprune.dissect(once)
    for kinds in (("head",), ("head_dim",), again.kinds):
        plan = vlprune.make_plan(again, random_keep(again, 9, kinds))
        twice = vlprune.prune(once, plan, inputs_of(model))
        assert not plan.rows or record_of(twice).relative_error <= 1e-9
        assert count_params(twice) == vlprune.price(again, plan.keep).params
    named = {r.module for r in again.refusals}
    for axis in anatomy.axes:
        if axis.kind == "head" and axis.name not in {a.name for a in again.axes}:
            assert any(under(path, axis.path) for path in named), axis.name


def test_layers_can_go_in_two_cuts(tiny: tuple[nn.Module, vlprune.Anatomy]) -> None:
    model, anatomy = tiny
    first = {a.name: tuple(range(1, a.units)) for a in anatomy.axes if a.kind == "layer"}
    once = vlprune.prune(model, vlprune.make_plan(anatomy, first), inputs_of(model))
    again = vlprune.dissect(once)
    second = {a.name: tuple(range(a.units - 1)) for a in again.axes if a.kind == "layer"}
    twice = vlprune.prune(once, vlprune.make_plan(again, second), inputs_of(model))
    assert record_of(twice).relative_error <= 1e-9
    for name, kept in second.items():
        assert len(twice.get_submodule(name.removesuffix(":layer"))) == len(kept)


def test_the_given_model_stays_as_it_was(tiny: tuple[nn.Module, vlprune.Anatomy]) -> None:
    model, anatomy = tiny
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    classes = [type(module) for module in model.modules()]
    vlprune.prune(model, vlprune.make_plan(anatomy, random_keep(anatomy, 5)), inputs_of(model))
    assert [type(module) for module in model.modules()] == classes
    assert all(torch.equal(before[name], t) for name, t in model.state_dict().items())


def test_inplace_cuts_the_given_model() -> None:
    model = zoo.make("deit")
    anatomy = vlprune.dissect(model)
    plan = vlprune.make_plan(anatomy, random_keep(anatomy, 1))
    small = vlprune.prune(model, plan, inputs_of(model), inplace=True)
    assert small is model
    assert count_params(model) == vlprune.price(anatomy, plan.keep).params


# -- faults that are planted, and caught ----------------------------------------------------------


def planted(name: str, kind: str = "head") -> tuple[nn.Module, nn.Module, vlprune.Plan]:
    """A model, its cut copy to plant a fault in, and the plan; one unit goes on every axis."""
    model, anatomy = dissected(name)
    keep = {a.name: tuple(range(1, a.units)) for a in anatomy.axes if a.kind == kind}
    plan = vlprune.make_plan(anatomy, keep)
    cut = copy.deepcopy(model)
    cut_(cut, plan.rows)
    return model, cut, plan


def check(model: nn.Module, cut: nn.Module, plan: vlprune.Plan) -> LawError:
    with pytest.raises(LawError) as caught:
        check_masked_equals_cut(model, cut, plan, inputs_of(model))
    return caught.value


def test_without_a_fault_the_check_passes() -> None:
    model, cut, plan = planted("deit")
    assert check_masked_equals_cut(model, cut, plan, inputs_of(model)) <= 1e-9


@torch.no_grad()
def test_a_wrong_head_order_is_caught_and_named() -> None:
    model, cut, plan = planted("deit")
    weight = cut.blocks[1].attn.proj.weight
    weight.copy_(weight.roll(16, dims=1))
    error = check(model, cut, plan)
    assert error.module.startswith("blocks.1.attn")
    assert error.relative_error > 1e-6
    assert "masked and cut model must agree" in str(error)
    assert "blocks.1.attn" in str(error)


def test_a_skipped_layer_is_caught() -> None:
    model, cut, plan = planted("deit", "layer")
    del cut.blocks[0]
    assert check(model, cut, plan).relative_error > 1e-6


def test_the_wrong_layer_gone_is_caught_and_named() -> None:
    model, anatomy = dissected("deit")
    plan = vlprune.make_plan(anatomy, {"blocks:layer": (0, 2)})
    cut = copy.deepcopy(model)
    cut_(cut, vlprune.make_plan(anatomy, {"blocks:layer": (0, 1)}).rows)
    assert check(model, cut, plan).module.startswith("blocks.2")


def test_a_stale_num_heads_is_caught_and_named() -> None:
    model, cut, plan = planted("deit")
    cut.blocks[2].attn.num_heads = 3
    error = check(model, cut, plan)
    assert "it raised" in str(error)
    assert error.module.startswith("blocks.2.attn")


@torch.no_grad()
def test_a_live_bias_is_caught_and_named() -> None:
    model, cut, plan = planted("BlipForImageTextRetrieval")
    cut.vision_model.encoder.layers[0].self_attn.qkv.bias.normal_()
    assert check(model, cut, plan).module.startswith("vision_model.encoder.layers.0.self_attn")


@torch.no_grad()
def test_a_changed_softmax_scale_is_caught() -> None:
    model, cut, plan = planted("BlipForImageTextRetrieval")
    cut.vision_model.encoder.layers[1].self_attn.scale *= 1.01
    assert "vision_model.encoder.layers.1" in check(model, cut, plan).module


@torch.no_grad()
def test_a_nan_is_no_agreement() -> None:
    model, cut, plan = planted("deit")
    cut.head.bias[0] = float("nan")
    check(model, cut, plan)


def test_prune_does_not_return_a_model_that_breaks_the_law(monkeypatch: pytest.MonkeyPatch) -> None:
    model, anatomy = dissected("deit")
    plan = vlprune.make_plan(anatomy, {"blocks.0.attn:head": (0, 2)})

    def crooked(cut: nn.Module, rows: tuple[PlanRow, ...]) -> None:
        cut_(cut, rows)
        cut.blocks[0].attn.qkv.bias.data += 1

    monkeypatch.setattr("vlprune.pruner.cut_", crooked)
    with pytest.raises(LawError, match=r"first at module 'blocks\.0\.attn"):
        vlprune.prune(model, plan, inputs_of(model))


def test_relative_error_by_hand() -> None:
    a = torch.tensor([1.0, -4.0])
    assert relative_error(a, torch.tensor([1.0, -4.0])) == 0
    assert relative_error(a, torch.tensor([2.0, -4.0])) == 0.25
    assert relative_error(a, torch.zeros(3)) == float("inf")
    assert relative_error(torch.tensor([1]), torch.tensor([2])) == float("inf")
