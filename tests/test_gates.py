"""Gates: reversible, differentiable, and one mechanism for masks, gradients and statistics."""

import copy

import pytest
import torch
import zoo
from conftest import dissected, inputs_of, random_keep
from torch import nn

import vlprune
from vlprune.calls import calls_of, run, tensors_of
from vlprune.errors import PlanError
from vlprune.families.pytorch import ExplicitMultiheadAttention


def outputs(model: nn.Module, inputs: object) -> list[torch.Tensor]:
    return [t for call in calls_of(inputs) for t in tensors_of(run(model, call))]


def test_nothing_is_left_behind_after_a_mask(tiny: tuple[nn.Module, vlprune.Anatomy]) -> None:
    model, anatomy = tiny
    plan = vlprune.make_plan(anatomy, random_keep(anatomy, 0))
    with torch.no_grad():
        before = outputs(model, inputs_of(model))
        state = [(type(m), dict(m.__dict__)) for m in model.modules()]
        with vlprune.mask(model, plan):
            masked = outputs(model, inputs_of(model))
        after = outputs(model, inputs_of(model))
    assert any(not torch.equal(a, b) for a, b in zip(before, masked, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    for module, (cls, attributes) in zip(model.modules(), state, strict=True):
        assert type(module) is cls
        assert module.__dict__.keys() == attributes.keys()
        assert not module._forward_hooks
        assert not module._forward_pre_hooks


def test_the_mask_is_lifted_when_the_block_raises(clip: tuple[nn.Module, vlprune.Anatomy]) -> None:
    model, anatomy = clip
    plan = vlprune.make_plan(anatomy, random_keep(anatomy, 0))
    with pytest.raises(KeyboardInterrupt), vlprune.mask(model, plan):
        raise KeyboardInterrupt
    assert all(type(m).__module__.startswith(("torch", "open_clip")) for m in model.modules())


@pytest.mark.parametrize("kind", ["head", "ffn", "layer", "sublayer"])
@pytest.mark.parametrize("name", ["open_clip", "deit", "BlipForImageTextRetrieval"])
def test_gate_gradients_equal_finite_differences(name: str, kind: str) -> None:
    model = zoo.make(name).double()
    anatomy = vlprune.dissect(model, _double(name, model)).select((kind,))
    inputs = _double(name, model)
    with vlprune.Gates(model, anatomy.axes) as gates:
        for axis in anatomy.axes:
            start = torch.rand(axis.units, dtype=torch.float64) * 0.5 + 0.5
            gates.values[axis.name] = start.requires_grad_(True)
        values = dict(gates.values)

        def loss() -> torch.Tensor:
            return sum(t.square().mean() for t in outputs(model, inputs) if t.is_floating_point())

        loss().backward()
        for axis in anatomy.axes[:: max(len(anatomy.axes) // 3, 1)]:
            unit = axis.units - 1
            slopes = []
            for step in (1e-5, -1e-5):
                moved = values[axis.name].detach().clone()
                moved[unit] += step
                gates.values[axis.name] = moved
                with torch.no_grad():
                    slopes.append(float(loss()))
            gates.values[axis.name] = values[axis.name]
            numeric = (slopes[0] - slopes[1]) / 2e-5
            gradient = values[axis.name].grad
            exact = 0.0 if gradient is None else float(gradient[unit])
            assert exact == pytest.approx(numeric, rel=1e-4, abs=1e-8), axis.name


def _double(name: str, model: nn.Module) -> list:
    from vlprune.calls import cast

    return [cast(call, torch.float64) for call in calls_of(inputs_of(model))]


@pytest.mark.parametrize("kind", ["head", "ffn", "layer", "sublayer"])
def test_sample_gradients_are_those_of_single_examples(kind: str) -> None:
    model, anatomy = zoo.make("deit"), dissected("deit")[1]
    axes = anatomy.select((kind,)).axes
    images = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with vlprune.Gates(model, axes, per_sample=True) as gates:
        model(images).square().sum().backward()
        together = gates.sample_gradients()
        for example in range(3):
            model(images[example : example + 1]).square().sum().backward()
            alone = gates.sample_gradients()
            for (name, unit, batch), (name_, unit_, one) in zip(together, alone, strict=True):
                assert (name, unit) == (name_, unit_)
                assert torch.allclose(batch[example], one[0], rtol=1e-3, atol=1e-4), (name, unit)
    assert len(together) == sum(1 if a.removal == "slice" else a.units for a in axes)


def test_a_tap_sees_what_the_consumer_sees(clip: tuple[nn.Module, vlprune.Anatomy]) -> None:
    model, anatomy = clip
    seen = {}
    axes = anatomy.select(("head",)).axes
    with vlprune.Gates(model, axes, tap=lambda axis, unit, x, out: seen.update({axis.name: x})):
        run(model, calls_of(inputs_of(model))[0])
    assert seen.keys() == {axis.name for axis in axes}  # out_proj of nn.MultiheadAttention too
    for axis in axes:
        assert seen[axis.name].shape[-2:] == (axis.units, axis.gate.block)


def test_an_axis_without_a_gate_is_refused(clip: tuple[nn.Module, vlprune.Anatomy]) -> None:
    model, anatomy = clip
    with vlprune.Gates(model, anatomy.axes[:1]) as gates, pytest.raises(PlanError) as caught:
        gates.keep({"visual:nothing": (0,)})
    assert str(caught.value) == (
        "axis 'visual:nothing' must have a gate here; there are none of that name. "
        "Make the plan again with vlprune.plan."
    )


def test_gated_attention_equals_multihead_attention_in_all_its_forms() -> None:
    torch.manual_seed(0)
    for batch_first in (True, False):
        for kdim in (None, 12):
            plain = nn.MultiheadAttention(16, 4, batch_first=batch_first, kdim=kdim, vdim=kdim)
            nn.init.normal_(plain.in_proj_bias)
            plain = plain.double().eval()
            explicit = nn.MultiheadAttention(16, 4, batch_first=batch_first, kdim=kdim, vdim=kdim)
            explicit = explicit.double().eval()
            explicit.load_state_dict(plain.state_dict())
            explicit.__class__ = ExplicitMultiheadAttention
            q = torch.randn(3, 3, 16).double()
            k = q if kdim is None else torch.randn(3, 3, 12).double()
            causal = torch.full((3, 3), float("-inf")).triu(1).double()
            padding = torch.tensor([[False, False, True]] * 3)
            for options in (
                {},
                {"attn_mask": causal},
                {"attn_mask": causal == float("-inf")},
                {"key_padding_mask": padding},
                {"attn_mask": causal == float("-inf"), "key_padding_mask": padding},
                {"need_weights": False, "attn_mask": causal},
                {"average_attn_weights": False},
            ):
                expected, weights = plain(q, k, k, **options)
                got, shown = explicit(q, k, k, **options)
                assert torch.allclose(expected, got, rtol=1e-10, atol=1e-12), options
                if weights is not None:
                    assert torch.allclose(weights, shown, rtol=1e-10, atol=1e-12), options
            if kdim is None:
                expected, got = plain(q[0], q[0], q[0])[0], explicit(q[0], q[0], q[0])[0]
                assert torch.allclose(expected, got, rtol=1e-10, atol=1e-12)


@torch.no_grad()
def test_a_mask_per_head_serves_the_heads_that_stay() -> None:
    plain = nn.MultiheadAttention(8, 4, batch_first=True).double()
    x = torch.randn(2, 3, 8, dtype=torch.float64)
    masks = torch.randn(2, 4, 3, 3, dtype=torch.float64)  # as CoCa makes them, once for all layers
    kept = copy.deepcopy(plain)
    kept.__class__ = ExplicitMultiheadAttention
    kept.after_swap()
    assert torch.allclose(
        kept(x, x, x, attn_mask=masks.flatten(0, 1))[0],
        plain(x, x, x, attn_mask=masks.flatten(0, 1))[0],
        atol=1e-12,
    )
    rows = torch.tensor([2, 3, 6, 7])  # the rows of heads 1 and 3, two features each
    kept.num_heads, kept.kept_heads = 2, (1, 3)
    kept.in_proj_weight = nn.Parameter(
        plain.in_proj_weight.unflatten(0, (3, 8))[:, rows].flatten(0, 1)
    )
    kept.in_proj_bias = nn.Parameter(plain.in_proj_bias.unflatten(0, (3, 8))[:, rows].flatten())
    kept.out_proj.weight = nn.Parameter(plain.out_proj.weight[:, rows])
    plain.out_proj.weight[:, [0, 1, 4, 5]] = 0
    expected = plain(x, x, x, attn_mask=masks.flatten(0, 1))[0]
    got = kept(x, x, x, attn_mask=masks.flatten(0, 1))[0]
    assert torch.allclose(got, expected, atol=1e-12)
    few = kept(x, x, x, attn_mask=masks[:, [1, 3]].flatten(0, 1))[0]  # or made for them alone
    assert torch.allclose(few, expected, atol=1e-12)


def test_a_gate_changed_in_place_is_live(clip: tuple[nn.Module, vlprune.Anatomy]) -> None:
    model, anatomy = clip
    axis = anatomy.axis("visual.transformer.resblocks.1.attn:head")
    with torch.no_grad(), vlprune.Gates(model, [axis]) as gates:
        before = outputs(model, inputs_of(model))
        gates.values[axis.name][2] = 0
        changed = outputs(model, inputs_of(model))
        gates.keep({axis.name: (0, 1, 3)})
        kept = outputs(model, inputs_of(model))
        gates.values[axis.name][2] = 1
        opened = outputs(model, inputs_of(model))
        gates.values[axis.name][2] = 0
        gates.keep({axis.name: (0, 1, 2, 3)})
        reopened = outputs(model, inputs_of(model))
    assert not torch.equal(before[0], changed[0])
    assert torch.equal(changed[0], kept[0])
    assert torch.equal(before[0], opened[0])
    assert torch.equal(before[0], reopened[0])
