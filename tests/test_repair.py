"""Repair: what is left stands in for what went, exactly where that is possible, never for worse."""

import random
from pathlib import Path

import pytest
import stranger
import torch
import torch.nn.functional as F
import zoo
from conftest import dissected, inputs_of
from torch import Tensor, nn

import vlprune
from vlprune.calls import calls_of, run, tensors_of
from vlprune.copies import clone
from vlprune.dissect import default_inputs
from vlprune.errors import LawError
from vlprune.moments import Linear, Moments
from vlprune.pruner import record_of
from vlprune.recover.projections import Projection, find_projection, fold
from vlprune.recover.stepping import Stepper
from vlprune.recover.streams import find_streams
from vlprune.tasks import CallableTask, Retrieval

DRAW = torch.Generator().manual_seed(0)
IMAGES = torch.randn(40, 3, 32, 32, generator=DRAW)
TEXTS = torch.randint(1, 40, (40, 12), generator=DRAW)
TEXTS[:, 8], TEXTS[:, 9:] = 49, 0
OTHERS = [(torch.randn(16, 3, 32, 32, generator=DRAW), TEXTS[:16].flip(1).roll(4, 1))]


def pairs(count: int = 40, size: int = 8) -> Retrieval:
    return Retrieval([(IMAGES[i : i + size], TEXTS[i : i + size]) for i in range(0, count, size)])


def outputs(model: nn.Module, inputs: object) -> list[Tensor]:
    """All floating outputs of a model."""
    with torch.no_grad():
        found = [t for call in calls_of(inputs) for t in tensors_of(run(model, call))]
    return [t for t in found if t.is_floating_point()]


def far(small: nn.Module, model: nn.Module, inputs: object) -> float:
    """The largest difference of outputs, over the largest of them."""
    rows = zip(outputs(small, inputs), outputs(model, inputs), strict=True)
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in rows if a.shape == b.shape)


def inputs_of_size(model: nn.Module, size: int, seed: int) -> object:
    """Inputs of `size` examples, drawn, in the form that the model's family makes them."""
    generator = torch.Generator().manual_seed(seed)
    drawn = []
    for call in calls_of(default_inputs(model, batch=size)):
        kwargs = {}
        for name, value in call.kwargs.items():
            if isinstance(value, Tensor) and value.is_floating_point():
                value = torch.randn(value.shape, generator=generator)
            elif isinstance(value, Tensor) and name in ("input_ids", "decoder_input_ids"):
                value = value.clone()
                middle = value[:, 1:-1]
                middle.copy_(torch.randint(3, 50, middle.shape, generator=generator))
            kwargs[name] = value
        args = tuple(
            torch.randn(v.shape, generator=generator) if v.is_floating_point() else v
            for v in call.args
        )
        drawn.append(type(call)(args, kwargs))
    return drawn


def task_of(name: str, model: nn.Module) -> Retrieval | CallableTask:
    """Twenty-four examples and more for a tiny model."""
    if name == "open_clip":
        return pairs()

    def loss(model: nn.Module, inputs: object) -> Tensor:
        parts = [t for call in calls_of(inputs) for t in tensors_of(run(model, call))]
        return sum(t.square().mean() for t in parts if t.is_floating_point())

    batches = [inputs_of_size(model, 12, seed) for seed in range(4)]
    return CallableTask(batches, loss, example_inputs=inputs_of(model))


