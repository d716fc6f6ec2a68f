"""Every path keeps device and dtype: fake CUDA, meta, bf16, autocast, and a GPU where one is."""

import copy
import warnings
from typing import Any

import pytest
import torch
import zoo
from conftest import dissected, inputs_of, random_keep
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import vlprune
from vlprune.calls import Call, calls_of, map_tensors, run, tensors_of
from vlprune.cost import count_params
from vlprune.cutting import cut_
from vlprune.dissect import default_inputs
from vlprune.metrics import HardConcrete, UPop
from vlprune.tasks import CallableTask

CUDA = torch.device("cuda")


def moved(inputs: object, device: torch.device) -> list[Call]:
    return [map_tensors(call, lambda t: t.to(device)) for call in calls_of(inputs)]


def loss(model: nn.Module, calls: list[Call]) -> torch.Tensor:
    parts = [t for call in calls for t in tensors_of(run(model, call))]
    return sum(t.square().mean() for t in parts if t.is_floating_point())


@pytest.mark.parametrize("name", list(zoo.MAKERS))
def test_gates_gradients_and_cuts_stay_on_the_device(name: str) -> None:
    model, anatomy = dissected(name)
    plan = vlprune.make_plan(anatomy, random_keep(anatomy, 1))
    model = copy.deepcopy(model)
    with FakeTensorMode(allow_non_fake_inputs=True), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # fake CUDA has no real device to ask
        model.to(CUDA)
        if hasattr(model, "tie_weights"):
            model.tie_weights()  # a fake copy unties them
        calls = moved(inputs_of(model), CUDA)
        with vlprune.mask(model, plan), torch.no_grad():
            assert loss(model, calls).device.type == "cuda"
        with vlprune.Gates(model, anatomy.axes, per_sample=True) as gates:
            assert loss(model, calls).requires_grad  # its backward would need a real device
            made = [gate for fresh in gates._samples.values() for gate in fresh]
            assert {gate.device.type for gate in made} == {"cuda"}
        cut_(model, plan.rows)
        assert {t.device.type for t in [*model.parameters(), *model.buffers()]} == {"cuda"}
        with torch.no_grad():
            assert loss(model, calls).device.type == "cuda"


@pytest.mark.parametrize("name", ["open_clip", "deit", "hf_clip"])
def test_statistics_are_kept_on_the_device(name: str) -> None:
    model, anatomy = dissected(name)
    model = copy.deepcopy(model)
    with FakeTensorMode(allow_non_fake_inputs=True), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.to(CUDA)
        with vlprune.metrics.Activation(model, anatomy) as meter, torch.no_grad():
            loss(model, moved(inputs_of(model), CUDA))
            meter.update()
        assert {total.device.type for total in meter._totals.values()} == {"cuda"}


