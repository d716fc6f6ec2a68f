"""Every allocation: the budget is met within one unit, or refused before work starts."""

import random

import pytest
from conftest import dissected
from hypothesis import given, settings
from hypothesis import strategies as st

import vlprune
from vlprune.anatomy import Anatomy
from vlprune.cost import absolute_budget, dense_cost, least_cost, price
from vlprune.errors import BudgetError
from vlprune.plan import Scores
from vlprune.registry import ALLOCATIONS

SLICED = ("head", "ffn")
ALL_KINDS = ("head", "ffn", "layer", "sublayer")
EVERY = pytest.mark.parametrize("allocation", list(ALLOCATIONS))


def scored(seed: int, kinds: tuple[str, ...] = SLICED, model: str = "open_clip") -> Scores:
    """Scores drawn from a seed, all different and positive."""
    anatomy = dissected(model)[1].select(kinds)
    draw = random.Random(seed)
    values = {a.name: tuple(draw.uniform(0.1, 1) for _ in range(a.units)) for a in anatomy.axes}
    return Scores(anatomy=anatomy, values=values, metric="drawn")


def with_unit(keep: dict[str, tuple[int, ...]], axis: str, unit: int) -> dict[str, tuple[int, ...]]:
    return {**keep, axis: (*keep[axis], unit)}


def one_less_removed(anatomy: Anatomy, keep: dict[str, tuple[int, ...]], resource: str) -> int:
    """The most that the plan costs with one of its removed units put back."""
    costs = []
    for axis in anatomy.axes:
        gone = sorted(set(range(axis.units)) - set(keep[axis.name]))
        for unit in gone[:1] if axis.removal == "slice" else gone:  # sliced units cost the same
            costs.append(getattr(price(anatomy, with_unit(keep, axis.name, unit)), resource))
    return max(costs, default=getattr(dense_cost(anatomy), resource) + 1)


def check_met_within_one_unit(plan: vlprune.Plan, scores: Scores) -> None:
    for resource, target in absolute_budget(scores.anatomy, plan.asked).items():
        assert getattr(price(scores.anatomy, plan.keep), resource) <= target
        if len(plan.asked) == 1:
            assert one_less_removed(scores.anatomy, plan.keep, resource) > target


@EVERY
@settings(max_examples=20, deadline=None)
@given(
    share=st.floats(0, 1),
    resource=st.sampled_from(["params", "macs"]),
    absolute=st.booleans(),
    kinds=st.sampled_from([SLICED, ("head",), ("layer",), ALL_KINDS]),
    seed=st.integers(0, 99),
)
def test_any_reachable_budget_is_met_within_one_unit(
    allocation: str, share: float, resource: str, absolute: bool, kinds: tuple[str, ...], seed: int
) -> None:
    scores = scored(seed, kinds)
    dense = getattr(dense_cost(scores.anatomy), resource)
    least = getattr(least_cost(scores.anatomy), resource)
    target = round(least + share * (dense - least))
    budget = {resource: target if absolute else (target + 0.5) / (dense + 0.5)}
    plan = vlprune.plan(scores, budget, allocation)
    assert plan.planned == price(scores.anatomy, plan.keep)
    check_met_within_one_unit(plan, scores)


@EVERY
def test_a_share_of_the_prunable_parameters_is_met(allocation: str) -> None:
    scores = scored(0)
    dense, least = dense_cost(scores.anatomy).params, least_cost(scores.anatomy).params
    plan = vlprune.plan(scores, {"prunable_params": 0.5}, allocation)
    check_met_within_one_unit(plan, scores)
    assert plan.planned.params == pytest.approx((dense + least) / 2, abs=1100)  # a head is 1056


@EVERY
@pytest.mark.parametrize(
    "budget",
    [{"params": 0.6, "macs": 0.8}, {"params": 0.9, "macs": 0.6}],
    ids=["params binds", "macs bind"],
)
def test_two_budgets_are_both_met(allocation: str, budget: dict[str, float]) -> None:
    scores = scored(1)
    plan = vlprune.plan(scores, budget, allocation)
    assert plan.planned.params <= budget["params"] * plan.dense.params
    assert plan.planned.macs <= budget["macs"] * plan.dense.macs


@EVERY
@pytest.mark.parametrize(
    "budget",
    [{"params": 0.6, "prunable_params": 0.9}, {"prunable_params": 0.9, "params": 0.6}],
    ids=["params first", "params last"],
)
def test_the_tighter_of_two_budgets_of_parameters_is_met(
    allocation: str, budget: dict[str, float]
) -> None:
    plan = vlprune.plan(scored(1), budget, allocation)
    assert plan.planned.params <= 0.6 * plan.dense.params


@EVERY
def test_the_whole_budget_removes_nothing(allocation: str) -> None:
    plan = vlprune.plan(scored(2), {"params": 1.0}, allocation)
    assert all(row.removed == () for row in plan.rows)
    assert plan.planned == plan.dense


@EVERY
def test_the_least_budget_removes_everything(allocation: str) -> None:
    scores = scored(2)
    least = least_cost(scores.anatomy)
    plan = vlprune.plan(scores, {"params": least.params}, allocation)
    assert plan.planned == least


@EVERY
@pytest.mark.parametrize("min_units", [1, 3])
def test_min_units_stay_on_every_axis_and_are_the_best(allocation: str, min_units: int) -> None:
    scores = scored(3)
    plan = vlprune.plan(scores, {"prunable_params": 0.75}, allocation, min_units=min_units)
    tight = vlprune.plan(scores, {"params": plan.planned.params}, allocation, min_units=min_units)
    for chosen in (plan, tight):
        assert min(len(row.keep) for row in chosen.rows) >= min_units
        for row in chosen.rows:
            values = scores.values[row.axis.name]
            best = sorted(range(row.axis.units), key=values.__getitem__)[-min_units:]
            assert set(best) <= set(row.keep)


