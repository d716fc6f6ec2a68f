"""Anatomies: what is found, where, and that what was probed is what the graph traces."""

import dataclasses

import pytest
import torch
import zoo
from conftest import dissected
from torch import nn

import vlprune
from vlprune.calls import calls_of
from vlprune.cost import count_macs, count_params, dense_cost
from vlprune.dissect import ModelView, default_inputs
from vlprune.errors import TraceError, UnsupportedModelError
from vlprune.graph import CoupledGraph, verdicts
from vlprune.registry import FAMILIES

EXPECTED = {  # tower -> (heads, FFN neurons, layers, sub-layers), counted by hand from the configs
    "open_clip": {"vision": (12, 384, 3, 6), "text": (8, 256, 2, 4)},
    "deit": {"vision": (9, 576, 3, 6)},
    "segmenter": {"vision": (9, 576, 3, 6), "decoder": (8, 256, 2, 4)},
    "hf_clip": {"vision": (12, 168, 3, 6), "text": (8, 96, 2, 4)},
    "BlipModel": {"vision": (12, 168, 3, 6), "text": (8, 96, 2, 4), "fusion": (0, 0, 0, 2)},
    "BlipForImageTextRetrieval": {
        "vision": (12, 168, 3, 6),
        "text": (8, 96, 2, 4),
        "fusion": (8, 0, 0, 2),
    },
    "BlipForQuestionAnswering": {
        "vision": (12, 168, 3, 6),
        "text": (8, 96, 2, 4),
        "fusion": (8, 0, 0, 2),
        "decoder": (16, 96, 2, 6),
    },
    "BlipForConditionalGeneration": {"vision": (12, 168, 3, 6), "decoder": (16, 96, 2, 6)},
    "BlipForVisualReasoning": {
        "vision": (12, 168, 3, 6),
        "text": (8, 96, 2, 4),
        "fusion": (8, 0, 0, 2),
    },
}

UNREACHED = {  # a BlipModel holds cross attentions that its forward never calls
    "BlipModel": [f"text_model.encoder.layer.{i}.crossattention" for i in (0, 1)]
}


@pytest.mark.parametrize("name", list(zoo.MAKERS))
def test_every_head_neuron_layer_and_half_is_found(name: str) -> None:
    _, anatomy = dissected(name)
    found = {}
    for tower in {axis.tower for axis in anatomy.axes}:
        found[tower] = tuple(
            sum(a.units for a in anatomy.axes if a.tower == tower and a.kind == kind)
            for kind in ("head", "ffn", "layer", "sublayer")
        )
    assert found == EXPECTED[name]
    single = {r.module for r in anatomy.refusals if r.kind == "head_dim_per_head"}
    heads = {axis.path for axis in anatomy.axes if axis.kind == "head"}
    assert single == (heads if name == "open_clip" else set())  # nn.MultiheadAttention
    others = [r for r in anatomy.refusals if r.kind != "head_dim_per_head"]
    assert {r.module for r in others} == set(UNREACHED.get(name, ()))
    assert {r.reason for r in others} <= {"the example inputs do not reach it"}


def test_the_price_of_nothing_removed_is_what_is_counted(
    tiny: tuple[nn.Module, vlprune.Anatomy],
) -> None:
    model, anatomy = tiny
    assert dense_cost(anatomy).params == count_params(model)
    assert dense_cost(anatomy).macs == count_macs(model, default_inputs(model))


def test_probed_units_are_the_traced_ones(tiny: tuple[nn.Module, vlprune.Anatomy]) -> None:
    model, anatomy = tiny
    found = verdicts(model, calls_of(default_inputs(model)), anatomy.axes)
    for name, verdict in found.items():
        if name.endswith("self_attn:head") and "Blip" in anatomy.model:
            # BLIP indexes its fused qkv, of which the graph sees the first third only (PEERS)
            assert verdict == "sees a part", name
        elif name.endswith("attn:head") and anatomy.model == "CLIP":
            assert verdict == "sees nothing", name  # nn.MultiheadAttention
        else:
            assert verdict == "agrees", name
    assert len(found) == sum(axis.kind in ("head", "ffn") for axis in anatomy.axes)


class Crooked(torch.nn.Module):
    """Takes the place of an attention and answers something else."""

    def forward(self, hidden_states: torch.Tensor, **kwargs: object) -> tuple[torch.Tensor, None]:
        return self.out_proj(self.v_proj(hidden_states)), None


def test_a_declared_class_that_computes_something_else_is_not_taken_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    family = FAMILIES["hf_clip"]
    crooked = dataclasses.replace(family.attentions[0], cut=f"{__name__}:Crooked")
    monkeypatch.setitem(
        FAMILIES._entries, "hf_clip", dataclasses.replace(family, attentions=(crooked,))
    )
    anatomy = vlprune.dissect(zoo.make("hf_clip"))
    heads = anatomy.select(("head",)).axes
    assert len(heads) == 5
    for axis in heads:  # proven in another way: the projections are padded
        cut = {swap.to for swap in axis.swaps if swap.when == "cut"}
        assert cut == {"vlprune.classes.padded:PaddedLinear"}


