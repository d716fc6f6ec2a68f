"""What is left of a model's task after cutting, by metric, allocation, budget and repair.

`python benchmarks/quality.py --out docs/quality.csv` measures every combination that the file does
not hold yet, on scenes-clip or another model that ships (`--models`): its task's measure on fresh
test scenes with a 95 % bootstrap interval, seconds to score and to repair, parameters. Then it
prints the tables and draws the picture beside the file. Calibrated on 500 unlabelled training
scenes (metrics of the loss use their labels). `--allocations best` measures one split for each
metric: all layers alike for those whose scores mean nothing across layers, else one ranking.
`--distil N` adds N steps of distillation after the repair, for the best at every budget.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import time
from pathlib import Path
from typing import Any

import _page
import matplotlib
import torch
from _rows import append, read
from torch import nn

import vlprune
from vlprune.cost import count_params
from vlprune.recover.distil import distil
from vlprune.samples import samples_of
from vlprune.shipped import SHIPPED

matplotlib.use("Agg")

METRICS: dict[str, dict[str, Any]] = {
    "reconstruction": {},
    "fisher": {},
    "taylor": {},
    "mope": {"measure": "cosine", "nested": True, "rewire": "taylor"},  # kl but for retrieval
    "activation": {},
    "magnitude": {},
    "random": {},
}
ALIKE = ("activation", "magnitude", "random")  # metrics that are best with all layers alike
ALLOCATIONS = ("global", "uniform", "isomorphic", "knapsack")
KEEPS = (0.75, 0.5, 0.35, 0.25)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One measured model."""

    model: str
    metric: str
    allocation: str
    keep: float
    recovery: str
    params: int
    value: float
    low: float
    high: float
    of_dense: float
    scoring_seconds: float
    recovery_seconds: float

    @property
    def name(self) -> tuple[str, str, float, str]:
        """What was done."""
        return self.metric, self.allocation, self.keep, self.recovery


