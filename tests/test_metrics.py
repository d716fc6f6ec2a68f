"""Every metric against brute force, and the laws that all metrics of the registry obey."""

import pytest
import torch
import torch.nn.functional as F
import zoo
from conftest import dissected
from torch import Tensor, nn

import vlprune
from vlprune.registry import METRICS
from vlprune.tasks import CallableTask

IMAGES = torch.randn(6, 3, 32, 32, generator=torch.Generator().manual_seed(1))
LABELS = torch.tensor([1, 4, 2, 7, 0, 9])
DRAWN = ("random", "hard_concrete")  # unit by unit, in order
BATCHES = [(IMAGES[:3], LABELS[:3]), (IMAGES[3:], LABELS[3:])]


def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


@pytest.fixture
def task() -> CallableTask:
    return CallableTask(BATCHES, loss, example_inputs=(IMAGES[:1],))


@pytest.fixture(scope="module")
def deit() -> tuple[nn.Module, vlprune.Anatomy]:
    return dissected("deit")


def without(model: nn.Module, anatomy: vlprune.Anatomy, axis: str, unit: int) -> nn.Module:
    """The model cut for good by one unit."""
    units = range(anatomy.axis(axis).units)
    plan = vlprune.make_plan(anatomy, {axis: tuple(u for u in units if u != unit)})
    return vlprune.prune(model, plan, (IMAGES[:2],))


