"""Scores and plans: checked when made, equal when equal, exact on their way through JSON."""

import dataclasses
import json
import re

import pytest
import torch
from conftest import dissected, random_keep
from hypothesis import given, settings
from hypothesis import strategies as st

import vlprune
from vlprune.anatomy import Anatomy, Axis, Gate, TensorShape
from vlprune.errors import CheckpointError, PlanError
from vlprune.plan import Cost, Scores, make_plan
from vlprune.store import read_plan, read_scores, write_json


def hand_made(**units: int) -> Anatomy:
    axes = tuple(
        Axis(
            name=name,
            kind="ffn",
            tower="vision",
            depth=depth,
            units=count,
            removal="slice",
            gate=Gate(kind="input", modules=(name,)),
        )
        for depth, (name, count) in enumerate(units.items())
    )
    return Anatomy(model="Hand", axes=axes, tensors=(TensorShape(name="w", shape=(4, 3)),))


ANATOMY = hand_made(a=4, b=2)


def scores_of(**values: tuple[float, ...]) -> Scores:
    return Scores(anatomy=ANATOMY, values=values, metric="hand")


# -- scores ----------------------------------------------------------------------------------------


def test_scores_tell_all_faults_together() -> None:
    anatomy = hand_made(a=4, b=2, c=3, d=1)
    values = {"a": (1.0, float("nan"), float("inf"), 2.0), "b": (1.0,), "d": (0.0,), "x": (1.0,)}
    with pytest.raises(PlanError) as caught:
        Scores(anatomy=anatomy, values=values, metric="hand")
    assert str(caught.value) == (
        "scores of 'hand' must hold one finite number per unit; "
        "axis 'a' has 2 scores that are NaN or infinite; "
        "axis 'b' has 1 scores for 2 units; "
        "axis 'c' has no scores; "
        "axis 'x' has scores but is not in the anatomy. "
        "Look for NaN in the loss, or score again on this model."
    )


def test_scores_that_fit_show_least_mean_and_most_of_every_axis() -> None:
    scores = scores_of(a=(1.0, 2.0, 3.0, 6.0), b=(-1.0, 0.5))
    first, a, b = str(scores).splitlines()
    assert first == "scores of 'hand' on Hand"
    assert a.split() == ["a", "4", "units", "min", "1", "mean", "3", "max", "6"]
    assert b.split() == ["b", "2", "units", "min", "-1", "mean", "-0.25", "max", "0.5"]


# -- plans -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keep", "text"),
    [
        ({"a": (0, 4)}, "axis 'a': keep must hold distinct units in [0, 4), got (0, 4)"),
        ({"a": (-1, 2)}, "axis 'a': keep must hold distinct units in [0, 4), got (-1, 2)"),
        ({"b": (1, 1)}, "axis 'b': keep must hold distinct units in [0, 2), got (1, 1)"),
        ({"b": tuple(range(9))}, "axis 'b': keep must hold distinct units in [0, 2), got 9 units"),
        ({"z": (0,)}, "axis 'z': must be in the anatomy; it is not"),
    ],
)
def test_a_plan_with_wrong_units_is_refused_by_axis_and_rule(keep, text: str) -> None:
    with pytest.raises(PlanError) as caught:
        make_plan(ANATOMY, keep)
    assert str(caught.value) == text + ". A plan fits one anatomy; make it with vlprune.plan."


def test_a_plan_tells_all_faults_together() -> None:
    with pytest.raises(PlanError, match=r"'a'.*\[0, 4\).*; axis 'b'.*\[0, 2\).*; axis 'z'"):
        make_plan(ANATOMY, {"a": (9,), "b": (0, 0), "z": ()})


def test_units_may_be_a_tensor_and_repeats_in_it_are_refused() -> None:
    assert make_plan(ANATOMY, {"a": torch.tensor([3, 1])}).keep == {"a": (1, 3)}
    with pytest.raises(PlanError, match=r"axis 'b': keep must hold distinct units in \[0, 2\)"):
        make_plan(ANATOMY, {"b": torch.tensor([1, 1])})


@pytest.mark.parametrize("units", [(0.25, 0.75), torch.tensor([True, False])], ids=str)
def test_units_that_are_no_whole_numbers_are_refused(units) -> None:
    with pytest.raises(PlanError, match=r"units must be whole numbers; got (0\.25|tensor\(True\))"):
        make_plan(ANATOMY, {"b": units})


def test_rows_are_sorted_and_removed_is_the_rest() -> None:
    plan = make_plan(ANATOMY, {"b": (), "a": (3, 1)})
    assert plan.keep == {"a": (1, 3), "b": ()}
    assert [row.removed for row in plan.rows] == [(0, 2), (0, 1)]
    assert [axis.name for axis in plan.axes] == ["a", "b"]


