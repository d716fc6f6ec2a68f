"""Mixtures of experts: an expert out of the choice is an expert cut."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from conftest import random_keep
from torch import Tensor, nn

import vlprune
from vlprune.calls import WideFloats
from vlprune.cost import count_macs, count_params
from vlprune.errors import LawError, PlanError
from vlprune.metrics.activation import Activation
from vlprune.metrics.fisher import Fisher
from vlprune.metrics.magnitude import Magnitude
from vlprune.pruner import record_of
from vlprune.zoo.check import redraw

WIDTH, EXPERTS, CHOSEN = 24, 6, 2


class Smith(nn.Module):
    """One expert among others in a list."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 20), nn.Linear(20, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x)))


class Listed(nn.Module):
    """A linear router, a softmax over the chosen, experts in a list; tokens stay [B, T, D]."""

    def __init__(self) -> None:
        super().__init__()
        self.desk = nn.Linear(WIDTH, EXPERTS)
        self.smiths = nn.ModuleList([Smith() for _ in range(EXPERTS)])

    def forward(self, x: Tensor) -> Tensor:
        worth, chosen = self.desk(x).topk(CHOSEN, dim=-1)
        shares = worth.softmax(-1)
        out = torch.zeros_like(x)
        for place, smith in enumerate(self.smiths):
            share = (shares * (chosen == place)).sum(-1, keepdim=True)
            sent = share.squeeze(-1) > 0
            out[sent] = out[sent] + smith(x[sent]) * share[sent]
        return out


class Desk(nn.Module):
    """A router with a matrix of its own, a sigmoid, and a bias for the choice alone; in float32."""

    def __init__(self) -> None:
        super().__init__()
        self.crowd = EXPERTS
        self.weight = nn.Parameter(torch.zeros(EXPERTS, WIDTH))
        self.register_buffer("balance", torch.linspace(3, 0, EXPERTS))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        rates = F.linear(x.float(), self.weight.float()).sigmoid()
        liked = (rates + self.balance).view(-1, 1, self.crowd).squeeze(1)
        chosen = torch.topk(liked, CHOSEN, dim=-1)[1]
        shares = rates.gather(1, chosen)
        return chosen, (shares / shares.sum(-1, keepdim=True)).to(x.dtype)


class Batched(nn.Module):
    """Experts as entries of matrices, beside a shared one; tokens are flattened."""

    def __init__(self) -> None:
        super().__init__()
        self.desk, self.usual = Desk(), Smith()
        self.up = nn.Parameter(torch.zeros(EXPERTS, 20, WIDTH))
        self.down = nn.Parameter(torch.zeros(EXPERTS, WIDTH, 20))

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.reshape(-1, WIDTH)
        chosen, shares = self.desk(tokens)
        out = torch.zeros_like(tokens)
        for place in chosen.unique().tolist():
            token, rank = torch.where(chosen == place)
            made = F.linear(F.gelu(F.linear(tokens[token], self.up[place])), self.down[place])
            out.index_add_(0, token, made * shares[token, rank, None])
        return out.view(x.shape) + self.usual(x)


class Block(nn.Module):
    def __init__(self, experts: nn.Module) -> None:
        super().__init__()
        self.one, self.two = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.look = nn.MultiheadAttention(WIDTH, 4, batch_first=True)
        self.experts = experts

    def forward(self, x: Tensor) -> Tensor:
        y = self.one(x)
        x = x + self.look(y, y, y, need_weights=False)[0]
        return x + self.experts(self.two(x))


class Town(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(Listed()), Block(Batched()), Block(Listed())])

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


@pytest.fixture(scope="module")
def town() -> tuple[nn.Module, vlprune.Anatomy, Tensor]:
    model = redraw(Town()).eval()
    x = torch.randn(3, 16, WIDTH, generator=torch.Generator().manual_seed(1))
    return model, vlprune.dissect(model, x), x


def test_experts_are_found_with_how_many_must_stay(
    town: tuple[nn.Module, vlprune.Anatomy, Tensor],
) -> None:
    _, anatomy, _ = town
    axes = {axis.name: axis for axis in anatomy.axes if axis.kind == "expert"}
    assert {name: (a.units, a.least) for name, a in axes.items()} == {
        f"blocks.{i}.experts:expert": (EXPERTS, CHOSEN) for i in range(3)
    }
    sites = {site.tensor.removeprefix("blocks.1.experts.") for site in axes[_name(1)].sites}
    assert sites == {"desk.weight", "desk.balance", "up", "down"}
    assert axes[_name(0)].lists == ("blocks.0.experts.smiths",)
    assert [r for r in anatomy.refusals if r.kind == "expert"] == []


def _name(block: int) -> str:
    return f"blocks.{block}.experts:expert"


@pytest.mark.parametrize("kinds", [("expert",), ("expert", "ffn", "head", "layer")])
@pytest.mark.parametrize("seed", range(4))
def test_masked_is_cut(
    town: tuple[nn.Module, vlprune.Anatomy, Tensor], kinds: tuple[str, ...], seed: int
) -> None:
    model, anatomy, x = town
    plan = vlprune.make_plan(anatomy, random_keep(anatomy, seed, kinds))
    small = vlprune.prune(model, plan, x)
    assert record_of(small).relative_error <= 1e-9
    planned = vlprune.price(anatomy, plan.keep)
    assert planned.params == count_params(small)
    if kinds == ("expert",):  # experts that lost neurons cost less than those they stand in for
        assert planned.macs == count_macs(small, x)