@pytest.mark.parametrize("name", ["deit", "open_clip", "hf_clip"])
def test_dissecting_planning_and_cutting_need_no_weights(name: str) -> None:
    real, anatomy = dissected(name)
    model = copy.deepcopy(real).to("meta")
    inputs = moved(inputs_of(real), torch.device("meta"))
    found = vlprune.dissect(model, moved(default_inputs(real), torch.device("meta")))
    assert found.axes == anatomy.axes
    assert vlprune.price(found, {}) == vlprune.price(anatomy, {})
    plan = vlprune.make_plan(anatomy, random_keep(anatomy, 2))
    small = vlprune.prune(model, plan, verify=False)
    assert all(p.is_meta for p in small.parameters())
    assert count_params(small) == vlprune.price(anatomy, plan.keep).params
    run(small, inputs[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_cut_keeps_dtype_and_requires_grad(dtype: torch.dtype) -> None:
    model = zoo.make("open_clip").to(dtype)
    frozen = [p for name, p in model.named_parameters() if name.startswith("visual")]
    for parameter in frozen:
        parameter.requires_grad_(False)
    anatomy = dissected("open_clip")[1]
    plan = vlprune.make_plan(anatomy, random_keep(anatomy, 3, ("head", "ffn")))
    small = vlprune.prune(model, plan)
    for name, parameter in small.named_parameters():
        assert parameter.dtype == dtype
        assert parameter.requires_grad == (not name.startswith("visual"))


@pytest.mark.parametrize("name", list(zoo.MAKERS))
def test_masked_equals_cut_in_bf16_to_its_precision(name: str) -> None:
    model, anatomy = dissected(name)
    model = copy.deepcopy(model).to(torch.bfloat16)
    plan = vlprune.make_plan(anatomy, random_keep(anatomy, 6))
    small = vlprune.prune(model, plan, inputs_of(model))
    calls = [
        map_tensors(call, lambda t: t.bfloat16() if t.is_floating_point() else t)
        for call in calls_of(inputs_of(model))
    ]
    with torch.no_grad():
        with vlprune.mask(model, plan):
            masked = [t for call in calls for t in tensors_of(run(model, call))]
        cut = [t for call in calls for t in tensors_of(run(small, call))]
    for a, b in zip(masked, cut, strict=True):
        if a.is_floating_point() and a.numel():
            assert a.dtype == b.dtype
            assert float((a - b).abs().max()) <= 0.05 * max(float(a.abs().max()), 1e-3)


def test_metrics_run_under_autocast() -> None:
    model, anatomy = zoo.make("deit"), dissected("deit")[1]
    images = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))

    def autocast_loss(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return model(batch).float().square().mean()

    exact = CallableTask([images], lambda m, b: m(b).square().mean(), example_inputs=(images[:1],))
    rough = CallableTask([images], autocast_loss, example_inputs=(images[:1],))
    for metric in ("taylor", "fisher", "activation", "mope"):
        a, b = (vlprune.score(model, metric, task, anatomy=anatomy) for task in (exact, rough))
        for axis in a.anatomy.select(("head",)).axes:
            x, y = torch.tensor(a.values[axis.name]), torch.tensor(b.values[axis.name])
            assert float((x - y).norm() / x.norm()) < 0.2, (metric, axis.name)


@pytest.mark.parametrize("kind", [UPop, HardConcrete])
@pytest.mark.parametrize("name", ["open_clip", "deit", "BlipForQuestionAnswering"])
def test_learned_masks_stay_on_the_device(name: str, kind: Any) -> None:
    real, anatomy = dissected(name)
    model = copy.deepcopy(real)
    with FakeTensorMode(allow_non_fake_inputs=True), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.to(CUDA)
        if hasattr(model, "tie_weights"):
            model.tie_weights()
        masks = kind(model, anatomy, budget={"params": 0.75}, steps=4)
        with masks:
            for gate_name, gate in masks.gates.values.items():
                masks._set(gate_name, torch.rand(len(gate)))  # what is decided lies on the CPU
            assert loss(model, moved(inputs_of(real), CUDA)).requires_grad
            assert {gate.device.type for gate in masks.gates.values.values()} == {"cuda"}


@pytest.mark.gpu
@pytest.mark.parametrize("kind", [UPop, HardConcrete])
def test_a_search_on_a_gpu_makes_the_plan_of_a_cpu(kind: Any) -> None:
    real, anatomy = dissected("deit")
    images = torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    plans = []
    for device in ("cpu", "cuda"):
        model = copy.deepcopy(real).to(device)
        with kind(model, anatomy, budget={"params": 0.6}, steps=4) as masks:
            for _ in range(4):
                model(images.to(device)).square().mean().backward()
                masks.update()
                model.zero_grad()
                masks.step()
        plans.append(masks.plan())
    assert plans[0].keep == plans[1].keep


@pytest.mark.gpu
def test_the_law_holds_on_a_gpu() -> None:
    model, anatomy = dissected("open_clip")
    model = copy.deepcopy(model).to(CUDA)
    plan = vlprune.make_plan(anatomy, random_keep(anatomy, 1))
    small = vlprune.prune(model, plan, moved(inputs_of(model), CUDA))
    assert all(p.device.type == "cuda" for p in small.parameters())


@pytest.mark.gpu
def test_ablations_on_a_gpu_equal_those_on_the_cpu() -> None:
    from test_ablation import pairs

    from vlprune.tasks import Retrieval

    model, anatomy = dissected("open_clip")
    task = Retrieval(pairs())
    there = copy.deepcopy(model).to(CUDA)
    for copies in (1, "auto"):
        a, b = (
            vlprune.score(m, "mope", task, anatomy=anatomy, measure="kl", copies=copies)
            for m in (model, there)
        )
        for name, row in a.values.items():
            assert b.values[name] == pytest.approx(row, rel=1e-3, abs=1e-5), name


@pytest.mark.gpu
def test_repair_on_a_gpu_equals_that_on_the_cpu() -> None:
    from test_repair import pairs

    model, anatomy = dissected("open_clip")
    task = pairs()
    there = copy.deepcopy(model).to(CUDA)
    kinds = ("head", "ffn", "layer")
    scores = [
        vlprune.score(m, "reconstruction", task, anatomy=anatomy, strategies=kinds)
        for m in (model, there)
    ]
    for name, row in scores[0].values.items():
        assert scores[1].values[name] == pytest.approx(row, rel=1e-2, abs=1e-6), name
    plan = vlprune.plan(scores[0], {"params": 0.7})
    small, other = (vlprune.repair(m, plan, task, anatomy=anatomy) for m in (model, there))
    assert all(p.device.type == "cuda" for p in other.parameters())
    for (name, a), b in zip(small.state_dict().items(), other.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b.cpu(), rtol=1e-2, atol=1e-3, msg=name)