def test_dissecting_leaves_the_model_as_it_was() -> None:
    model = zoo.make("BlipForQuestionAnswering").train()
    for parameter in list(model.parameters())[::2]:
        parameter.requires_grad_(False)
    before = {n: (t.clone(), t.requires_grad) for n, t in model.named_parameters()}
    modes = [module.training for module in model.modules()]
    anatomy = vlprune.dissect(model)
    assert [module.training for module in model.modules()] == modes
    for name, tensor in model.named_parameters():
        assert torch.equal(tensor, before[name][0])
        assert tensor.requires_grad == before[name][1]
        assert tensor.grad is None
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert anatomy == vlprune.dissect(zoo.make("BlipForQuestionAnswering"))  # frozen or not


def test_a_model_without_anything_to_cut_is_refused_with_the_way_out() -> None:
    with pytest.raises(UnsupportedModelError, match="is a class that no family declares"):
        vlprune.dissect(nn.Sequential(nn.Linear(4, 4)))
    with pytest.raises(UnsupportedModelError, match="must hold an attention, a feed-forward"):
        vlprune.dissect(nn.Sequential(nn.Linear(4, 4)), torch.zeros(1, 4))


def test_inputs_that_do_not_run_the_model_are_named() -> None:
    with pytest.raises(TraceError, match=r"must run on the example inputs; it raised .*Input heig"):
        vlprune.dissect(zoo.make("deit"), torch.zeros(1, 3, 8, 8))
    with pytest.raises(TypeError, match="example_inputs must be a tuple"):
        vlprune.dissect(zoo.make("deit"), "an image")


def test_the_trace_of_the_dependency_graph_has_a_time_limit() -> None:
    model = zoo.make("BlipForQuestionAnswering")
    with pytest.raises(TraceError, match=r"must end within 0\.001 s; it did not"):
        CoupledGraph(model, calls_of(default_inputs(model)), limit_s=0.001)


@pytest.mark.parametrize(
    "options",
    [
        {"qk_norm": True},
        {"init_values": 0.5},
        {"qkv_bias": False},
        {"scale_mlp_norm": True, "scale_attn_norm": True},  # norms over the cut features
    ],
)
def test_variants_of_timm_obey_the_law(options: dict[str, object]) -> None:
    from conftest import random_keep

    model = zoo.redraw(zoo.deit(**options)).eval()
    anatomy = vlprune.dissect(model)
    small = vlprune.prune(model, vlprune.make_plan(anatomy, random_keep(anatomy, 4)))
    assert count_params(small) == vlprune.price(anatomy, random_keep(anatomy, 4)).params


def test_axes_have_names_towers_and_depths(clip: tuple[nn.Module, vlprune.Anatomy]) -> None:
    _, anatomy = clip
    axis = anatomy.axis("visual.transformer.resblocks.2.attn:head")
    assert (axis.tower, axis.depth, axis.units) == ("vision", 2, 4)
    halves = anatomy.axis("transformer.resblocks:sublayer.ffn")
    assert [halves.layer(unit) for unit in range(halves.units)] == [0, 1]
    with pytest.raises(LookupError, match="axis 'nothing' is not in this anatomy of CLIP"):
        anatomy.axis("nothing")


def test_a_view_knows_stacks_and_tied_tensors() -> None:
    model = zoo.make("BlipForQuestionAnswering")
    view = ModelView(model, calls_of(default_inputs(model)))
    assert {stack.path for stack in view.discovery.stacks} == {
        "vision_model.encoder.layers",
        "text_encoder.encoder.layer",
        "text_decoder.bert.encoder.layer",
    }
    tied = view.tensor_names("text_decoder.cls.predictions.decoder.weight")
    assert tied[0] == "text_decoder.bert.embeddings.word_embeddings.weight"


def test_a_part_that_no_output_carries_is_proven_all_the_same() -> None:
    model = zoo.make("BlipForQuestionAnswering")
    inputs = default_inputs(model)[0]
    whole = vlprune.dissect(model, inputs)
    del inputs["labels"]  # then no output depends on the text
    assert vlprune.dissect(model, inputs).axes == whole.axes


def test_a_part_that_the_example_inputs_do_not_reach_is_named() -> None:
    model = zoo.make("BlipForImageTextRetrieval")
    inputs = default_inputs(model)[1]  # contrastive: no cross attention
    assert inputs["use_itm_head"] is False
    anatomy = vlprune.dissect(model, inputs)
    assert {(r.module, r.reason) for r in anatomy.refusals} == {
        (f"text_encoder.encoder.layer.{i}.crossattention", "the example inputs do not reach it")
        for i in (0, 1)
    }
