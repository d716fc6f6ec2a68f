"""The short programs in `examples/` run, and what they end with holds."""

import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from vlprune.pruner import record_of
from vlprune.registry import METRICS

EXAMPLES = Path(__file__).parent.parent / "examples"
QUICK = ("own_metric", "prune_any_vlm", "prune_hf_blip")
NAMES = (
    *QUICK,
    "compare_criteria",
    "distil_with_accelerate",
    "own_loop",
    "prune_open_clip",
    "prune_timm_deit",
)


def run(name: str, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> dict[str, Any]:
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    known = dict(METRICS)
    try:
        return runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    finally:
        for added in set(METRICS) - set(known):
            del METRICS._entries[added]


def num_params(model: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize(
    "name",
    [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in NAMES],
)
def test_the_example_ends_with_a_model_of_the_size_that_was_planned(
    name: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    left = run(name, monkeypatch, str(tmp_path))
    said = capsys.readouterr().out
    assert len(said.splitlines()) > 3
    if name == "compare_criteria":
        assert (tmp_path / "index.html").exists()
        by_metric = {point.metric: point.value for point in left["found"].points}
        assert by_metric["taylor"] > by_metric["random"]
        return
    if name == "distil_with_accelerate":
        assert left["before"] < left["after"] <= 100
    (*_, plan) = record_of(left["small"]).plans
    assert num_params(left["small"]) == plan.planned.params < plan.dense.params


def test_every_short_program_is_run() -> None:
    programs = {path.stem for path in EXAMPLES.glob("[!_]*.py")}
    longer = {name for name in programs if name.startswith(("make_", "train_"))}
    assert programs - longer == set(NAMES)
