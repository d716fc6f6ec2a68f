"""Faults of other tools that were reproduced by running: none of them is ours."""

import copy

import pytest
import torch
import zoo
from conftest import dissected, inputs_of
from torch import nn

import vlprune
from vlprune.calls import calls_of, run, tensors_of
from vlprune.cost import count_macs, count_params
from vlprune.dissect import default_inputs
from vlprune.errors import PlanError
from vlprune.tasks.retrieval import recall


def half_of_the_heads(anatomy: vlprune.Anatomy) -> dict[str, tuple[int, ...]]:
    return {a.name: tuple(range(a.units // 2)) for a in anatomy.axes if a.kind == "head"}


def test_heads_of_multihead_attention_go_and_none_is_forgotten() -> None:
    model, anatomy = dissected("open_clip")
    small = vlprune.prune(model, vlprune.make_plan(anatomy, half_of_the_heads(anatomy)))
    attentions = [m for m in small.modules() if isinstance(m, nn.MultiheadAttention)]
    assert [m.num_heads for m in attentions] == [2] * 5
    assert all(m.in_proj_weight.shape == (3 * 16, 32) for m in attentions)
    assert all(m.out_proj.in_features == 16 for m in attentions)


def test_heads_go_without_any_neuron_going() -> None:
    model, anatomy = dissected("deit")
    small = vlprune.prune(model, vlprune.make_plan(anatomy, half_of_the_heads(anatomy)))
    assert [block.attn.num_heads for block in small.blocks] == [1, 1, 1]
    assert [block.mlp.fc1.out_features for block in small.blocks] == [192] * 3


def test_timm_counts_follow_without_help() -> None:
    model, anatomy = dissected("deit")
    small = vlprune.prune(model, vlprune.make_plan(anatomy, {"blocks.1.attn:head": (0, 2)}))
    attention = small.blocks[1].attn
    assert (attention.num_heads, attention.attn_dim, attention.head_dim) == (2, 32, 16)
    assert type(attention).__module__.startswith("timm")  # no class of ours is needed


def test_all_heads_of_a_layer_can_go() -> None:
    model, anatomy = dissected("deit")
    small = vlprune.prune(model, vlprune.make_plan(anatomy, {"blocks.1.attn:head": ()}))
    attention = small.blocks[1].attn
    assert attention.num_heads == 0
    x = torch.randn(2, 5, 48)
    assert torch.equal(attention(x), attention.proj.bias.expand(2, 5, 48))


def test_iterative_cuts_remove_what_was_asked_each_time() -> None:
    model, _ = dissected("deit")
    for left in (2, 1):
        anatomy = vlprune.dissect(model)
        keep = {a.name: tuple(range(left)) for a in anatomy.axes if a.kind == "head"}
        model = vlprune.prune(model, vlprune.make_plan(anatomy, keep))
        assert [block.attn.num_heads for block in model.blocks] == [left] * 3


def test_one_model_leaves_no_trace_in_the_next() -> None:
    first = vlprune.dissect(zoo.make("hf_clip"))
    vlprune.dissect(zoo.make("deit"))
    assert vlprune.dissect(zoo.make("hf_clip")) == first


def test_an_index_past_the_end_is_refused() -> None:
    _, anatomy = dissected("deit")
    with pytest.raises(PlanError) as caught:
        vlprune.make_plan(anatomy, {"blocks.0.attn:head": (3, 99)})
    assert str(caught.value) == (
        "axis 'blocks.0.attn:head': keep must hold distinct units in [0, 3), got (3, 99). "
        "A plan fits one anatomy; make it with vlprune.plan."
    )


def test_a_plan_of_another_model_is_refused() -> None:
    _, anatomy = dissected("deit")
    other = zoo.redraw(zoo.deit(depth=4)).eval()
    plan = vlprune.make_plan(anatomy, half_of_the_heads(anatomy))
    with pytest.raises(PlanError, match="plan must fit the model VisionTransformer"):
        vlprune.prune(other, plan)


def test_the_outer_width_stays() -> None:
    for name in ("hf_clip", "BlipForImageTextRetrieval"):
        model, anatomy = dissected(name)
        keep = {a.name: (0,) for a in anatomy.axes if a.removal == "slice"}
        small = vlprune.prune(model, vlprune.make_plan(anatomy, keep))
        before = [t.shape for c in calls_of(inputs_of(model)) for t in tensors_of(run(model, c))]
        after = [t.shape for c in calls_of(inputs_of(model)) for t in tensors_of(run(small, c))]
        assert before == after


def test_frozen_parameters_do_not_vanish_and_stay_frozen() -> None:
    model = zoo.make("deit")
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    anatomy = vlprune.dissect(model)
    assert anatomy == dissected("deit")[1]
    small = vlprune.prune(model, vlprune.make_plan(anatomy, half_of_the_heads(anatomy)))
    assert not any(p.requires_grad for p in small.parameters())


def test_modules_of_a_cut_model_say_their_true_size() -> None:
    model, anatomy = dissected("BlipForConditionalGeneration")
    keep = {a.name: tuple(range(a.units - 1)) for a in anatomy.axes if a.removal == "slice"}
    small = vlprune.prune(model, vlprune.make_plan(anatomy, keep))
    for path, module in small.named_modules():
        if isinstance(module, nn.Linear):
            assert (module.out_features, module.in_features) == tuple(module.weight.shape), path
            assert type(module.in_features) is int


def test_every_forward_of_a_vision_language_model_runs_after_the_cut() -> None:
    model, anatomy = dissected("BlipForImageTextRetrieval")
    keep = {a.name: (0,) for a in anatomy.axes if a.removal == "slice"}
    small = vlprune.prune(model, vlprune.make_plan(anatomy, keep))
    inputs = default_inputs(model)[0]
    for head in (True, False):
        small(**{**inputs, "use_itm_head": head})


def test_tied_weights_stay_tied() -> None:
    model, anatomy = dissected("BlipForQuestionAnswering")
    keep = {a.name: (0,) for a in anatomy.axes if a.removal == "slice"}
    small = vlprune.prune(model, vlprune.make_plan(anatomy, keep))
    decoder = small.text_decoder
    assert decoder.cls.predictions.decoder.weight is decoder.bert.embeddings.word_embeddings.weight


@pytest.mark.parametrize("name", ["BlipForConditionalGeneration", "BlipForQuestionAnswering"])
@pytest.mark.parametrize("case", ["uneven", "no heads in layer 0", "layer 0 gone", "half 0 gone"])
def test_generation_with_a_cache_equals_generation_without(name: str, case: str) -> None:
    model, anatomy = dissected(name)
    stack = "text_decoder.bert.encoder.layer"
    keep = {
        "uneven": {
            f"{stack}.0.attention.self:head": (1,),
            f"{stack}.1.crossattention.self:head": (0, 2),
        },
        "no heads in layer 0": {f"{stack}.0.attention.self:head": ()},
        "layer 0 gone": {f"{stack}:layer": (1,)},
        "half 0 gone": {f"{stack}:sublayer.attention": (1,)},
    }[case]
    small = vlprune.prune(model, vlprune.make_plan(anatomy, keep))
    inputs = default_inputs(model)[0]
    answers = []
    for use_cache in (True, False):
        torch.manual_seed(0)
        answers.append(
            small.generate(
                pixel_values=inputs["pixel_values"],
                input_ids=inputs["input_ids"],
                max_new_tokens=8,
                min_new_tokens=8,
                use_cache=use_cache,
                do_sample=False,
            )
        )
    assert torch.equal(*answers)


def test_macs_are_those_of_torchs_own_counter() -> None:
    model, anatomy = dissected("open_clip")
    assert vlprune.price(anatomy, {}).macs == count_macs(model, default_inputs(model))


def test_constant_embeddings_find_nothing() -> None:
    result = recall(torch.ones(20, 20), torch.arange(20)[:, None])
    assert result.mean == 0


def test_whole_model_compiles_into_one_graph_with_uneven_layers() -> None:
    model, anatomy = dissected("open_clip")
    keep = {
        a.name: tuple(range(1 + i % a.units))
        for i, a in enumerate(anatomy.axes)
        if a.removal == "slice"
    }
    small = vlprune.prune(model, vlprune.make_plan(anatomy, keep))
    compiled = torch.compile(copy.deepcopy(small), backend="eager", fullgraph=True)
    image, text = default_inputs(model, batch=2)
    with torch.no_grad():
        for a, b in zip(
            tensors_of(small(image, text)), tensors_of(compiled(image, text)), strict=True
        ):
            assert torch.allclose(a, b, rtol=1e-5, atol=1e-6)


def test_a_cut_model_pickles_exports_and_copies() -> None:
    import io

    model, anatomy = dissected("open_clip")
    small = vlprune.prune(model, vlprune.make_plan(anatomy, half_of_the_heads(anatomy)))
    inputs = default_inputs(model, batch=2)
    buffer = io.BytesIO()
    torch.save(small, buffer)
    buffer.seek(0)
    with torch.no_grad():
        expected = small(*inputs)
        for other in (
            copy.deepcopy(small),
            torch.load(buffer, weights_only=False),
            torch.export.export(small, inputs).module(),
        ):
            for a, b in zip(tensors_of(expected), tensors_of(other(*inputs)), strict=True):
                assert torch.allclose(a, b, rtol=1e-5, atol=1e-6)


def test_optimisers_made_after_the_cut_train_it() -> None:
    model, anatomy = dissected("deit")
    small = vlprune.prune(model, vlprune.make_plan(anatomy, half_of_the_heads(anatomy)))
    optimiser = torch.optim.SGD(small.parameters(), lr=0.1)
    images = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    losses = []
    for _ in range(5):
        loss = small(images).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    assert count_params(small) == vlprune.price(anatomy, half_of_the_heads(anatomy)).params
