"""Latency tables: measured by cutting, priced by arithmetic, met as a budget, refused by name.

The clocks here are made: they read the shapes of a model, so that every number is known.
"""

import dataclasses
import functools
import itertools
import random
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from conftest import dissected, inputs_of, random_keep
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import vlprune
from vlprune.calls import Inputs
from vlprune.clocks import DeviceClock, batch_of, resized
from vlprune.cost import absolute_budget, resource_of
from vlprune.errors import BudgetError, CheckpointError, PlanError
from vlprune.latency import latency_ms, with_latency
from vlprune.profile import (
    check_place,
    like_axes,
    predicted_beside_measured,
    whole_layers,
)
from vlprune.timetable import LatencyRow, LatencyTable

KINDS = ("head", "ffn", "layer")


class MadeClock:
    """Takes for every matrix its size, and for every block and call a constant."""

    def __init__(self, multiple: int = 1, work: float = 1.0):
        self.multiple, self.work, self.models = multiple, work, 0

    def __call__(self, models: Sequence[nn.Module], example_inputs: Inputs) -> list[float]:
        self.models += len(models)
        return [self.ms(model, batch_of(example_inputs)) for model in models]

    def ms(self, model: nn.Module, batch: int) -> float:
        total = 0.0
        for name, module in model.named_modules():
            heads = getattr(module, "num_heads", None)
            total += 0.25 if heads else 0.0  # a constant in every block
            total += 0.125 * heads if isinstance(heads, int) else 0.0
            if name.endswith(("fc1", "c_fc")):
                width = module.weight.shape[0]
                total += 0.01 * (-(-width // self.multiple) * self.multiple)
        return 3.0 + total * (1.0 - self.work + self.work * batch)


@functools.cache
def measured(name: str = "deit", kinds: tuple[str, ...] = KINDS) -> LatencyTable:
    model, anatomy = dissected(name)
    return vlprune.profile(model, anatomy=anatomy, strategies=kinds, clock=MadeClock())


def scored(name: str = "deit", kinds: tuple[str, ...] = KINDS, seed: int = 0) -> vlprune.Scores:
    anatomy = dissected(name)[1].select(kinds)
    draw = random.Random(seed)
    rows = {a.name: tuple(draw.random() for _ in range(a.units)) for a in anatomy.axes}
    return vlprune.Scores(anatomy=anatomy, values=rows, metric="drawn")


# -- measuring -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["deit", "open_clip"])
@pytest.mark.parametrize("seed", range(6))
def test_the_prediction_is_what_a_clock_without_noise_measures(name: str, seed: int) -> None:
    model, anatomy = dissected(name)
    kinds = KINDS if seed % 2 else KINDS[:2]
    keep = random_keep(anatomy, seed, kinds)
    keep = {a: units or (0,) for a, units in keep.items()}  # without any a block computes no more
    plan = vlprune.make_plan(anatomy, keep)
    table, clock = measured(name), MadeClock()
    found = predicted_beside_measured(table, model, plan, clock=clock)
    assert found.error == pytest.approx(0.0, abs=1e-9)
    assert found.dense_ms == table.dense_ms == clock.ms(model, 1)
    small = vlprune.prune(model, plan, verify=False)
    assert latency_ms(table, plan.axes, plan.keep) == pytest.approx(clock.ms(small, 1), rel=1e-9)


def test_blocks_of_equal_shape_are_measured_once() -> None:
    model, anatomy = dissected("deit")
    clock = MadeClock()
    table = vlprune.profile(
        model, anatomy=anatomy, strategies=KINDS[:2], widths=(0.5,), clock=clock
    )
    assert [(row.kind, len(row.axes)) for row in table.rows] == [("head", 3), ("ffn", 3)]
    groups = list(like_axes(anatomy.select(KINDS[:2])))
    heads = 2  # whole, and two of three: half, rounded, which is one less than all, too
    multiples = 1 + 1 + 6  # whole, the middle, below it by 1, 2, ... 32
    drawn = 1 + 4  # whole, and plans that scale the table
    assert len(groups) == 2
    assert (
        clock.models == heads + 2 + drawn + multiples + 2
    )  # the last: one batch and a doubled one
    clip = list(like_axes(dissected("open_clip")[1].select(("head",))))
    assert [len(axes) for axes in clip] == [3, 2]  # towers differ


@pytest.mark.parametrize(("multiple", "found"), [(1, 1), (16, 1), (64, 64)])
def test_a_multiple_that_runs_fast_is_found(multiple: int, found: int) -> None:
    # a width just below a multiple takes as long as that, never longer: only a penalty counts
    class Penalised(MadeClock):
        def ms(self, model: nn.Module, batch: int) -> float:
            slow = any(
                name.endswith("fc1") and module.weight.shape[0] % self.multiple
                for name, module in model.named_modules()
            )
            return super().ms(model, batch) * (3.0 if slow and self.multiple > 16 else 1.0)

    model, anatomy = dissected("deit")
    table = vlprune.profile(model, anatomy=anatomy, strategies=("ffn",), clock=Penalised(multiple))
    assert table.round_to == found
    assert any(f"round_to={found}" in remark for remark in table.remarks) == (found > 1)
    plan = vlprune.plan(scored(kinds=("ffn",)), {"latency": 0.8}, latency=table)
    assert all(len(row.keep) % found == 0 for row in plan.rows)
    assert plan.made_by.get("round_to", 1) == found


def test_an_idle_device_is_named() -> None:
    model, anatomy = dissected("deit")
    busy = vlprune.profile(model, anatomy=anatomy, clock=MadeClock(work=1.0), strategies=("head",))
    idle = vlprune.profile(model, anatomy=anatomy, clock=MadeClock(work=0.05), strategies=("head",))
    assert busy.busy is not None
    assert not busy.is_idle
    assert busy.remarks == ()
    assert idle.busy is not None
    assert idle.busy < 0.05
    assert "idle rather than compute-bound" in str(idle)


def test_noise_makes_no_layer_cheaper_than_its_parts_and_no_width_cheaper_than_less() -> None:
    class Noisy(MadeClock):
        def ms(self, model: nn.Module, batch: int) -> float:
            return super().ms(model, batch) * draw.uniform(0.8, 1.2)

    draw = random.Random(0)
    model, anatomy = dissected("open_clip")
    table = vlprune.profile(model, anatomy=anatomy, clock=Noisy())
    priced = with_latency(anatomy.select(KINDS), table)
    layers = [axis for axis in priced.axes if axis.kind == "layer"]
    for axis in layers:
        inside = [a for a in priced.axes if a.name.startswith(f"{axis.path}.0.")]
        none = {a.name: () for a in inside}
        parts = table.dense_ms - latency_ms(table, inside, none)
        assert table.by_axis[axis.name].ms[1] >= parts - 1e-9
        assert parts > 0


def test_a_layer_that_was_measured_cheaper_than_its_parts_takes_what_they_take() -> None:
    _, anatomy = dissected("deit")
    rows = {row.kind: row for row in measured().rows}
    parts = rows["head"].ms[-1] + rows["ffn"].ms[-1]
    cheap = dataclasses.replace(rows["layer"], ms=(0.0, 0.5 * parts))
    table = dataclasses.replace(measured(), rows=(rows["head"], rows["ffn"], cheap))
    found = whole_layers(table, anatomy.select(KINDS))
    assert found.by_axis["blocks:layer"].ms[1] == pytest.approx(parts)
    assert whole_layers(measured(), anatomy.select(KINDS)) == measured()


@given(seed=st.integers(0, 1000))
@settings(max_examples=30, deadline=None)
def test_less_never_takes_longer(seed: int) -> None:
    anatomy = with_latency(dissected("open_clip")[1].select(KINDS), measured("open_clip"))
    keep = random_keep(anatomy, seed)
    draw = random.Random(seed)
    axis = draw.choice([a for a in anatomy.axes if len(keep[a.name]) > a.least])
    fewer = {**keep, axis.name: keep[axis.name][1:]}
    assert vlprune.price(anatomy, fewer).latency_ms <= vlprune.price(anatomy, keep).latency_ms


def test_heads_and_their_dimensions_multiply() -> None:
    _, anatomy = dissected("deit")
    axes = {a.kind: a for a in anatomy.axes if a.path == "blocks.0.attn"}
    rows = tuple(
        LatencyRow(kind=kind, axes=(axes[kind].name,), kept=(0, axes[kind].units), ms=(0.0, 8.0))
        for kind in ("head", "head_dim")
    )
    table = dataclasses.replace(measured(), rows=rows, dense_ms=10.0)
    head, dims = axes["head"], axes["head_dim"]
    keep = {head.name: (0,), dims.name: tuple(range(dims.units // 2))}
    expected = 10.0 - 8.0 * (1.0 - (1 / head.units) * 0.5)
    assert latency_ms(table, [head, dims], keep) == pytest.approx(expected)


# -- as a budget -----------------------------------------------------------------------------------


@pytest.mark.parametrize("allocation", ["global", "uniform", "isomorphic", "measured", "knapsack"])
@pytest.mark.parametrize("name", ["deit", "open_clip"])
@pytest.mark.parametrize("share", [0.6, 0.85])
def test_a_latency_budget_is_met_within_one_unit(allocation: str, name: str, share: float) -> None:
    table = measured(name)
    scores = scored(name, ("head", "ffn"))
    plan = vlprune.plan(scores, {"latency": share}, allocation, latency=table)
    priced = with_latency(scores.anatomy, table)
    limit = share * table.dense_ms
    assert plan.dense.latency_ms == pytest.approx(table.dense_ms)
    assert plan.planned.latency_ms == latency_ms(table, plan.axes, plan.keep) <= limit
    rows = [(table.by_axis[a.name], a) for a in priced.axes]
    steps = [row.at(n + 1) - row.at(n) for row, axis in rows for n in range(axis.units)]
    dearest = max(steps)  # the dearest unit: the plan is no more than this below the limit
    assert plan.planned.latency_ms > limit - dearest - 1e-9
    assert plan.made_by["latency"] == table.place
    assert f"ms ({plan.planned.latency_ms / table.dense_ms:.1%})" in str(plan)
    in_ms = vlprune.plan(scores, {"latency_ms": limit}, allocation, latency=table)
    assert in_ms.keep == plan.keep


def test_the_knapsack_keeps_to_latency_and_parameters_at_once() -> None:
    scores, table = scored("open_clip"), measured("open_clip")
    budget = {"latency": 0.7, "params": 0.8}
    plan = vlprune.plan(scores, budget, "knapsack", latency=table)
    assert plan.planned.latency_ms <= 0.7 * table.dense_ms
    assert plan.planned.params <= 0.8 * plan.dense.params
    priced = with_latency(scores.anatomy, table)
    for row in plan.rows:
        for unit in row.removed:
            more = {**plan.keep, row.axis.name: tuple(sorted((*row.keep, unit)))}
            cost = vlprune.price(priced, more)
            over = cost.latency_ms > 0.7 * table.dense_ms or cost.params > 0.8 * plan.dense.params
            assert over or row.axis.kind == "ffn"  # a removed layer makes its own neurons free


@pytest.mark.parametrize("seed", range(4))
def test_the_knapsack_is_the_best_of_all_plans_by_a_curved_table(seed: int) -> None:
    scores = scored("open_clip", ("head",), seed)
    draw = random.Random(seed)
    rows = []
    for axis in scores.anatomy.axes:  # rising by unlike steps: cheap ones and dear ones
        steps = [draw.choice([0.1, 2.0]) for _ in range(axis.units)]
        ms = tuple(itertools.accumulate(steps, initial=0.0))
        kept = tuple(range(axis.units + 1))
        rows.append(LatencyRow(kind="head", axes=(axis.name,), kept=kept, ms=ms))
    table = dataclasses.replace(measured("open_clip"), rows=tuple(rows), dense_ms=40.0)
    most = sum(row.ms[-1] for row in rows)
    limit = 40.0 - 0.55 * most
    plan = vlprune.plan(scores, {"latency_ms": limit}, "knapsack", latency=table)
    worth = sum(scores.values[row.axis.name][u] for row in plan.rows for u in row.keep)
    axes = scores.anatomy.axes
    best = {a.name: sorted(scores.values[a.name], reverse=True) for a in axes}
    top = max(
        sum(sum(best[a.name][:n]) for a, n in zip(axes, counts, strict=True))
        for counts in itertools.product(*(range(a.units + 1) for a in axes))
        if 40.0 - most + sum(r.ms[n] for r, n in zip(rows, counts, strict=True)) <= limit
    )
    assert plan.planned.latency_ms <= limit
    assert worth == pytest.approx(top, rel=1e-3)


def test_units_that_take_longer_go_first_under_latency_and_not_under_parameters() -> None:
    scores = scored("open_clip", ("ffn",))
    equal = dataclasses.replace(
        scores, values={n: (1.0,) * len(r) for n, r in scores.values.items()}
    )
    slow = [a.name for a in equal.anatomy.axes if a.tower == "text"]
    rows = tuple(
        LatencyRow(
            kind="ffn",
            axes=(a.name,),
            kept=(0, a.units),
            ms=(0.0, 10.0 if a.name in slow else 0.1),
        )
        for a in equal.anatomy.axes
    )
    table = dataclasses.replace(measured("open_clip"), rows=rows, dense_ms=30.0)
    for allocation in ("global", "knapsack"):
        plan = vlprune.plan(equal, {"latency": 0.6}, allocation, latency=table)
        assert all((len(r.removed) > 0) == (r.axis.name in slow) for r in plan.rows), allocation


@pytest.mark.parametrize("allocation", ["global", "uniform", "isomorphic", "measured"])
def test_every_ranking_keeps_neurons_in_multiples(allocation: str) -> None:
    scores = scored("open_clip", ("head", "ffn"))
    plan = vlprune.plan(scores, {"macs": 0.6}, allocation, round_to=24)
    for row in plan.rows:
        if row.axis.kind == "ffn":
            assert len(row.keep) % 24 == 0 or not row.removed
            values = scores.values[row.axis.name]
            worst = min((values[u] for u in row.keep), default=1.0)
            assert all(values[u] <= worst for u in row.removed)
    assert plan.planned.macs <= 0.6 * plan.dense.macs
    with pytest.raises(ValueError, match="round_to must be at least 1; got 0"):
        vlprune.plan(scores, {"macs": 0.6}, allocation, round_to=0)


def test_units_are_priced_in_what_the_budget_limits() -> None:
    assert resource_of({"latency": 0.5}) == resource_of({"latency_ms": 3.0}) == "latency_ms"
    assert resource_of({"latency": 0.5, "params": 0.5}) == "params"


# -- as data ---------------------------------------------------------------------------------------


def test_a_table_to_json_and_back_is_equal(tmp_path: Path) -> None:
    from vlprune.store import read_latency, read_plan, read_scores, write_json

    table, scores = measured(), scored()
    write_json(table, tmp_path / "table.json")
    assert read_latency(tmp_path / "table.json") == table
    priced = dataclasses.replace(scores, anatomy=with_latency(scores.anatomy, table))
    write_json(priced, tmp_path / "scores.json")
    plan = vlprune.plan(read_scores(tmp_path / "scores.json"), {"latency": 0.7})
    write_json(plan, tmp_path / "plan.json")
    assert read_plan(tmp_path / "plan.json") == plan
    (tmp_path / "table.json").write_text((tmp_path / "table.json").read_text().replace('"ms"', "1"))
    with pytest.raises(CheckpointError, match="must hold LatencyTable"):
        read_latency(tmp_path / "table.json")


# -- borders ---------------------------------------------------------------------------------------


def test_a_missing_table_says_how_to_make_one() -> None:
    for key in ("latency", "latency_ms"):
        with pytest.raises(BudgetError) as caught:
            vlprune.plan(scored(), {key: 0.5})
        text = str(caught.value)
        assert "must come with a latency table" in text
        assert "vlprune.profile(model, example_inputs)" in text
        assert "vlprune profile MODEL --out table.json" in text


def test_a_table_of_another_model_or_without_an_axis_is_refused_by_name() -> None:
    with pytest.raises(
        PlanError, match=r"must fit the anatomy of VisionTransformer .* one of CLIP"
    ):
        vlprune.plan(scored(), {"latency": 0.5}, latency=measured("open_clip"))
    with pytest.raises(PlanError, match=r"such as 'blocks:layer'.*strategies=\('layer', \.\.\.\)"):
        vlprune.plan(scored(), {"latency": 0.5}, latency=measured(kinds=("head", "ffn")))
    _, anatomy = dissected("deit")
    axis = next(a for a in anatomy.axes if a.kind == "sublayer")
    with pytest.raises(PlanError, match=f"it has none for '{axis.name}'"):
        latency_ms(measured(), [axis], {axis.name: ()})


def test_a_table_of_another_device_is_refused_by_name() -> None:
    model, anatomy = dissected("deit")
    plan = vlprune.make_plan(anatomy, {})
    other = dataclasses.replace(measured(), device="Abacus 3", threads=measured().threads + 1)
    with pytest.raises(ValueError, match=r"measured with device 'Abacus 3', here it is .*threads"):
        predicted_beside_measured(other, model, plan, clock=MadeClock())
    with pytest.raises(PlanError, match="latency table must fit the model VisionTransformer"):
        predicted_beside_measured(measured("open_clip"), model, plan, clock=MadeClock())
    check_place(measured(), measured().place)


def test_an_unreachable_latency_says_the_least_and_the_most() -> None:
    table = measured(kinds=("head", "ffn"))
    scores = scored(kinds=("head", "ffn"))
    with pytest.raises(BudgetError, match=r"latency=0\.01 asks for .* ms; these axes can reach"):
        vlprune.plan(scores, {"latency": 0.01}, latency=table)
    with pytest.raises(BudgetError, match=r"asks for 1e\+04 ms; .* at most"):
        vlprune.plan(scores, {"latency_ms": 1e4}, latency=table)
    limit = absolute_budget(with_latency(scores.anatomy, table), {"latency": 0.7, "macs": 0.9})
    assert limit["latency_ms"] == pytest.approx(0.7 * table.dense_ms)


def test_rows_must_rise() -> None:
    for kept, ms in (
        ((0, 2, 1), (0.0, 1.0, 2.0)),
        ((0, 1), (0.0, -1.0)),
        ((0, 1), (0.0,)),
        ((), ()),
    ):
        with pytest.raises(ValueError, match="rising numbers of units"):
            LatencyRow(kind="ffn", axes=("a",), kept=kept, ms=ms)


def test_a_table_fits_one_structure_so_compress_takes_one_step() -> None:
    model, _ = dissected("deit")
    with pytest.raises(ValueError, match="at most 1, as a latency table fits one structure; got 2"):
        vlprune.compress(model, None, {"latency": 0.5}, latency=measured(), steps=2)


def test_learnt_gates_refuse_a_budget_of_latency() -> None:
    model, anatomy = dissected("deit")
    priced = with_latency(anatomy.select(("head", "ffn")), measured())
    with pytest.raises(BudgetError, match="hard_concrete must have a budget of params or macs"):
        vlprune.metrics.HardConcrete(
            model, priced, budget={"latency": 0.5}, steps=2, strategies=("head", "ffn")
        )


# -- the clock -------------------------------------------------------------------------------------


class Busy(nn.Module):
    """Multiplies so many times."""

    def __init__(self, times: int):
        super().__init__()
        self.times, self.matrix = times, nn.Parameter(torch.ones(96, 96))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for _ in range(self.times):
            x = x @ self.matrix
        return x


@pytest.fixture
def brief(monkeypatch: pytest.MonkeyPatch) -> None:
    """Turns are short."""
    monkeypatch.setattr("vlprune.clocks._TURN_SECONDS", 0.01)


@pytest.mark.usefixtures("brief")
@pytest.mark.parametrize("timer", ["wall", "cpu"])
def test_a_clock_tells_four_times_the_work(timer: str) -> None:
    models = [Busy(400).train(), Busy(1600), Busy(400)]
    one, four, same = DeviceClock(rounds=5, timer=timer)(models, torch.ones(96, 96))
    assert 2.5 < four / one < 6
    assert 0.5 < same / one < 2
    assert models[0].training


class Sleeping(nn.Module):
    """Takes five milliseconds."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        time.sleep(0.005)
        return x


@pytest.mark.parametrize("take", ["median", "least"])
def test_a_clock_says_milliseconds_of_one_call(take: str) -> None:
    found = DeviceClock(rounds=2, take=take)([Sleeping(), Sleeping()], torch.ones(1))
    assert all(5.0 <= ms < 25.0 for ms in found)


@pytest.mark.parametrize(("field", "value"), [("backend", "abacus"), ("rounds", 0)])
def test_a_wrong_clock_is_told(field: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"{field} must be .*; got '?{value}"):
        DeviceClock(**{field: value})


def test_inputs_are_repeated_to_a_batch() -> None:
    inputs = {"a": torch.arange(2), "b": torch.ones(2, 3), "c": torch.ones(5), "d": 7}
    found = resized(inputs, 5)
    assert found["a"].tolist() == [0, 1, 0, 1, 0]
    assert found["b"].shape == (5, 3)
    assert found["c"].shape == (5,)
    assert found["d"] == 7
    assert batch_of(resized(inputs, 1)) == 1


@pytest.mark.usefixtures("brief")
def test_a_real_clock_profiles_and_predicts_a_tiny_model() -> None:
    model, anatomy = dissected("deit")
    clock = DeviceClock(rounds=1)
    table = vlprune.profile(
        model, inputs_of(model), anatomy=anatomy, widths=(0.5,), strategies=("ffn",), clock=clock
    )
    assert table.batch == 2
    assert table.place["backend"] == "eager"
    assert 0 < table.dense_ms < 1000
    plan = vlprune.plan(scored(kinds=("ffn",)), {"params": 0.8})
    found = predicted_beside_measured(table, model, plan, inputs_of(model), clock=clock)
    assert 0 < found.measured < 10


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("backend", ["compile", "onnx"])
@pytest.mark.parametrize("name", ["deit", "open_clip"])
def test_compiled_and_exported_models_are_timed(backend: str, name: str) -> None:
    if backend == "onnx":
        pytest.importorskip("onnxruntime")
        pytest.importorskip("onnxscript")
    model, _ = dissected(name)
    small = vlprune.prune(
        model, vlprune.plan(scored(name, ("head", "ffn")), {"macs": 0.7}), verify=False
    )
    clock = DeviceClock(backend=backend, rounds=2)
    for ms in clock([model, small], inputs_of(model)):
        assert 0 < ms < 1000


@pytest.mark.gpu
def test_a_gpu_says_how_much_of_the_time_it_works() -> None:
    model = dissected("deit")[0].to("cuda")
    table = vlprune.profile(model, strategies=("ffn",), widths=(0.5,), rounds=3)
    assert table.device == torch.cuda.get_device_name()
    assert table.busy is not None
    assert 0 < table.busy < 1
    assert table.is_idle  # a tiny model waits for its launches
