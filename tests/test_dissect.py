"""Anatomies: what is found, where, and that declared = traced."""

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
from vlprune.graph import CoupledGraph

EXPECTED = {  # tower -> (heads, FFN neurons, layers, sub-layers), counted by hand from the configs
    "open_clip": {"vision": (12, 384, 3, 6), "text": (8, 256, 2, 4)},
    "deit": {"vision": (9, 576, 3, 6)},
    "hf_clip": {"vision": (12, 168, 3, 6), "text": (8, 96, 2, 4)},
    "BlipModel": {"vision": (12, 168, 3, 6), "text": (8, 96, 2, 4), "fusion": (8, 0, 0, 2)},
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
    assert anatomy.refusals == ()


def test_the_price_of_nothing_removed_is_what_is_counted(
    tiny: tuple[nn.Module, vlprune.Anatomy],
) -> None:
    model, anatomy = tiny
    assert dense_cost(anatomy).params == count_params(model)
    assert dense_cost(anatomy).macs == count_macs(model, default_inputs(model))


def test_declared_heads_are_the_traced_ones(tiny: tuple[nn.Module, vlprune.Anatomy]) -> None:
    model, anatomy = tiny
    graph = CoupledGraph(model, calls_of(default_inputs(model)))
    agreed = 0
    for axis in anatomy.axes:
        owners = {site.tensor.rpartition(".")[0] for site in axis.sites}
        if axis.removal == "slice" and all(graph.sees(owner) for owner in owners):
            consumer = axis.gate.modules[0]
            traced = set(graph.sites(consumer, axis.units, axis.gate.block))
            if axis.name.endswith("self_attn:head") and "Blip" in anatomy.model:
                # BLIP indexes its fused qkv, of which the graph sees the first third only (PEERS)
                assert traced < set(axis.sites), axis.name
                continue
            assert traced == set(axis.sites), axis.name
            agreed += 1
    assert agreed >= sum(axis.kind == "ffn" for axis in anatomy.axes)


def test_a_declaration_that_disagrees_with_the_trace_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = zoo.make("hf_clip")
    from vlprune.registry import FAMILIES

    family = FAMILIES["hf_clip"]
    import dataclasses

    crooked = dataclasses.replace(
        family.attentions[0], rows=(("q_proj.weight", 1), ("k_proj.weight", 1))
    )
    monkeypatch.setitem(
        FAMILIES._entries, "hf_clip", dataclasses.replace(family, attentions=(crooked,))
    )
    anatomy = vlprune.dissect(model)
    assert "head" not in anatomy.kinds
    assert len(anatomy.refusals) == 5
    assert "declared heads must agree with the traced ones" in anatomy.refusals[0].reason


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


def test_a_model_that_nobody_declared_is_refused_with_the_way_out() -> None:
    with pytest.raises(UnsupportedModelError, match="is a class that no family declares"):
        vlprune.dissect(nn.Sequential(nn.Linear(4, 4)))
    with pytest.raises(UnsupportedModelError, match="must hold an attention or a block"):
        vlprune.dissect(nn.Sequential(nn.Linear(4, 4)), torch.zeros(1, 4))


def test_inputs_that_do_not_run_the_model_are_named() -> None:
    with pytest.raises(TraceError, match="Check that the example inputs run the model"):
        vlprune.dissect(zoo.make("deit"), torch.zeros(1, 3, 8, 8))
    with pytest.raises(TypeError, match="example_inputs must be a tuple"):
        vlprune.dissect(zoo.make("deit"), "an image")


def test_the_trace_has_a_time_limit() -> None:
    with pytest.raises(TraceError, match=r"must end within 0\.001 s; it did not"):
        vlprune.dissect(zoo.make("BlipForQuestionAnswering"), limit_s=0.001)


def test_a_norm_over_hidden_features_is_refused_by_name() -> None:
    model = zoo.redraw(zoo.deit(scale_mlp_norm=True, scale_attn_norm=True)).eval()
    anatomy = vlprune.dissect(model)
    reasons = {refusal.module: refusal.reason for refusal in anatomy.refusals}
    assert "a norm over all heads" in reasons["blocks.0.attn"]
    assert reasons["blocks.0.mlp.fc2"] == "neurons stay: blocks.0.mlp.norm normalises over them"
    assert anatomy.kinds == ("layer", "sublayer")


@pytest.mark.parametrize("options", [{"qk_norm": True}, {"init_values": 0.5}, {"qkv_bias": False}])
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
    assert [stack.path for stack in view.stacks] == [
        "vision_model.encoder.layers",
        "text_encoder.encoder.layer",
        "text_decoder.bert.encoder.layer",
    ]
    tied = view.tensor_name("text_decoder.cls.predictions.decoder.weight")
    assert tied == "text_decoder.bert.embeddings.word_embeddings.weight"


def test_a_part_that_the_example_inputs_do_not_reach_is_named() -> None:
    model = zoo.make("BlipForQuestionAnswering")
    inputs = default_inputs(model)[0]
    del inputs["labels"]  # then no output depends on the text
    anatomy = vlprune.dissect(model, inputs)
    reasons = {refusal.module: refusal.reason for refusal in anatomy.refusals}
    assert reasons["text_encoder.encoder.layer.1"] == (
        "neurons stay: the example inputs' outputs do not depend on it"
    )
