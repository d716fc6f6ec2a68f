"""What is heard of attentions and layers is what the models themselves report."""

import math

import pytest
import torch
import torch.nn.functional as F
import zoo
from conftest import dissected
from torch import nn

from vlprune.calls import calls_of, run
from vlprune.dissect import default_inputs
from vlprune.recover.listening import listening_to_attention, listening_to_outputs


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("name", list(zoo.MAKERS))
def test_every_attention_is_heard_and_sums_to_one(name: str, grad: bool) -> None:
    model, anatomy = dissected(name)
    heads = {axis.path: axis.units for axis in anatomy.axes if axis.kind == "head"}
    inputs = calls_of(default_inputs(model, batch=2))
    with torch.no_grad():
        before = [run(model, call) for call in inputs]
    with torch.set_grad_enabled(grad), listening_to_attention(model, heads) as heard:
        for call in inputs:
            run(model, call)
    for path, rows in heard.items():
        assert rows, path
        for row in rows:
            assert row.shape[1] == heads[path]
            torch.testing.assert_close(row.sum(-1), torch.ones(row.shape[:-1]))
            assert row.requires_grad == grad
    with torch.no_grad():  # and listening changed nothing, nor does it go on
        after = [run(model, call) for call in inputs]
    assert all(len(rows) <= len(inputs) for rows in heard.values())
    assert str(before) == str(after)


def test_it_is_what_transformers_gives_out() -> None:
    model, anatomy = dissected("hf_clip")
    heads = [axis for axis in anatomy.axes if axis.kind == "head"]
    (call,) = calls_of(default_inputs(model, batch=2))
    with listening_to_attention(model, [axis.path for axis in heads]) as heard, torch.no_grad():
        run(model, call)
    model.set_attn_implementation("eager")
    try:
        with torch.no_grad():
            answer = model(*call.args, **call.kwargs, output_attentions=True)
    finally:
        model.set_attn_implementation("sdpa")
    for axis in heads:
        tower = {"vision": answer.vision_model_output, "text": answer.text_model_output}[axis.tower]
        torch.testing.assert_close(heard[axis.path][0], tower.attentions[axis.depth])


@pytest.mark.parametrize("mask", ["none", "causal", "bool", "float"])
def test_masks_of_the_fused_function_are_minded(mask: str) -> None:
    class Attention(nn.Module):
        def forward(self, q: torch.Tensor) -> torch.Tensor:
            return F.scaled_dot_product_attention(q, q, eye, **options)

    torch.manual_seed(0)
    q, eye = torch.randn(2, 3, 5, 4), torch.eye(5).expand(2, 3, 5, 5)
    seen = torch.rand(2, 1, 5, 5) < 0.7
    seen |= torch.eye(5, dtype=torch.bool)
    bias = torch.randn(2, 1, 5, 5)
    options = {
        "none": {"scale": 0.3},
        "causal": {"is_causal": True},
        "bool": {"attn_mask": seen},
        "float": {"attn_mask": bias},
    }[mask]
    model = Attention()
    with listening_to_attention(model, [""]) as heard:
        answer = model(q)  # values are the identity: the answer is the probabilities
    torch.testing.assert_close(heard[""][0], answer)
    assert math.isclose(float(heard[""][0].sum()), 30, rel_tol=1e-5)


def test_layers_are_heard_each_time_they_run() -> None:
    model, _ = dissected("BlipForImageTextRetrieval")
    inputs = calls_of(default_inputs(model, batch=2))
    path = "text_encoder.encoder.layer.0"
    with listening_to_outputs(model, [path]) as heard, torch.no_grad():
        for call in inputs:
            run(model, call)
    assert len(heard[path]) == len(inputs) == 2
    assert not torch.equal(heard[path][0], heard[path][1])