def test_the_mask_reroutes_tokens_and_is_lifted(
    town: tuple[nn.Module, vlprune.Anatomy, Tensor],
) -> None:
    model, anatomy, x = town
    with torch.no_grad():
        before = model(x)
        plan = vlprune.make_plan(anatomy, {_name(1): (2, 3, 5)})
        with vlprune.mask(model, plan):
            masked = model(x)
        assert not torch.allclose(before, masked, atol=1e-3)
        assert torch.equal(model(x), before)


def test_fewer_experts_than_a_token_is_sent_to_cannot_be_planned(
    town: tuple[nn.Module, vlprune.Anatomy, Tensor],
) -> None:
    _, anatomy, _ = town
    with pytest.raises(PlanError, match="at least 2 of its 6 units must stay, got 1"):
        vlprune.make_plan(anatomy, {_name(0): (3,)})


@pytest.mark.parametrize("forgotten", ["desk.weight", "desk.balance", "up"])
def test_rows_that_are_forgotten_are_caught(
    town: tuple[nn.Module, vlprune.Anatomy, Tensor], forgotten: str
) -> None:
    model, anatomy, x = town
    axis = anatomy.axis(_name(1))
    sites = tuple(site for site in axis.sites if not site.tensor.endswith(forgotten))
    broken = dataclasses.replace(axis, sites=sites)
    axes = tuple(broken if a is axis else a for a in anatomy.axes)
    plan = vlprune.make_plan(dataclasses.replace(anatomy, axes=axes), {axis.name: (1, 3, 4)})
    with pytest.raises(LawError):
        vlprune.prune(model, plan, x)


def test_gate_gradients_equal_finite_differences(
    town: tuple[nn.Module, vlprune.Anatomy, Tensor],
) -> None:
    _, anatomy, x = town
    double, x = redraw(Town()).eval().double(), x.double()
    axes = anatomy.select(("expert",)).axes
    with WideFloats(), vlprune.Gates(double, axes) as gates:
        for axis in axes:
            draw = torch.rand(axis.units, generator=torch.Generator().manual_seed(2)) * 0.5 + 0.5
            gates.values[axis.name] = draw.double().requires_grad_(True)
        double(x).square().mean().backward()
        for axis in axes:
            gradient = gates.values[axis.name].grad
            assert gradient.abs().max() > 0
            for unit in range(axis.units):
                moved = []
                for step in (1e-6, -1e-6):
                    value = gates.values[axis.name].detach().clone()
                    value[unit] += step
                    with torch.no_grad():
                        kept, gates.values[axis.name] = gates.values[axis.name], value
                        moved.append(float(double(x).square().mean()))
                        gates.values[axis.name] = kept
                slope = (moved[0] - moved[1]) / 2e-6
                assert float(gradient[unit]) == pytest.approx(slope, rel=1e-4, abs=1e-8)


def test_gradients_of_examples_add_up_to_that_of_the_gate(
    town: tuple[nn.Module, vlprune.Anatomy, Tensor],
) -> None:
    model, anatomy, x = town
    axes = anatomy.select(("expert",)).axes
    with vlprune.Gates(model, axes) as gates:
        ones = {a.name: torch.ones(a.units, requires_grad=True) for a in axes}
        gates.values.update(ones)
        model(x).square().mean().backward()
    with vlprune.Gates(model, axes, per_sample=True) as gates:
        model(x).square().mean().backward()
        found = gates.sample_gradients()
    assert len(found) == 3
    for name, unit, gradient in found:
        assert unit is None
        assert gradient.shape == (len(x), EXPERTS)
        assert torch.allclose(gradient.sum(0), ones[name].grad, atol=1e-6)


def test_metrics_score_experts(town: tuple[nn.Module, vlprune.Anatomy, Tensor]) -> None:
    model, anatomy, x = town
    only = ("expert",)
    with Activation(model, anatomy, strategies=only) as metric:
        model(x)
        metric.update()
        used = metric.compute()
    for values in used.values.values():  # how many tokens each expert was sent
        assert sum(values) == x.shape[0] * x.shape[1] * CHOSEN
    with Magnitude(model, anatomy, strategies=only) as metric:
        norms = metric.compute()
    smith = model.blocks[0].experts.smiths[4]
    row = model.blocks[0].experts.desk
    square = sum(p.double().square().sum() for p in smith.parameters())
    square = square + row.weight[4].double().square().sum() + row.bias[4].double().square()
    assert norms.values[_name(0)][4] == pytest.approx(float(square.detach().sqrt()), rel=1e-9)
    with Fisher(model, anatomy, strategies=only) as metric:
        model(x).square().mean().backward()
        metric.update()
        scores = metric.compute()
    plan = vlprune.plan(scores, budget={"params": 0.8}, allocation="uniform")
    small = vlprune.prune(model, plan, x)
    assert count_params(small) <= 0.8 * count_params(model)
