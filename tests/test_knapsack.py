"""Isomorphic, measured, knapsack, and choosing within an axis by other scores."""

import itertools
import random

import numpy as np
import pytest
from conftest import dissected

import vlprune
from vlprune.errors import BudgetError, PlanError


def scored(
    name: str = "open_clip", kinds: tuple[str, ...] = ("head", "ffn"), seed: int = 0
) -> vlprune.Scores:
    anatomy = dissected(name)[1].select(kinds)
    draw = random.Random(seed)
    rows = {a.name: tuple(draw.random() ** 3 for _ in range(a.units)) for a in anatomy.axes}
    return vlprune.Scores(anatomy=anatomy, values=rows, metric="drawn")


def cost(scores: vlprune.Scores, plan: vlprune.Plan) -> vlprune.Cost:
    return vlprune.price(scores.anatomy, plan.keep)


def test_isomorphic_takes_the_same_share_of_every_likeness() -> None:
    scores = scored()
    raised = {
        name: tuple(1000 * v for v in row) if name.endswith("head") else row
        for name, row in scores.values.items()
    }
    plan = vlprune.plan(scores, {"prunable_params": 0.5}, "isomorphic")
    other = vlprune.Scores(anatomy=scores.anatomy, values=raised, metric="drawn")
    assert vlprune.plan(other, {"prunable_params": 0.5}, "isomorphic").keep == plan.keep
    for kind, tower in itertools.product(("head", "ffn"), ("vision", "text")):
        rows = [r for r in plan.rows if r.axis.kind == kind and r.axis.tower == tower]
        kept, units = sum(len(r.keep) for r in rows), sum(r.axis.units for r in rows)
        assert kept / units == pytest.approx(0.5, abs=0.2)
    counts = {len(r.keep) for r in plan.rows if r.axis.kind == "ffn"}
    assert len(counts) > 2  # layers differ
    for row in plan.rows:
        values = scores.values[row.axis.name]
        worst = min((values[u] for u in row.keep), default=1.0)
        assert all(values[u] <= worst for u in row.removed)


def best(scores: vlprune.Scores, limits: dict[str, int]) -> float:
    """The most worth that any plan within the limits keeps, by trying all counts."""
    axes = scores.anatomy.axes
    ordered = {
        a.name: sorted(range(a.units), key=lambda u: -scores.values[a.name][u]) for a in axes
    }
    top = 0.0
    for counts in itertools.product(*(range(a.units + 1) for a in axes)):
        keep = {
            a.name: tuple(sorted(ordered[a.name][:n])) for a, n in zip(axes, counts, strict=True)
        }
        price = vlprune.price(scores.anatomy, keep)
        if all(getattr(price, name) <= limit for name, limit in limits.items()):
            worth = sum(scores.values[name][u] for name, units in keep.items() for u in units)
            top = max(top, worth)
    return top


def test_the_knapsack_is_the_best_of_all_plans() -> None:
    scores = scored("open_clip", ("head",), seed=2)
    dense = vlprune.price(scores.anatomy, {})
    least = vlprune.price(scores.anatomy, {a.name: () for a in scores.anatomy.axes})
    for share in (0.3, 0.7):
        limits = {
            "params": int(least.params + share * (dense.params - least.params)),
            "macs": int(least.macs + 0.6 * (dense.macs - least.macs)),
        }
        plan = vlprune.plan(scores, limits, "knapsack")
        got = sum(scores.values[r.axis.name][u] for r in plan.rows for u in r.keep)
        found = cost(scores, plan)
        assert found.params <= limits["params"]
        assert found.macs <= limits["macs"]
        assert got == pytest.approx(best(scores, limits), rel=1e-3)


@pytest.mark.parametrize("name", ["open_clip", "deit", "BlipForImageTextRetrieval"])
def test_the_knapsack_keeps_to_all_limits_and_leaves_no_room(name: str) -> None:
    scores = scored(name, ("head", "ffn", "layer"))
    dense = vlprune.price(scores.anatomy, {})
    plan = vlprune.plan(scores, {"params": 0.7, "macs": 0.6}, "knapsack")
    found = cost(scores, plan)
    assert found.params <= 0.7 * dense.params
    assert found.macs <= 0.6 * dense.macs
    for row in plan.rows:
        for unit in row.removed:
            more = {**plan.keep, row.axis.name: tuple(sorted((*row.keep, unit)))}
            price = vlprune.price(scores.anatomy, more)
            assert price.params > 0.7 * dense.params or price.macs > 0.6 * dense.macs


