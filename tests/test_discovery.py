"""What nobody declared: found by probing, proven by trial, or named with the reason."""

import dataclasses
import pickle
from collections.abc import Iterator

import pytest
import stranger
import torch
from conftest import random_keep
from torch import nn

import vlprune
from vlprune.anatomy import Site
from vlprune.calls import Call
from vlprune.cost import count_macs, count_params
from vlprune.discovery.fit import Bench, axis_of, common_path, fit
from vlprune.discovery.probe import couplings
from vlprune.discovery.regions import real_call, replica, short_call
from vlprune.pruner import record_of
from vlprune.zoo.check import redraw


@pytest.fixture(scope="module")
def house() -> tuple[nn.Module, vlprune.Anatomy]:
    model = redraw(stranger.House()).eval()
    return model, vlprune.dissect(model, stranger.inputs())


def test_a_stranger_is_dissected(house: tuple[nn.Module, vlprune.Anatomy]) -> None:
    _, anatomy = house
    found = {axis.name: axis.units for axis in anatomy.axes if axis.kind in ("head", "ffn")}
    assert found == {
        **{f"cellar.{i}.talk:head": 4 for i in range(3)},
        **{f"cellar.{i}.kitchen:ffn": 20 for i in range(3)},
        **{f"attic.{i}.talk:head": 2 for i in range(2)},  # two heads share keys and values
        **{f"attic.{i}.window:head": 4 for i in range(2)},
        **{f"attic.{i}.kitchen:ffn": 20 for i in range(2)},
        "door:head": 4,
    }
    layers = {axis.name: axis.units for axis in anatomy.axes if axis.kind == "layer"}
    assert layers == {"cellar:layer": 3, "attic:layer": 2}
    dims = {axis.name: axis.units for axis in anatomy.axes if axis.kind == "head_dim"}
    assert dims["attic.0.talk:head_dim.qk"] == dims["attic.0.talk:head_dim.v"] == 6
    assert dims["attic.1.window:head_dim.qk"] == 5


def test_what_cannot_be_cut_from_a_stranger_is_named(
    house: tuple[nn.Module, vlprune.Anatomy],
) -> None:
    _, anatomy = house
    (refusal,) = [r for r in anatomy.refusals if r.kind == "head"]
    assert refusal.module.startswith("mess.0")
    assert "heads stay" in refusal.reason or "units stay" in refusal.reason


@pytest.mark.parametrize("kind", ["head", "ffn", "layer", "head_dim", "all"])
@pytest.mark.parametrize("seed", range(4))
def test_a_stranger_obeys_the_law(
    house: tuple[nn.Module, vlprune.Anatomy], kind: str, seed: int
) -> None:
    model, anatomy = house
    kinds = anatomy.kinds if kind == "all" else (kind,)
    plan = vlprune.make_plan(anatomy, random_keep(anatomy, seed, kinds))
    small = vlprune.prune(model, plan, stranger.inputs())
    assert record_of(small).relative_error <= 1e-9
    planned = vlprune.price(anatomy, plan.keep)
    assert planned.params == count_params(small)
    assert planned.macs == count_macs(small, stranger.inputs())
    again = pickle.loads(pickle.dumps(small))
    with torch.no_grad():
        assert torch.equal(again(*stranger.inputs()), small(*stranger.inputs()))


def test_a_stranger_is_scored_and_planned(house: tuple[nn.Module, vlprune.Anatomy]) -> None:
    model, anatomy = house
    task = vlprune.tasks.CallableTask(
        [stranger.inputs()],
        lambda model, batch: model(*batch).square().mean(),
        example_inputs=stranger.inputs(),
    )
    kinds = ("head", "ffn", "head_dim", "layer")
    for metric in ("taylor", "fisher", "activation", "magnitude"):
        scores = vlprune.score(model, metric, task, anatomy=anatomy, strategies=kinds)
        plan = vlprune.plan(scores, {"params": 0.6}, min_units=1)
        small = vlprune.prune(model, plan, stranger.inputs())
        assert count_params(small) == plan.planned.params <= 0.6 * count_params(model)


# -- the probe -------------------------------------------------------------------------------------


def region() -> Iterator[tuple[nn.Module, Call]]:
    torch.manual_seed(0)
    block = replica(stranger.Floor(24, None))
    yield block, real_call(Call((torch.randn(2, 5, 24),)))