# -- laws -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["head", "ffn", "layer", "sublayer"])
@pytest.mark.parametrize("metric", list(METRICS))
def test_every_metric_scores_every_unit_and_leaves_the_model_alone(
    metric: str, kind: str, deit: tuple[nn.Module, vlprune.Anatomy], task: CallableTask
) -> None:
    model, anatomy = deit
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    scores = vlprune.score(model, metric, task, anatomy=anatomy, strategies=(kind,))
    assert scores.metric == metric
    assert {a.kind for a in scores.anatomy.axes} == {kind}
    assert all(len(scores.values[a.name]) == a.units for a in scores.anatomy.axes)
    assert len({value for row in scores.values.values() for value in row}) > 1
    assert all(torch.equal(before[name], t) for name, t in model.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("metric", list(METRICS))
def test_same_seed_gives_the_same_scores(metric: str, task: CallableTask) -> None:
    model, anatomy = dissected("deit")
    first, second = (vlprune.score(model, metric, task, anatomy=anatomy) for _ in range(2))
    assert first == second


@pytest.mark.parametrize("metric", [m for m in METRICS if m not in DRAWN])
def test_permuting_units_permutes_scores(metric: str, task: CallableTask) -> None:
    model = zoo.make("deit")
    anatomy = vlprune.dissect(model)
    settings = {"num_groups": 10**6} if metric == "mope" else {}
    before = vlprune.score(model, metric, task, anatomy=anatomy, **settings)
    order = torch.randperm(192, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():  # permute the neurons of one FFN
        mlp = model.blocks[1].mlp
        mlp.fc1.weight.copy_(mlp.fc1.weight[order])
        mlp.fc1.bias.copy_(mlp.fc1.bias[order])
        mlp.fc2.weight.copy_(mlp.fc2.weight[:, order])
    after = vlprune.score(model, metric, task, anatomy=anatomy, **settings)
    name = "blocks.1.mlp:ffn"
    permuted = torch.tensor(before.values[name], dtype=torch.float64)[order]
    got = torch.tensor(after.values[name], dtype=torch.float64)
    tolerance = 1e-4 * float(permuted.abs().max())
    assert torch.allclose(got, permuted, rtol=1e-3, atol=tolerance)
    assert before.values["blocks.1.attn:head"] == pytest.approx(
        after.values["blocks.1.attn:head"], rel=1e-2, abs=1e-6
    )


@pytest.mark.parametrize("metric", [m for m, kind in METRICS.items() if kind.needs != "nothing"])
def test_a_metric_that_needs_data_says_so(metric: str) -> None:
    model, anatomy = dissected("deit")
    with pytest.raises(TypeError, match=f"metric '{metric}' needs a task"):
        vlprune.score(model, metric, anatomy=anatomy)


@pytest.mark.parametrize("metric", list(METRICS))
def test_every_metric_works_in_anyones_own_loop(metric: str) -> None:
    model, anatomy = dissected("deit")
    kind = METRICS[metric]
    with kind(model, anatomy) as meter:
        for batch in BATCHES:
            value = loss(model, batch)
            if kind.needs in ("backward", "steps"):
                value.backward()
            if kind.needs in ("measure", "task"):
                with torch.no_grad():
                    meter.update(lambda batch=batch: -float(loss(model, batch)))
            elif kind.needs == "outputs":
                meter.update(value)
            else:
                meter.update()
            if kind.needs == "steps":
                meter.step()
        both = meter.compute()
        meter.reset()
        if kind.needs != "nothing":
            value = loss(model, BATCHES[0])
            if kind.needs in ("backward", "steps"):
                value.backward()
            if kind.needs == "outputs":
                meter.update(value)
            else:
                meter.update(lambda: -float(loss(model, BATCHES[0]).detach()))
            if kind.needs == "steps":
                meter.step()
            assert meter.compute() != both
    model.zero_grad(set_to_none=True)


# -- references -----------------------------------------------------------------------------------


def test_magnitude_is_the_norm_of_what_a_cut_removes(
    deit: tuple[nn.Module, vlprune.Anatomy],
) -> None:
    model, anatomy = deit
    whole = sum(float(p.detach().double().square().sum()) for p in model.parameters())
    scores = vlprune.score(
        model, "magnitude", anatomy=anatomy, strategies=("head", "ffn", "layer", "sublayer")
    )
    for axis, unit in (
        ("blocks.1.attn:head", 2),
        ("blocks.0.mlp:ffn", 17),
        ("blocks:layer", 1),
        ("blocks:sublayer.attention", 0),
        ("blocks:sublayer.ffn", 2),
    ):
        small = without(model, anatomy, axis, unit)
        rest = sum(float(p.detach().double().square().sum()) for p in small.parameters())
        assert scores.values[axis][unit] == pytest.approx((whole - rest) ** 0.5, rel=1e-6)


def test_magnitude_l1_by_hand(deit: tuple[nn.Module, vlprune.Anatomy]) -> None:
    model, anatomy = deit
    scores = vlprune.score(model, "magnitude", anatomy=anatomy, p=1)
    mlp = model.blocks[2].mlp
    by_hand = (
        mlp.fc1.weight[5].abs().sum() + mlp.fc1.bias[5].abs() + mlp.fc2.weight[:, 5].abs().sum()
    )
    assert scores.values["blocks.2.mlp:ffn"][5] == pytest.approx(float(by_hand.detach()), rel=1e-6)
    with pytest.raises(ValueError, match="p must be 1 or 2; got 3"):
        vlprune.score(model, "magnitude", anatomy=anatomy, p=3)


def test_activation_of_a_neuron_is_the_norm_of_what_it_adds(
    deit: tuple[nn.Module, vlprune.Anatomy], task: CallableTask
) -> None:
    model, anatomy = deit
    scores = vlprune.score(model, "activation", task, anatomy=anatomy, strategies=("head", "ffn"))
    mlp, attn = model.blocks[0].mlp, model.blocks[0].attn
    seen = {}
    handles = [
        layer.register_forward_pre_hook(lambda m, args, key=key: seen.update({key: args[0]}))
        for key, layer in (("mlp", mlp.fc2), ("attn", attn.proj))
    ]
    with torch.no_grad():
        model(IMAGES)
    for handle in handles:
        handle.remove()
    added = seen["mlp"][..., 7, None] * mlp.fc2.weight[:, 7].detach()  # [B, T, D]
    assert scores.values["blocks.0.mlp:ffn"][7] == pytest.approx(float(added.norm()), rel=1e-4)
    features = range(16, 32)  # of head 1
    head = sum(
        float((seen["attn"][..., j, None] * attn.proj.weight[:, j].detach()).norm())
        for j in features
    )
    assert scores.values["blocks.0.attn:head"][1] == pytest.approx(head, rel=1e-4)


def test_activation_of_a_layer_is_the_norm_of_what_it_adds(
    deit: tuple[nn.Module, vlprune.Anatomy], task: CallableTask
) -> None:
    model, anatomy = deit
    scores = vlprune.score(model, "activation", task, anatomy=anatomy, strategies=("layer",))
    seen = {}
    handle = model.blocks[1].register_forward_hook(lambda m, a, o: seen.update(added=o - a[0]))
    with torch.no_grad():
        model(IMAGES)
    handle.remove()
    assert scores.values["blocks:layer"][1] == pytest.approx(float(seen["added"].norm()), rel=1e-4)


@pytest.mark.parametrize(("metric", "power"), [("taylor", 1), ("fisher", 2)])
def test_gradient_metrics_are_means_of_finite_differences(metric: str, power: int) -> None:
    model = zoo.make("deit").double()
    batches = [(image.double(), label) for image, label in BATCHES]
    task = CallableTask(batches, loss, example_inputs=(IMAGES[:1].double(),))
    anatomy = vlprune.dissect(model, (IMAGES[:1].double(),))
    kinds = ("head", "ffn", "layer", "sublayer")
    scores = vlprune.score(model, metric, task, anatomy=anatomy, strategies=kinds)
    for name, unit in (
        ("blocks.1.attn:head", 1),
        ("blocks.2.mlp:ffn", 3),
        ("blocks:layer", 0),
        ("blocks:sublayer.ffn", 1),
    ):
        total = 0.0
        with vlprune.Gates(model, anatomy.axes) as gates, torch.no_grad():
            for images, labels in batches:
                for image, label in zip(images, labels, strict=True):
                    ends = []
                    for step in (1e-5, -1e-5):
                        moved = torch.ones(anatomy.axis(name).units, dtype=torch.float64)
                        moved[unit] += step
                        gates.values[name] = moved
                        ends.append(float(loss(model, (image[None], label[None]))))
                    total += abs((ends[0] - ends[1]) / 2e-5) ** power
            gates.values[name] = torch.ones(anatomy.axis(name).units)
        assert scores.values[name][unit] == pytest.approx(total / 6, rel=1e-3, abs=1e-9), name


def test_mope_is_the_fall_of_the_measure_of_the_cut_model(
    deit: tuple[nn.Module, vlprune.Anatomy], task: CallableTask
) -> None:
    model, anatomy = deit
    kinds = ("head", "layer", "sublayer")
    scores = vlprune.score(model, "mope", task, anatomy=anatomy, strategies=kinds)
    dense = task.measure(model)
    for axis in scores.anatomy.axes:
        for unit in range(axis.units):
            fall = dense - task.measure(without(model, anatomy, axis.name, unit))
            assert scores.values[axis.name][unit] == pytest.approx(fall, rel=1e-4, abs=1e-5)


def test_mope_measures_neurons_in_groups_of_like_importance(
    deit: tuple[nn.Module, vlprune.Anatomy], task: CallableTask
) -> None:
    model, anatomy = deit
    cheap = vlprune.score(model, "taylor", task, anatomy=anatomy)
    scores = vlprune.score(
        model, "mope", task, anatomy=anatomy, strategies=("ffn",), num_groups=4, rewire="taylor"
    )
    name = "blocks.1.mlp:ffn"
    order = torch.tensor(cheap.values[name]).argsort(stable=True)
    units = range(anatomy.axis(name).units)
    dense = task.measure(model)
    for group in order.tensor_split(4):
        gone = set(group.tolist())
        keep = {name: tuple(u for u in units if u not in gone)}
        small = vlprune.prune(model, vlprune.make_plan(anatomy, keep), (IMAGES[:2],))
        fall = (dense - task.measure(small)) / len(gone)
        assert [scores.values[name][u] for u in gone] == pytest.approx([fall] * 48, abs=2e-6)
    first = [scores.values[name][u] for u in order[:48].tolist()]
    assert first == sorted(first)  # inside a group the cheap metric orders


def test_mope_counts_its_measures_and_reports_progress(
    deit: tuple[nn.Module, vlprune.Anatomy],
) -> None:
    model, anatomy = deit
    calls, steps = [], []
    meter = vlprune.metrics.Mope(
        model, anatomy, num_groups=5, progress=lambda done, total: steps.append((done, total))
    )
    with meter:
        meter.update(lambda: float(len(calls.append(0) or calls)))
    assert len(calls) == 1 + 9 + 3 * 5  # the dense model, heads, groups
    assert steps[-1] == (24, 24)
    with pytest.raises(TypeError, match="must be given a task or a function"):
        meter.update()


def test_gradient_metrics_without_a_backward_say_so(
    deit: tuple[nn.Module, vlprune.Anatomy],
) -> None:
    model, anatomy = deit
    with vlprune.metrics.Taylor(model, anatomy) as taylor, torch.no_grad():
        model(IMAGES)
        with pytest.raises(RuntimeError, match=r"Taylor\.update must follow loss\.backward\(\)"):
            taylor.update()


def test_a_metric_of_thirty_lines_shows_up_by_itself(task: CallableTask) -> None:
    from vlprune.metrics._base import AxisMetric

    class Position(AxisMetric):
        needs = "nothing"

        def update(self, measure: object = None) -> None: ...

        def compute(self) -> vlprune.Scores:
            return self._scores({a.name: torch.arange(a.units) for a in self.anatomy.axes})

    METRICS.register("position")(Position)
    try:
        model, anatomy = dissected("deit")
        scores = vlprune.score(model, "position", anatomy=anatomy)
        assert scores.metric == "position"
        assert scores.values["blocks.0.attn:head"] == (0.0, 1.0, 2.0)
    finally:
        del METRICS._entries["position"]


@pytest.mark.parametrize("name", ["BlipForImageTextRetrieval", "hf_clip", "open_clip"])
@pytest.mark.parametrize("metric", ["taylor", "fisher", "activation", "mope"])
def test_metrics_score_both_towers_and_the_fusion(name: str, metric: str) -> None:
    from vlprune.calls import calls_of, run, tensors_of
    from vlprune.dissect import default_inputs

    model, anatomy = dissected(name)

    def any_loss(model: nn.Module, inputs: object) -> Tensor:
        parts = [t for call in calls_of(inputs) for t in tensors_of(run(model, call))]
        return sum(t.square().mean() for t in parts if t.is_floating_point())

    task = CallableTask([default_inputs(model, batch=3)], any_loss)
    scores = (
        vlprune.score(model, metric, task, anatomy=anatomy, num_groups=2)
        if (metric == "mope")
        else vlprune.score(model, metric, task, anatomy=anatomy)
    )
    for tower in {axis.tower for axis in anatomy.axes}:
        values = [
            abs(v) for a in scores.anatomy.axes if a.tower == tower for v in scores.values[a.name]
        ]
        assert max(values) > 0, tower