@torch.no_grad()
def with_copies(
    model: nn.Module, anatomy: vlprune.Anatomy, kinds: tuple[str, ...] = ("head", "ffn")
) -> tuple[nn.Module, dict[str, tuple[int, ...]]]:
    """The model with units that do what unit 0 does (their consumers differ), and who stays."""
    model = clone(model)
    keep = {}
    for axis in anatomy.select(kinds).axes:
        reads = axis.gate.modules if axis.gate.kind == "input" else ()
        consumers = {f"{path}.weight" for path in reads}
        copies = tuple(range(axis.units * 2 // 3, axis.units))
        state = dict(model.named_parameters())
        for site in axis.sites:
            if site.tensor not in consumers and site.tensor in state:
                tensor = state[site.tensor].movedim(site.dim, 0)
                for unit in copies:
                    tensor[site.indices((unit,))] = tensor[site.indices((0,))]
        keep[axis.name] = tuple(unit for unit in range(axis.units) if unit not in copies)
    return model, keep


@pytest.mark.parametrize("name", list(zoo.MAKERS))
def test_copies_of_what_stays_are_made_up_for_exactly(name: str) -> None:
    original, anatomy = dissected(name)
    model, keep = with_copies(original, anatomy)
    task = task_of(name, model)
    plan = vlprune.make_plan(anatomy, keep)
    small = vlprune.repair(model, plan, task, ridges=(1e-9,))
    fresh = inputs_of_size(model, 5, seed=9)
    cut = vlprune.prune(model, plan, verify=False)
    assert far(cut, model, fresh) > 0.02
    assert far(small, model, fresh) < 2e-3
    assert small.state_dict().keys() == cut.state_dict().keys()
    assert record_of(small).repairs


@pytest.mark.parametrize("kind", ["head_dim", "head_dim_per_head"])
@pytest.mark.parametrize("name", ["open_clip", "deit", "hf_clip", "BlipForImageTextRetrieval"])
def test_dimensions_that_are_copies_are_made_up_for(name: str, kind: str) -> None:
    original, anatomy = dissected(name)
    model, keep = with_copies(original, anatomy, (kind,))
    if not keep:
        pytest.skip("no such dimensions")
    for side in (".qk", ".v"):
        part = {axis: units for axis, units in keep.items() if f"{kind}{side}" in axis}
        plan = vlprune.make_plan(anatomy, part)
        small = vlprune.repair(model, plan, task_of(name, model), ridges=(1e-9,), outputs=False)
        fresh = inputs_of_size(model, 5, seed=9)
        before = far(vlprune.prune(model, plan, verify=False), model, fresh)
        assert before > 0.01
        assert far(small, model, fresh) < 0.05 * before
        assert any(repair.ridge is not None for repair in record_of(small).repairs)


@pytest.mark.parametrize("kind", ["head_dim", "head_dim_per_head"])
def test_queries_that_share_keys_take_on_dimensions_that_are_copies(kind: str) -> None:
    """In the attic two heads of queries share one of keys."""
    torch.manual_seed(0)
    house = zoo.redraw(stranger.House()).eval()
    batches = [
        (torch.randn(12, 5, 24, generator=DRAW), torch.randint(30, (12, 7), generator=DRAW))
        for _ in range(4)
    ]
    anatomy = vlprune.dissect(house, stranger.inputs())
    model, keep = with_copies(house, anatomy, (kind,))
    part = {name: units for name, units in keep.items() if f".talk:{kind}.qk" in name}
    plan = vlprune.make_plan(anatomy, {n: u for n, u in part.items() if "attic" in n})
    for floor in model.attic:  # the copies of the second keys, and of who asks them, are of unit 1
        for layer in (floor.talk.ask, floor.talk.offer):
            for tensor in layer.parameters():
                half = slice(12, 24) if layer is floor.talk.ask else slice(6, 12)
                heads = tensor.data[half].unflatten(0, (-1, 6))  # [heads, dimensions, ...]
                heads[:, 4:] = heads[:, 1:2]
    assert {row.removed for row in plan.rows} == {(4, 5)}
    task = CallableTask(batches, lambda m, b: m(*b).square().mean(), example_inputs=batches[0])
    small = vlprune.repair(model, plan, task, outputs=False)
    fresh = (torch.randn(9, 5, 24, generator=DRAW), torch.randint(30, (9, 7), generator=DRAW))
    before = far(vlprune.prune(model, plan, batches[0], verify=False), model, fresh)
    assert before > 0.005
    assert far(small, model, fresh) < 0.05 * before


@pytest.mark.parametrize("name", list(zoo.MAKERS))
def test_a_plan_that_keeps_everything_changes_no_bit(name: str) -> None:
    model, anatomy = dissected(name)
    everything = {axis.name: tuple(range(axis.units)) for axis in anatomy.axes}
    small = vlprune.repair(model, vlprune.make_plan(anatomy, everything), task_of(name, model))
    before = model.state_dict()
    assert all(torch.equal(t, before[name]) for name, t in small.state_dict().items())
    assert record_of(small).repaired == ()
    assert all(repair.ridge is None for repair in record_of(small).repairs)


@pytest.mark.parametrize("name", ["open_clip", "deit", "hf_clip", "BlipForImageTextRetrieval"])
def test_uneven_plans_come_closer_to_the_dense_model(name: str) -> None:
    model, anatomy = dissected(name)
    draw = random.Random(3)
    keep = {}
    for axis in anatomy.select(("head", "ffn")).axes:
        count = draw.randint(0, axis.units)
        keep[axis.name] = tuple(sorted(draw.sample(range(axis.units), count)))
    plan = vlprune.make_plan(anatomy, keep)
    small = vlprune.repair(model, plan, task_of(name, model))
    cut = vlprune.prune(model, plan, verify=False)
    fresh = inputs_of_size(model, 16, seed=9)

    def error(other: nn.Module) -> float:
        rows = list(zip(outputs(other, fresh), outputs(model, fresh), strict=True))
        return sum(float((a - b).square().sum() / b.square().sum()) for a, b in rows if a.dim() > 1)

    assert error(small) < 0.7 * error(cut)
    for repair in record_of(small).repairs:
        assert repair.after <= repair.before
        assert (repair.ridge is None) == (repair.after == repair.before)


def test_a_removed_layer_is_stood_in_for_by_the_consumer_before_it() -> None:
    model, anatomy = dissected("open_clip")
    (axis,) = (a for a in anatomy.axes if a.name == "visual.transformer.resblocks:layer")
    model = clone(model)
    block = model.visual.transformer.resblocks[1]
    with torch.no_grad():  # a layer that adds a constant
        for matrix in (block.attn.out_proj.weight, block.mlp.c_proj.weight):
            matrix.zero_()
        block.mlp.c_proj.bias.mul_(20)
    rows = {a.name: tuple(range(a.units)) for a in anatomy.select(("head", "ffn")).axes}
    plan = vlprune.make_plan(anatomy, {axis.name: (0, 2), **rows})
    small = vlprune.repair(model, plan, pairs(), ridges=(1e-9,), outputs=False)
    assert far(vlprune.prune(model, plan, verify=False), model, OTHERS[0]) > 0.1
    assert far(small, model, OTHERS[0]) < 1e-4
    assert [r.module for r in record_of(small).repairs if r.ridge] == [
        "visual.transformer.resblocks.0.mlp.c_proj"
    ]
    assert record_of(small).repaired == (
        "visual.transformer.resblocks.0.mlp.c_proj.weight",
        "visual.transformer.resblocks.0.mlp.c_proj.bias",
    )


@pytest.mark.parametrize("half", ["ffn", "attention"])
def test_a_removed_half_is_stood_in_for_too(half: str) -> None:
    model, anatomy = dissected("deit")
    (axis,) = (a for a in anatomy.axes if a.name == f"blocks:sublayer.{half}")
    model = clone(model)
    last = model.blocks[2].mlp.fc2 if half == "ffn" else model.blocks[1].attn.proj
    with torch.no_grad():  # a half that adds a constant
        last.weight.zero_()
        last.bias.mul_(20)
    keep = tuple(unit for unit in range(3) if unit != (2 if half == "ffn" else 1))
    rows = {a.name: tuple(range(a.units)) for a in anatomy.select(("head", "ffn")).axes}
    plan = vlprune.make_plan(anatomy, {axis.name: keep, **rows})
    task = task_of("deit", model)
    small = vlprune.repair(model, plan, task, ridges=(1e-9,), outputs=False)
    fresh = inputs_of_size(model, 5, seed=9)
    assert far(vlprune.prune(model, plan, verify=False), model, fresh) > 0.1
    if half == "ffn":  # the attention before it aims behind it
        assert far(small, model, fresh) < 1e-4
    else:  # the FFN after it aims at the stream
        assert far(small, model, fresh) < 0.6 * far(
            vlprune.prune(model, plan, verify=False), model, fresh
        )


@pytest.mark.parametrize("name", list(zoo.MAKERS))
def test_every_consumer_has_a_stream(name: str) -> None:
    model, anatomy = dissected(name)
    axes = anatomy.select(("head", "ffn")).axes
    consumers = {path for axis in axes for path in axis.gate.modules}
    inputs = inputs_of(model)
    with vlprune.Gates(model, axes):  # attention of torch.nn calls no projection without
        found = find_streams(model, lambda: outputs(model, inputs), consumers)
    assert {path for path, _ in found} == consumers
    assert [key for key, stream in found.items() if stream.before is None] == []
    assert all(stream.after is None and stream.scale is None for stream in found.values())


def test_the_stream_is_found_behind_a_layer_scale() -> None:
    model = zoo.redraw(zoo.deit(init_values=0.1)).eval()
    images = torch.randn(4, 3, 32, 32)
    consumers = [f"blocks.{i}.{path}" for i in range(3) for path in ("attn.proj", "mlp.fc2")]
    found = find_streams(model, lambda: [model(images)], consumers)
    for i in range(3):
        scale = found[f"blocks.{i}.attn.proj", 0].scale
        torch.testing.assert_close(scale, model.blocks[i].ls1.gamma.detach(), rtol=1e-3, atol=1e-4)
    assert found["blocks.0.mlp.fc2", 0].before is not None


def test_what_would_not_help_is_left_undone() -> None:
    model, anatomy = dissected("deit")
    keep = {a.name: tuple(range(a.units - 1)) for a in anatomy.select(("ffn",)).axes}
    plan = vlprune.make_plan(anatomy, keep)
    images = [torch.randn(6, 3, 32, 32, generator=DRAW) for _ in range(2)]
    task = CallableTask(images, lambda m, x: m(x).square().mean(), example_inputs=images[0])
    small = vlprune.repair(model, plan, task, ridges=(1e-12,), outputs=False)  # fits noise
    left = [repair for repair in record_of(small).repairs if repair.ridge is None]
    assert left
    cut = vlprune.prune(model, plan, verify=False).state_dict()
    for repair in left:
        assert torch.equal(
            small.state_dict()[f"{repair.module}.weight"], cut[f"{repair.module}.weight"]
        )
    with pytest.raises(ValueError, match="at least 10 examples"):
        vlprune.repair(model, plan, CallableTask([images[0]], task.loss))


def test_nothing_is_left_on_the_model() -> None:
    model, anatomy = dissected("open_clip")
    before = {name: t.clone() for name, t in model.state_dict().items()}
    hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
    classes = [type(module) for module in model.modules()]
    keep = {a.name: (0,) for a in anatomy.select(("head", "ffn")).axes}
    for options in ({}, {"sequential": False}, {"targets": "answer", "sensitivity": False}):
        vlprune.repair(model, vlprune.make_plan(anatomy, keep), pairs(), **options)
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert classes == [type(module) for module in model.modules()]
    assert hooks == sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_a_repaired_model_is_verified_saved_and_repaired_again(tmp_path: Path) -> None:
    model = vlprune.create_model("scenes-clip")
    task = Retrieval(vlprune.tasks.scenes.loader("train", 48, 0, 24))
    anatomy = vlprune.dissect(model, task.example_inputs(model))
    plan = vlprune.plan(
        vlprune.score(model, "magnitude", anatomy=anatomy), {"params": 0.7}, "uniform"
    )
    small = vlprune.repair(model, plan, task)
    assert vlprune.verify(model, small) < 1e-9
    vlprune.save_pretrained(small, tmp_path / "small")
    loaded = vlprune.from_pretrained(tmp_path / "small")
    assert record_of(loaded) == record_of(small)
    assert vlprune.verify(model, loaded) < 1e-9
    with torch.no_grad():
        loaded.visual.conv1.weight[0] += 1  # not repaired, not the original's
    with pytest.raises(LawError, match=r"visual\.conv1\.weight"):
        vlprune.verify(model, loaded)
    layers = vlprune.dissect(small, task.example_inputs(small)).select(("layer",))
    keep = {axis.name: tuple(range(1, axis.units)) for axis in layers.axes}
    smaller = vlprune.repair(small, vlprune.make_plan(layers, keep), task)
    assert vlprune.verify(model, smaller) < 1e-9
    names = record_of(smaller).repaired
    assert "transformer.resblocks.2.attn.out_proj.weight" in names
    assert "transformer.resblocks.3.attn.out_proj.weight" not in names


def test_moments_solve_what_least_squares_solves() -> None:
    x = 3 + torch.randn(200, 7, generator=DRAW, dtype=torch.float64)
    t = x @ torch.randn(7, 3, generator=DRAW, dtype=torch.float64) + 2
    t += torch.randn(200, 3, generator=DRAW, dtype=torch.float64)
    counts = torch.rand(200, generator=DRAW, dtype=torch.float64)
    moments, other = Moments(), Moments()
    moments.add(x[:50], t[:50], counts[:50])
    other.add(x[50:120], t[50:120], counts[50:120])
    other.add(x[120:], t[120:], counts[120:])
    moments = moments + other
    prior = torch.zeros(3, 7, dtype=torch.float64)
    root = counts.sqrt()[:, None]
    ones = torch.ones(200, 1, dtype=torch.float64)
    for constant, features in ((None, torch.cat([x, ones], 1)), (torch.full((3,), 2.0), x)):
        shifted = t if constant is None else t - constant
        expected = torch.linalg.lstsq(features * root, shifted * root).solution.T
        found = moments.fit(prior, 0.0, constant)
        torch.testing.assert_close(found.weight, expected[:, :7], rtol=1e-5, atol=1e-5)
        if constant is None:
            torch.testing.assert_close(found.bias, expected[:, 7], rtol=1e-5, atol=1e-5)
        rest = t - x @ found.weight.T - found.bias
        error = float((rest.square() * counts[:, None]).sum() / counts.sum())
        assert moments.error(found) == pytest.approx(error, rel=1e-5)
    far_off = moments.fit(prior + 1, 1e9)
    torch.testing.assert_close(far_off.weight, prior + 1, rtol=1e-6, atol=1e-6)
    some = Linear(weight=torch.randn(3, 7, generator=DRAW), bias=torch.randn(3, generator=DRAW))
    rest = t - x @ some.weight.double().T - some.bias
    error = float((rest.square() * counts[:, None]).sum() / counts.sum())
    assert moments.error(some) == pytest.approx(error, rel=1e-5)
    mean = (t * counts[:, None]).sum(0) / counts.sum()
    spread = float(((t - mean).square() * counts[:, None]).sum() / counts.sum())
    assert moments.spread() == pytest.approx(spread, rel=1e-5)


def test_a_stepper_stops_goes_on_and_gives_up() -> None:
    left = []

    def work(name: str) -> str:
        try:
            for i in range(3):
                Stepper.stop((name, i))
            return name.upper()
        finally:
            left.append(name)

    one, two = Stepper(lambda: work("a")), Stepper(lambda: work("b"))
    assert [one.step(), two.step(), one.step()] == [("a", 0), ("b", 0), ("a", 1)]
    two.close()
    assert left == ["b"]
    assert [one.step(), one.step(), one.step()] == [("a", 2), None, None]
    assert one.done
    assert one.result == "A"
    broken = Stepper(lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        broken.step()
    assert Stepper.current() is None


@pytest.mark.parametrize("name", ["open_clip", "hf_clip", "deit"])
def test_a_map_of_features_is_folded_into_the_projection_that_makes_them(name: str) -> None:
    model = clone(dissected(name)[0])

    def features() -> list[Tensor]:
        with torch.no_grad():
            if name == "deit":
                return [model(IMAGES[:4])]
            return [
                F.normalize(x, dim=-1)
                for x in Retrieval([]).outputs(model, (IMAGES[:4], TEXTS[:4]))
            ]

    before = features()
    for place in range(len(before)):
        found = find_projection(model, features, place)
        assert found is not None
        turn = torch.linalg.qr(torch.randn(len(before[place][0]), len(before[place][0])))[0]
        fold(model, found, turn)
        now = features()
        torch.testing.assert_close(now[place], before[place] @ turn.T, rtol=1e-4, atol=1e-5)
        before = now
    assert find_projection(nn.Linear(3, 4), lambda: [torch.zeros(2, 5)], 0) is None


@torch.no_grad()
def test_what_reads_as_many_features_as_an_output_has_is_not_its_projection() -> None:
    model = nn.ModuleDict({"projection": nn.Linear(8, 6), "head": nn.Linear(6, 2)})
    model["square"] = nn.Linear(6, 6)  # whose bias is as long as either side
    images = torch.randn(4, 8)

    def outputs() -> list[Tensor]:
        features = model["projection"](images)
        return [features, model["head"](features), model["square"](features)]

    def features() -> list[Tensor]:
        return [model["projection"](images), model["square"](images[:, :6])]

    assert find_projection(model, outputs, 0) is None  # others read it, too
    assert find_projection(model, features, 0) == Projection(name="projection.weight", dim=0)
    assert find_projection(model, features, 1) == Projection(name="square.weight", dim=0)
    assert Projection(name="head.weight", dim=0) == Projection(name="head.weight", dim=0)


class LossAlone:
    """A task in the words of `contracts.Task`, and no more."""

    name = "loss alone"

    def __init__(self, task: Retrieval):
        self.batches, self.loss, self.measure = task.batches, task.loss, task.measure
        self.example_inputs = task.example_inputs


def test_a_task_that_gives_a_loss_alone_is_enough() -> None:
    model, anatomy = dissected("open_clip")
    plan = vlprune.make_plan(anatomy, {a.name: (0, 1) for a in anatomy.select(("head",)).axes})
    small = vlprune.repair(model, plan, LossAlone(pairs()), sensitivity=False)
    cut = vlprune.prune(model, plan, inputs_of(model))
    assert record_of(small).repaired
    inputs = inputs_of_size(model, 16, 1)
    assert far(small, model, inputs) < far(cut, model, inputs)