def test_the_knapsack_protects_bounds_towers_and_rounds() -> None:
    scores = scored(kinds=("head", "ffn"))
    protected = "visual.transformer.resblocks.1"
    plan = vlprune.plan(
        scores,
        {"prunable_params": 0.6},
        "knapsack",
        round_to=8,
        protect=(protected,),
        towers={"text": 0.25},
        min_units=1,
    )
    units = {"all": 0, "kept": 0}
    for row in plan.rows:
        if row.axis.name.startswith(protected):
            assert row.removed == ()
        elif row.axis.kind == "ffn":
            assert len(row.keep) % 8 == 0
        assert row.keep
        if row.axis.tower == "text" and row.axis.kind == "ffn":
            units["all"] += row.axis.units
            units["kept"] += len(row.keep)
    assert units["kept"] <= 0.5 * units["all"]
    text = {
        r.axis.name: r.keep if r.axis.tower == "text" else tuple(range(r.axis.units))
        for r in plan.rows
    }
    none = {
        r.axis.name: () if r.axis.tower == "text" else tuple(range(r.axis.units)) for r in plan.rows
    }
    dense = vlprune.price(scores.anatomy, {}).params
    share = (
        vlprune.price(scores.anatomy, text).params - vlprune.price(scores.anatomy, none).params
    ) / (dense - vlprune.price(scores.anatomy, none).params)
    assert 0.1 < share <= 0.25
    with pytest.raises(ValueError, match="round_to must be at least 1"):
        vlprune.plan(scores, {"params": 0.5}, "knapsack", round_to=0)
    with pytest.raises(ValueError, match="towers must be of text, vision; got 'sound'"):
        vlprune.plan(scores, {"params": 0.5}, "knapsack", towers={"sound": 0.5})
    with pytest.raises(ValueError, match="none starts with 'nowhere'"):
        vlprune.plan(scores, {"params": 0.5}, "knapsack", protect=("nowhere",))
    with pytest.raises(BudgetError, match="protect less"):
        vlprune.plan(scores, {"prunable_params": 0.1}, "knapsack", protect=("visual",))


def test_how_many_by_one_score_and_which_by_another() -> None:
    counts, choice = scored(seed=0), scored(seed=1)
    plan = vlprune.plan(counts, {"prunable_params": 0.5})
    both = vlprune.plan(counts, {"prunable_params": 0.5}, within=choice)
    assert both.planned == plan.planned
    assert both.made_by["within"] == "drawn"
    for one, other in zip(plan.rows, both.rows, strict=True):
        values = np.asarray(choice.values[other.axis.name])
        assert len(one.keep) == len(other.keep)
        assert set(np.argsort(-values)[: len(one.keep)].tolist()) == set(other.keep)
    assert any(a.keep != b.keep for a, b in zip(plan.rows, both.rows, strict=True))


def test_a_measured_curve_says_how_many_and_scores_which() -> None:
    scores, drawn = scored(seed=0), scored(seed=1)
    first = scores.anatomy.axes[0].name
    curves = {  # the first axis can spare all but two, the others nothing
        name: tuple(
            1e-6 if name == first and u < len(row) - 2 else 10.0 + u for u, _ in enumerate(row)
        )
        for name, row in drawn.values.items()
    }
    curved = vlprune.Scores(anatomy=scores.anatomy, values=curves, metric="curves")
    axis = scores.anatomy.axes[0]
    two = tuple(range(axis.units - 2, axis.units))
    params = vlprune.price(scores.anatomy, {first: two}).params
    plan = vlprune.plan(scores, {"params": params}, "measured", curves=curved)
    order = np.argsort(scores.values[first])
    assert plan.keep[first] == tuple(sorted(order[-2:].tolist()))
    assert all(row.removed == () for row in plan.rows if row.axis.name != first)
    assert plan.made_by["curves"] == "curves"
    alone = vlprune.plan(curved, {"params": params}, "measured")
    assert alone.keep == vlprune.plan(curved, {"params": params}, "global").keep
    few = vlprune.Scores(
        anatomy=scores.anatomy.select(("head",)),
        values={name: row for name, row in curves.items() if name.endswith("head")},
        metric="curves",
    )
    with pytest.raises(PlanError, match="must have a curve"):
        vlprune.plan(scores, {"params": 0.5}, "measured", curves=few)
