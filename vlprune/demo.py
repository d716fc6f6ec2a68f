"""`vlprune demo`: a trained CLIP on real images loses half of its prunable parameters.

Three criteria at equal cost, uniform and global, on the shipped scenes-clip; then what repair makes
of the worst and of the default; one table, one picture, and the best saved and loaded again. No
download, no gradient step.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table
from torch import nn

from vlprune.cost import count_macs, count_params, latencies_ms
from vlprune.dissect import dissect
from vlprune.pipeline import create_model, plan, prune, score, verify
from vlprune.plan import Cost, Plan
from vlprune.pruner import record_of
from vlprune.recover.repair import repair
from vlprune.report import draw_plan
from vlprune.store import from_pretrained, save_pretrained
from vlprune.tasks.retrieval import Retrieval

METRICS_SHOWN = ("mope", "taylor", "magnitude")
ALLOCATIONS_SHOWN = ("uniform", "global")
KEEP = 0.5
REPAIRED = (("magnitude", "uniform"), ("reconstruction", "global"))
MOPE: dict[str, Any] = {"rewire": "taylor", "measure": "cosine", "nested": True}

Stage = Callable[[str], Callable[[int, int], None]]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class DemoRow:
    """One line of the demo's table."""

    metric: str
    allocation: str
    repaired: bool
    recall: float
    cost: Cost
    latency_ms: float


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class DemoResult:
    """What the demo found: the dense row first, then one per metric and allocation."""

    rows: tuple[DemoRow, ...]
    best: DemoRow
    folder: Path
    picture: Path
    relative_error: float
    reloaded_recall: float


def run_demo(folder: Path, test: Retrieval, calibration: Retrieval, stage: Stage) -> DemoResult:
    """Run the demo and return what it found; writes the best model and its picture to `folder`.

    Args:
        folder: for the checkpoint ("scenes-clip-half") and the picture ("kept.png").
        test: the task that recall mean is measured on.
        calibration: the task that units are scored on; other scenes than `test`.
        stage: called with a title, returns a progress callback (done, total).
    """
    model = create_model("scenes-clip")
    inputs = test.example_inputs(model)
    anatomy = dissect(model, inputs)
    timed = next(iter(calibration.batches()))
    cuts: list[tuple[str, str, bool, nn.Module]] = []
    for metric in METRICS_SHOWN:
        settings = MOPE if metric == "mope" else {}
        scores = score(
            model, metric, calibration, anatomy=anatomy, progress=stage(metric), **settings
        )
        for allocation in ALLOCATIONS_SHOWN:
            chosen = plan(scores, {"prunable_params": KEEP}, allocation)
            cuts.append((metric, allocation, False, prune(model, chosen, inputs)))
    for metric, allocation in REPAIRED:
        scores = score(model, metric, calibration, anatomy=anatomy, progress=stage(metric))
        chosen = plan(scores, {"prunable_params": KEEP}, allocation)
        small = repair(model, chosen, calibration, anatomy=anatomy, progress=stage("repair"))
        cuts.append((metric, allocation, True, small))
    shown = [("dense", "", False, model), *cuts]
    latencies = latencies_ms([shown_model for *_, shown_model in shown], timed)
    rows = tuple(
        DemoRow(
            metric=metric,
            allocation=allocation,
            repaired=repaired,
            recall=test.measure(shown_model),
            cost=Cost(params=count_params(shown_model), macs=count_macs(shown_model, inputs)),
            latency_ms=latency,
        )
        for (metric, allocation, repaired, shown_model), latency in zip(
            shown, latencies, strict=True
        )
    )
    best = max(rows[1:], key=lambda row: row.recall)
    small = cuts[rows.index(best) - 1][-1]
    picture = _draw(folder, best, record_of(small).plans[-1])
    saved = save_pretrained(small, folder / "scenes-clip-half")
    reloaded = from_pretrained(saved)
    return DemoResult(
        rows=rows,
        best=best,
        folder=saved,
        picture=picture,
        relative_error=verify(model, reloaded, inputs),
        reloaded_recall=test.measure(reloaded),
    )


def demo_table(result: DemoResult) -> Table:
    """Return the demo's one table."""
    dense = result.rows[0]
    table = Table(
        title=f"scenes-clip, {1 - KEEP:.0%} of the prunable parameters removed",
        box=SIMPLE_HEAD,
        pad_edge=False,
    )
    for name in ("metric", "allocation", "repair"):
        table.add_column(name, no_wrap=True)
    for name in ("recall", "of dense", "params", "MACs", "latency"):
        table.add_column(name, justify="right")
    for row in result.rows:
        table.add_row(
            row.metric,
            row.allocation,
            "yes" if row.repaired else "",
            f"{row.recall:.1f}",
            f"{row.recall / dense.recall:.1%}",
            f"{row.cost.params / 1e6:.2f} M",
            f"{row.cost.macs / 1e6:.1f} M",
            f"{row.latency_ms:.0f} ms"
            if row is dense
            else f"{row.latency_ms / dense.latency_ms:.2f}x",
            style="bold" if row is result.best else "",
        )
    return table


def _draw(folder: Path, row: DemoRow, chosen: Plan) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    picture = folder / "kept.png"
    made = f"{row.metric}, {row.allocation}{', repaired' if row.repaired else ''}"
    title = f"scenes-clip cut in half by {made}: recall {row.recall:.1f}"
    draw_plan(chosen, picture, title)
    return picture