@EVERY
def test_a_budget_that_min_units_forbid_is_refused_with_the_least(allocation: str) -> None:
    scores = scored(3)
    least = price(scores.anatomy, {a.name: (0, 1) for a in scores.anatomy.axes})
    with pytest.raises(BudgetError, match=rf"the least is {least.params:,} params and .* macs"):
        vlprune.plan(scores, {"params": least.params - 1}, allocation, min_units=2)
    reached = vlprune.plan(scores, {"params": least.params}, allocation, min_units=2)
    assert reached.planned.params == least.params


@EVERY
def test_same_scores_same_plan(allocation: str) -> None:
    one, two = (vlprune.plan(scored(4), {"macs": 0.7}, allocation) for _ in range(2))
    assert one == two
    assert one.digest != vlprune.plan(scored(5), {"macs": 0.7}, allocation).digest


@EVERY
def test_the_least_important_of_an_axis_go_first(allocation: str) -> None:
    scores = scored(6)
    plan = vlprune.plan(scores, {"prunable_params": 0.5}, allocation)
    for row in plan.rows:
        values = scores.values[row.axis.name]
        if row.keep and row.removed:
            assert max(values[u] for u in row.removed) < min(values[u] for u in row.keep)


# -- each allocation's own law ---------------------------------------------------------------------


@pytest.mark.parametrize("budget", [{"params": 0.9}, {"macs": 0.9}], ids=["params", "macs"])
@pytest.mark.parametrize("kinds", [SLICED, ("layer", "sublayer")], ids=["sliced", "whole"])
def test_global_takes_the_lowest_score_per_saving_first(kinds, budget) -> None:
    scores = scored(7, kinds, "deit")
    anatomy, resource = scores.anatomy, next(iter(budget))

    def cost(keep: dict[str, tuple[int, ...]]) -> int:
        return getattr(price(anatomy, keep), resource)

    dense, whole = cost({}), {a.name: tuple(range(a.units)) for a in anatomy.axes}

    def without(keep, axis: str, unit: int) -> dict[str, tuple[int, ...]]:
        return {**keep, axis: tuple(u for u in keep[axis] if u != unit)}

    ratio = {
        (axis, unit): scores.values[axis][unit] / (dense - cost(without(whole, axis, unit)))
        for axis, units in whole.items()
        for unit in units
    }
    expected = whole
    for axis, unit in sorted(ratio, key=ratio.__getitem__):
        if cost(expected) <= budget[resource] * dense:
            break
        expected = without(expected, axis, unit)
    assert vlprune.plan(scores, budget, "global").keep == expected
    assert 0 < sum(len(kept) for kept in expected.values()) < len(ratio)


@pytest.mark.parametrize("share", [0.2, 0.5, 0.85])
def test_uniform_removes_the_same_share_of_every_axis_up_to_one_unit(share: float) -> None:
    plan = vlprune.plan(scored(8), {"prunable_params": share}, "uniform")
    kept = sum(len(row.keep) for row in plan.rows) / sum(row.axis.units for row in plan.rows)
    assert {row.axis.units for row in plan.rows} == {4, 128}
    assert kept == pytest.approx(share, abs=0.05)
    for row in plan.rows:
        assert abs(len(row.keep) - kept * row.axis.units) <= 1


def test_uniform_does_not_see_the_scale_of_an_axis() -> None:
    scores = scored(9)
    scaled = Scores(
        anatomy=scores.anatomy,
        values={
            name: tuple(10**place * v for v in row)
            for place, (name, row) in enumerate(scores.values.items())
        },
        metric="drawn",
    )
    one, two = (vlprune.plan(s, {"params": 0.6}, "uniform").keep for s in (scores, scaled))
    assert one == two


# -- borders ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("resource", ["params", "macs"])
@pytest.mark.parametrize("value", [0.01, 10, 10**9], ids=["share", "too few", "too many"])
def test_an_unreachable_budget_says_the_least_and_the_most(resource: str, value: float) -> None:
    scores = scored(0)
    dense = getattr(dense_cost(scores.anatomy), resource)
    least = getattr(least_cost(scores.anatomy), resource)
    with pytest.raises(BudgetError) as caught:
        vlprune.plan(scores, {resource: value})
    assert (
        f"{resource}; these axes can reach {least:,} ({least / dense:.1%}) at least and "
        f"{dense:,} at most. Ask for a share between, or score more strategies."
    ) in str(caught.value)


@pytest.mark.parametrize("value", [0, -0.5, float("nan"), float("inf")], ids=str)
def test_a_budget_must_be_a_share_or_a_count(value: float) -> None:
    with pytest.raises(BudgetError, match=r"budget 'params' must be a share in \(0, 1\]"):
        vlprune.plan(scored(0), {"params": value})


def test_a_budget_has_a_known_key() -> None:
    known = "params, macs, prunable_params, latency, latency_ms"
    with pytest.raises(BudgetError, match=rf"budget must name one of {known}; got 'flops'\."):
        vlprune.plan(scored(0), {"flops": 0.5})
    with pytest.raises(BudgetError, match=rf"budget must name one of {known}; got none\."):
        vlprune.plan(scored(0), {})


def test_a_plan_says_how_it_was_made() -> None:
    plan = vlprune.plan(scored(0), {"params": 0.6}, "uniform", min_units=1)
    assert plan.asked == {"params": 0.6}
    assert {k: v for k, v in plan.made_by.items() if k != "versions"} == {
        "metric": "drawn",
        "settings": {},
        "strategies": ["ffn", "head"],
        "allocation": "uniform",
        "min_units": 1,
    }