def main() -> None:
    """Measure what is missing, then print and draw all."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("quality.csv"))
    parser.add_argument("--scenes", type=int, default=10_000)
    parser.add_argument("--models", default="scenes-clip")
    parser.add_argument("--metrics", default=",".join(METRICS))
    parser.add_argument("--allocations", default=",".join(ALLOCATIONS))
    parser.add_argument("--keeps", default=",".join(map(str, KEEPS)))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--page", type=Path, help="Markdown page whose tables are written anew")
    parser.add_argument("--distil", type=int, default=0, help="steps after the repair")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    keeps = [float(keep) for keep in arguments.keeps.split(",")]
    for name in arguments.models.split(","):
        bench = Bench(name, arguments.out, arguments.scenes)
        for metric in arguments.metrics.split(","):
            allocations = arguments.allocations.split(",")
            if allocations == ["best"]:
                allocations = ["uniform" if metric in ALIKE else "global"]
            for keep, allocation in itertools.product(keeps, allocations):
                bench.measure(metric, allocation, keep)
        if arguments.distil:
            for keep in keeps:
                bench.measure_distilled(keep, arguments.distil)
    rows = read(arguments.out, Row)
    parts = [
        f"## {name}\n\n{table([row for row in rows if row.model == name])}"
        for name in dict.fromkeys(row.model for row in rows)
    ]
    _page.write(arguments.page, "tables", "\n\n".join(parts))
    clip = [row for row in rows if row.model == "scenes-clip"]
    if clip:
        draw(clip, arguments.out.with_suffix(".png"))


class Bench:
    """One model that ships, its scenes, and the file of what was measured.

    Args:
        name: of the model.
        path: of the CSV file; its rows are not measured again.
        scenes: fresh test scenes to measure on.
    """

    def __init__(self, name: str, path: Path, scenes: int):
        self.name, self.path = name, path
        self.rows = [row for row in read(path, Row) if row.model == name]
        self.model = vlprune.create_model(name).eval()
        self.make = SHIPPED[name].task
        self.test: Any = self.make("test", scenes, 7, 500, stream=scenes > 4000)
        self.calibration: Any = self.make("train", 500, 1, 100)
        inputs = self.calibration.example_inputs(self.model)
        self.anatomy = vlprune.dissect(self.model, inputs).select(("head", "ffn"))
        self._scores: dict[str, tuple[vlprune.Scores, float]] = {}
        self.dense = float("nan")
        if not any(row.metric == "dense" for row in self.rows):
            self._note(self.model, "dense", "", 1.0, "", 0.0, 0.0)
        self.dense = next(row.value for row in self.rows if row.metric == "dense")

    def measure(self, metric: str, allocation: str, keep: float) -> None:
        """Measure one plan, cut and repaired."""
        missing = {"none", "repair"} - {
            row.recovery for row in self.rows if row.name[:3] == (metric, allocation, keep)
        }
        if not missing:
            return
        scores, seconds = self._score(metric)
        plan = vlprune.plan(scores, {"prunable_params": keep}, allocation)
        if "none" in missing:
            small = vlprune.prune(self.model, plan, verify=False)
            self._note(small, metric, allocation, keep, "none", seconds, 0.0)
        if "repair" in missing:
            begin = time.perf_counter()
            small = vlprune.repair(self.model, plan, self.calibration, verify=False)
            took = time.perf_counter() - begin
            self._note(small, metric, allocation, keep, "repair", seconds, took)

    def measure_distilled(self, keep: float, steps: int) -> None:
        """Measure the best repaired model of a budget after distillation on training scenes."""
        repaired = [row for row in self.rows if row.keep == keep and row.recovery == "repair"]
        best = max(repaired, key=lambda row: row.value)
        recovery = f"repair + {steps} steps"
        if any(row.name == (*best.name[:3], recovery) for row in self.rows):
            return
        scores, seconds = self._score(best.metric)
        plan = vlprune.plan(scores, {"prunable_params": keep}, best.allocation)
        begin = time.perf_counter()
        small = vlprune.repair(self.model, plan, self.calibration, verify=False)
        task: Any = self.make("train", steps * 64, 2, 64, stream=True)
        small = distil(small, self.model, task, lr=2e-4)
        took = time.perf_counter() - begin
        self._note(small, best.metric, best.allocation, keep, recovery, seconds, took)

    def _score(self, metric: str) -> tuple[vlprune.Scores, float]:
        if metric not in self._scores:
            begin = time.perf_counter()
            task = None if metric in ("magnitude", "random") else self.calibration
            settings = METRICS[metric]
            if metric == "mope" and self.name != "scenes-clip":
                settings = {"measure": "kl"}
            scores = vlprune.score(self.model, metric, task, anatomy=self.anatomy, **settings)
            self._scores[metric] = scores, time.perf_counter() - begin
        return self._scores[metric]

    def _note(
        self,
        model: nn.Module,
        metric: str,
        allocation: str,
        keep: float,
        recovery: str,
        scoring: float,
        recovering: float,
    ) -> None:
        samples = samples_of(self.test, model.eval())
        low, high = samples.interval()
        row = Row(
            model=self.name,
            metric=metric,
            allocation=allocation,
            keep=keep,
            recovery=recovery,
            params=count_params(model),
            value=samples.value,
            low=low,
            high=high,
            of_dense=1.0 if metric == "dense" else samples.value / self.dense,
            scoring_seconds=round(scoring, 1),
            recovery_seconds=round(recovering, 1),
        )
        self.rows.append(row)
        append(self.path, row)
        print(self.name, *row.name, f"{row.value:.2f} ({row.of_dense:.2%})", flush=True)


def table(rows: list[Row]) -> str:
    """Return all rows as Markdown: one line per metric and allocation, cut -> repaired."""
    dense = next(row for row in rows if row.metric == "dense")
    keeps = sorted({row.keep for row in rows if row is not dense}, reverse=True)
    found = {row.name: row for row in rows}
    lines = [
        f"Dense: {dense.value:.1f} ({dense.low:.1f} to {dense.high:.1f}). Share of it in percent, "
        "cut -> repaired.",
        "",
        "| metric | allocation | "
        + " | ".join(f"keep {keep:.0%}" for keep in keeps)
        + " | score s |",
        "|---" * (len(keeps) + 3) + "|",
    ]
    for metric, allocation in dict.fromkeys(
        (r.metric, r.allocation) for r in rows if r is not dense
    ):
        cells = []
        for keep in keeps:
            pair = [found.get((metric, allocation, keep, how)) for how in ("none", "repair")]
            cells.append(" -> ".join(f"{100 * row.of_dense:.1f}" if row else "?" for row in pair))
        seconds = next(r.scoring_seconds for r in rows if r.name[:2] == (metric, allocation))
        lines.append(f"| {metric} | {allocation} | " + " | ".join(cells) + f" | {seconds:.0f} |")
    for row in rows:
        if row.recovery.startswith("repair +"):
            lines.append(
                f"\n{row.metric}, {row.allocation}, keep {row.keep:.0%}, {row.recovery}: "
                f"{row.value:.1f} ({row.low:.1f} to {row.high:.1f}), {row.of_dense:.1%} of dense, "
                f"{row.recovery_seconds:.0f} s"
            )
    return "\n".join(lines)


def draw(rows: list[Row], path: Path) -> None:
    """Draw recall over what is kept, cut and repaired, of every metric in one ranking."""
    import matplotlib.pyplot as plt

    dense = next(row for row in rows if row.metric == "dense")
    figure, both = plt.subplots(1, 2, figsize=(9, 3.6), sharey=True, layout="constrained")
    shown = [metric for metric in METRICS if any(row.metric == metric for row in rows)]
    for axes, recovery in zip(both, ("none", "repair"), strict=True):
        for number, metric in enumerate(shown):
            allocation = "uniform" if metric in ALIKE else "global"
            line = sorted(
                (row.keep, row.value, row.low, row.high)
                for row in rows
                if (row.metric, row.allocation, row.recovery) == (metric, allocation, recovery)
            )
            if line:
                keeps, recalls, lows, highs = zip(*line, strict=True)
                colour = f"C{number}"
                label = f"{metric}, {allocation}"
                axes.plot(keeps, recalls, marker="o", ms=4, color=colour, label=label)
                axes.fill_between(keeps, lows, highs, color=colour, alpha=0.2, lw=0)
        axes.axhline(dense.value, color="grey", ls=":", lw=1)
        axes.text(0.75, dense.value, "dense", va="bottom", ha="right", color="grey", fontsize=8)
        axes.set_title("cut" if recovery == "none" else "cut and repaired", loc="left")
        axes.set_xlabel("share of the prunable parameters that stays")
        axes.grid(alpha=0.3)
    both[0].set_ylabel("recall mean, 10,000 fresh scenes")
    both[1].legend(fontsize=8, loc="lower right")
    figure.savefig(path, dpi=130)


if __name__ == "__main__":
    main()
