"""The demo's claim on the shipped CLIP: scores of the loss beat magnitudes at equal cost."""

from pathlib import Path

import pytest
import torch
from conftest import dissected  # noqa: F401  # sets one thread and quiet imports

import vlprune
from vlprune.demo import demo_table, run_demo
from vlprune.tasks import Retrieval
from vlprune.tasks.scenes import loader


@pytest.fixture(scope="module")
def unseen() -> Retrieval:
    return Retrieval(loader("test", 500, 0, 250))


@pytest.fixture(scope="module")
def calibration() -> Retrieval:
    return Retrieval(loader("train", 256, 1, 128))


def half(model: torch.nn.Module, metric: str, allocation: str, task: Retrieval) -> torch.nn.Module:
    scores = vlprune.score(model, metric, task)
    plan = vlprune.plan(scores, {"prunable_params": 0.5}, allocation)
    return vlprune.prune(model, plan)


@pytest.mark.slow
def test_taylor_and_fisher_beat_magnitude_at_equal_cost(
    unseen: Retrieval, calibration: Retrieval
) -> None:
    model = vlprune.create_model("scenes-clip")
    dense = unseen.measure(model)
    recalls = {
        (metric, allocation): unseen.measure(half(model, metric, allocation, calibration))
        for metric in ("taylor", "fisher", "magnitude")
        for allocation in ("uniform", "global")
    }
    best_magnitude = max(recalls["magnitude", "uniform"], recalls["magnitude", "global"])
    for metric in ("taylor", "fisher"):
        assert recalls[metric, "global"] > best_magnitude + 5
        assert recalls[metric, "global"] > 0.9 * dense


@pytest.mark.slow
def test_the_demo_shows_mope_and_taylor_above_magnitude(
    tmp_path: Path, unseen: Retrieval, calibration: Retrieval
) -> None:
    result = run_demo(tmp_path, unseen, calibration, lambda title: lambda done, total: None)
    best = {
        metric: max(r.recall for r in result.rows if r.metric == metric and not r.repaired)
        for metric in ("mope", "taylor", "magnitude")
    }
    assert best["mope"] > best["magnitude"]
    assert best["taylor"] > best["magnitude"]
    dense = result.rows[0].recall
    repaired = {row.metric: row.recall for row in result.rows if row.repaired}
    assert repaired["reconstruction"] > 0.99 * dense  # on 500 scenes level with taylor, cut only
    assert repaired["magnitude"] > best["magnitude"] + 20
    params = [row.cost.params for row in result.rows[1:]]
    assert max(params) - min(params) <= 12 * 96 * 16  # equal cost, within one unit
    assert result.relative_error <= 1e-9
    assert result.reloaded_recall == result.best.recall
    assert result.picture.stat().st_size > 10_000
    assert len(demo_table(result).rows) == 9