def test_rows_are_told_to_the_unit() -> None:
    block, call = next(region())
    found, obstacles = couplings(block, call)
    assert obstacles == []
    rows = {c.consumer: {(s.tensor, s.dim, s.offset, s.block) for s in c.sites} for c in found}
    assert rows["talk.answer"] == {
        ("talk.ask.weight", 0, 0, 6),
        ("talk.ask.bias", 0, 0, 6),
        ("talk.offer.weight", 0, 0, 6),
        ("talk.offer.weight", 0, 24, 6),
        ("talk.offer.bias", 0, 0, 6),
        ("talk.offer.bias", 0, 24, 6),
        ("talk.hush.weight", 0, 0, 6),
        ("talk.hush.bias", 0, 0, 6),
        ("talk.answer.weight", 1, 0, 6),
    }
    assert rows["kitchen.drip"] == {
        ("kitchen.boil.weight", 0, 0, 1),
        ("kitchen.boil.weight", 0, 20, 1),
        ("kitchen.boil.bias", 0, 0, 1),
        ("kitchen.boil.bias", 0, 20, 1),
        ("kitchen.drip.weight", 1, 0, 1),
    }


class Squeezed(nn.Module):
    """Channels that two layers read: one weighs them by what the other makes of their means."""

    def __init__(self) -> None:
        super().__init__()
        self.widen, self.narrow = nn.Conv2d(6, 16, 1), nn.Conv2d(16, 6, 1)
        self.spread, self.norm = nn.Conv2d(16, 16, 3, padding=1, groups=16), nn.BatchNorm2d(16)
        self.small, self.large = nn.Conv2d(16, 4, 1), nn.Conv2d(4, 16, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm(self.spread(self.widen(x))).relu()
        weight = self.large(self.small(y.mean((2, 3), keepdim=True)).relu()).sigmoid()
        return x + self.narrow(y * weight)


def test_neurons_that_two_layers_read_are_one_axis() -> None:
    model = redraw(nn.Sequential(Squeezed(), Squeezed())).eval()
    images = torch.randn(2, 6, 5, 5)
    anatomy = vlprune.dissect(model, images)
    axes = {axis.name: axis for axis in anatomy.axes if axis.kind == "ffn"}
    assert {axis.units for axis in axes.values()} == {16}
    wide = axes["0:ffn"]
    left = {r.module: r.reason for r in anatomy.refusals}
    assert left["0.large"] == "what it reads stays: its own rows belong to other units"
    assert set(wide.gate.modules) == {"0.narrow", "0.small"}
    assert {s.tensor for s in wide.sites if s.dim == 1} == {"0.narrow.weight", "0.small.weight"}
    for seed in range(3):
        plan = vlprune.make_plan(anatomy, random_keep(anatomy, seed, ("ffn",)))
        small = vlprune.prune(model, plan, images)
        assert record_of(small).relative_error <= 1e-9
        assert vlprune.price(anatomy, plan.keep).params == count_params(small)


@pytest.mark.parametrize("fault", ["shifted", "swapped", "forgotten"])
def test_a_wrong_site_does_not_pass_the_bench(fault: str) -> None:
    block, call = next(region())
    heads = next(c for c in couplings(block, call)[0] if c.attends)
    good = fit(block, call, heads, common_path(heads))
    assert not isinstance(good, str)
    place = next(i for i, s in enumerate(good.sites) if s.tensor == "talk.offer.weight")
    sites = list(good.sites)
    if fault == "shifted":  # keys of one head, values of the next
        sites[place] = dataclasses.replace(sites[place], offset=6)
    elif fault == "swapped":  # a wrong order inside of the rows
        sites[place] = Site(tensor="talk.offer.weight", dim=0, block=3, repeats=2, stride=12)
    else:
        sites.pop(place)
    wrong = dataclasses.replace(good, sites=tuple(sites))
    assert Bench(block, call, good).fault(good.knobs) == ""
    assert Bench(block, call, wrong).fault(wrong.knobs) != ""


def test_a_wrong_knob_does_not_pass_the_bench() -> None:
    block, call = next(region())
    heads = next(c for c in couplings(block, call)[0] if c.attends)
    assert "size" in Bench(block, call, axis_of(heads, "talk")).fault(())


def test_few_tokens_are_taken_where_a_block_does_not_count_them() -> None:
    block, _ = next(region())
    long = Call((torch.randn(1, 100, 24, dtype=torch.float64),))
    assert short_call(block, long).args[0].shape == (1, 9, 24)

    class Counting(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.reshape(len(x), 100, 24)

    assert short_call(Counting(), long).args[0].shape == (1, 100, 24)