def test_digests_are_equal_for_equal_cuts_and_only_for_these() -> None:
    def digest(anatomy: Anatomy = ANATOMY, **keep: tuple[int, ...]) -> str:
        return make_plan(anatomy, keep).digest

    base = digest(a=(1, 3), b=(0,))
    assert base == digest(b=(0,), a=(3, 1))
    asked = make_plan(ANATOMY, {"a": (1, 3), "b": (0,)}, asked={"params": 0.5}, made_by={"x": 1})
    assert base == asked.digest
    other_model = dataclasses.replace(ANATOMY, tensors=(TensorShape(name="w", shape=(4, 5)),))
    others = [digest(a=(1, 2), b=(0,)), digest(a=(1, 3), b=(1,)), digest(a=(1, 3))]
    others += [digest(other_model, a=(1, 3), b=(0,)), digest(hand_made(a=5, b=2), a=(1, 3), b=(0,))]
    assert len({base, *others}) == 6
    assert re.fullmatch(r"[0-9a-f]{16}", base)


def test_a_plan_prints_what_was_asked_and_planned_and_every_count() -> None:
    plan = make_plan(
        hand_made(a=4, b=4),
        {"a": (1, 3), "b": (0,)},
        asked={"params": 0.5},
        dense=Cost(params=2000, macs=8000),
        planned=Cost(params=990, macs=2000),
        made_by={"metric": "taylor", "allocation": "global"},
    )
    assert str(plan).splitlines() == [
        f"plan {plan.digest} (taylor, global)",
        "  asked    keep params 0.5",
        "  planned  params 990 of 2,000 (49.5%), macs 2,000 of 8,000 (25.0%)",
        "  vision   ffn       3/8 (38%)  of 4 each: 2 1",
    ]
    assert str(make_plan(ANATOMY, {"a": ()})).splitlines()[0].endswith("(by hand)")


def test_a_plan_prints_an_absolute_budget_in_full() -> None:
    plan = make_plan(ANATOMY, {}, asked={"params": 75_640_123})
    assert "75640123" in str(plan).replace(",", "")


# -- JSON ------------------------------------------------------------------------------------------


def test_plans_of_every_model_come_back_equal(tiny, tmp_path) -> None:
    _, anatomy = tiny
    keep = random_keep(anatomy, seed=3)
    plan = make_plan(
        anatomy,
        keep,
        asked={"params": 1 / 3, "macs": 12345},
        dense=vlprune.price(anatomy, {}),
        planned=vlprune.price(anatomy, keep),
        made_by={"metric": "taylor", "settings": {"p": 2, "none": None, "list": [1, 0.1, "x"]}},
    )
    write_json(plan, tmp_path / "deep" / "plan.json")
    read = read_plan(tmp_path / "deep" / "plan.json")
    assert read == plan
    assert read.digest == plan.digest
    assert [f.name for f in (tmp_path / "deep").iterdir()] == ["plan.json"]  # no scratch file


finite = st.floats(allow_nan=False, allow_infinity=False)


@settings(max_examples=50, deadline=None)
@given(a=st.tuples(*[finite] * 4), b=st.tuples(finite, finite))
def test_scores_come_back_to_the_last_bit(tmp_path_factory, a, b) -> None:
    path = tmp_path_factory.getbasetemp() / "scores.json"
    scores = Scores(anatomy=ANATOMY, values={"a": a, "b": b}, metric="hand", settings={"seed": 3})
    write_json(scores, path)
    assert read_scores(path) == scores


def test_scores_of_a_real_anatomy_come_back_equal(tmp_path) -> None:
    model, anatomy = dissected("open_clip")
    scores = vlprune.score(model, "random", anatomy=anatomy, seed=7)
    write_json(scores, tmp_path / "scores.json")
    assert read_scores(tmp_path / "scores.json") == scores


def edit(path, change) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


@pytest.mark.parametrize("units", [[0, 0], [0, 4], [-1], [2, 1]], ids=str)
def test_a_plan_file_with_wrong_units_is_refused(tmp_path, units: list[int]) -> None:
    path = tmp_path / "plan.json"
    write_json(make_plan(ANATOMY, {"a": (0, 1)}), path)
    edit(path, lambda content: content["rows"][0].update(keep=units))
    with pytest.raises(CheckpointError, match=r"plan.json must hold Plans of vlprune"):
        read_plan(path)


def test_a_scores_file_with_faults_is_refused(tmp_path) -> None:
    path = tmp_path / "scores.json"
    write_json(scores_of(a=(1.0,) * 4, b=(1.0,) * 2), path)
    edit(path, lambda content: content["values"].update(a=[1.0]))
    with pytest.raises(CheckpointError, match=r"axis 'a' has 1 scores for 4 units"):
        read_scores(path)


def test_other_files_are_no_plans(tmp_path) -> None:
    path = tmp_path / "scores.json"
    write_json(scores_of(a=(1.0,) * 4, b=(1.0,) * 2), path)
    with pytest.raises(CheckpointError, match=r"scores.json must hold Plans of vlprune; "):
        read_plan(path)
    path.write_text('{"rows": [')
    with pytest.raises(CheckpointError, match=r"scores.json must hold Scoress? of vlprune"):
        read_scores(path)
    with pytest.raises(CheckpointError, match=r"none.json must be there; it is not\."):
        read_plan(tmp_path / "none.json")
