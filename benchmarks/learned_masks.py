"""Masks that are learnt against one-shot criteria: what is left after the same training.

`python benchmarks/learned_masks.py --out docs/learned_masks.csv` measures, on every model that
ships and on zero-shot classification, every row that the file does not hold yet: the dense model;
then, for half and a quarter of the parameters of heads and neurons kept, what each method leaves
after it was cut and trained for `--retrain` steps. Methods that search train for `--search` steps
before the cut. All get the same number of parameters, the same fresh training scenes of a seed, and
the same optimiser; values are of 1,000 test scenes. Then what a step with masks costs beside a
plain one: seconds (median, the two in turns) and bytes kept for the backward. It prints the tables
as Markdown.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import _page
import torch
from _rows import append, read
from torch import Tensor, nn

import vlprune
from vlprune.copies import clone
from vlprune.cost import absolute_budget, count_params
from vlprune.metrics import HardConcrete, UPop
from vlprune.pruner import record_of
from vlprune.recover.finetune import Repeated, Training, fit
from vlprune.shipped import SHIPPED, MakeTask
from vlprune.tasks import Classification
from vlprune.tasks.scenes import place_loader, place_prompts

KEEPS = (0.5, 0.25)
ONE_SHOT: dict[str, tuple[str, dict[str, Any]]] = {  # allocation, settings
    "magnitude": ("uniform", {}),
    "mope": ("global", {"measure": "kl"}),
}
SEARCHES: dict[str, Callable[..., Any]] = {
    "upop paper": lambda *a, **k: UPop(*a, units="paper", interval=5, **k),
    "upop cost": lambda *a, **k: UPop(*a, units="cost", interval=5, **k),
    "hard_concrete": lambda *a, **k: HardConcrete(*a, **k),
}


def zero_shot(*which: Any, **options: Any) -> Classification:
    """Where an item stands, by the words of captions: what the CLIP was not trained to classify."""
    return Classification(place_loader(*which, **options), place_prompts())


JOBS: dict[str, tuple[str, MakeTask]] = {  # name in the table: model, task
    **{name: (name, shipped.task) for name, shipped in SHIPPED.items()},
    "scenes-clip zero-shot": ("scenes-clip", zero_shot),
}


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One trained model."""

    model: str
    method: str
    keep: float
    seed: int
    params: int
    value: float
    search_seconds: float
    retrain_seconds: float
    relative_error: float


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Overhead:
    """What a training step with masks costs beside a plain one."""

    model: str
    method: str
    plain_ms: float
    masked_ms: float
    plain_mb: float
    masked_mb: float


def main() -> None:
    """Measure what is missing, then print all."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("learned_masks.csv"))
    parser.add_argument("--models", default=",".join(JOBS))
    parser.add_argument("--methods", default=",".join([*ONE_SHOT, *SEARCHES]))
    parser.add_argument("--keeps", default=",".join(map(str, KEEPS)))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--search", type=int, default=80, help="steps before the cut")
    parser.add_argument("--retrain", type=int, default=80, help="steps after the cut")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--lr", type=float, default=5e-4)
    parser.add_argument("--scenes", type=int, default=1000, help="to measure on")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--page", type=Path, help="Markdown page whose tables are written anew")
    parser.add_argument("--overhead", type=int, default=12, help="steps to time, 0 for none")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    methods = arguments.methods.split(",")
    costs = arguments.out.with_name(f"{arguments.out.stem}_overhead.csv")
    for name in arguments.models.split(","):
        bench = Bench(name, arguments)
        for keep in map(float, arguments.keeps.split(",")):
            for seed in range(arguments.seeds):
                for method in methods:
                    bench.measure(method, keep, seed)
        if arguments.overhead:
            measure_overhead(bench, costs, arguments.overhead)
    found = "\n".join((table(read(arguments.out, Row)), overhead_table(read(costs, Overhead))))
    _page.write(arguments.page, "tables", found.strip())


class Bench:
    """One model that ships, a task, and the file of what was measured.

    Args:
        name: in `JOBS`.
        arguments: of the command line.
    """

    def __init__(self, name: str, arguments: argparse.Namespace):
        self.name, self.arguments = name, arguments
        self.rows = [row for row in read(arguments.out, Row) if row.model == name]
        model, self.make = JOBS[name]
        self.model = vlprune.create_model(model).eval()
        self.calibration = self.make("train", 256, 1, 64)
        self.test = self.make("test", arguments.scenes, 7, 250)
        self.inputs = self.calibration.example_inputs(self.model)
        self.anatomy = vlprune.dissect(self.model, self.inputs)
        self._scores: dict[str, vlprune.Scores] = {}
        if not any(row.method == "dense" for row in self.rows):
            self._note("dense", 1.0, 0, self.model, 0.0, 0.0)

    def budget(self, keep: float) -> dict[str, int]:
        """Return the parameters that are left when this share of heads and neurons stays."""
        some = self.anatomy.select(("head", "ffn"))
        return absolute_budget(some, {"prunable_params": keep})

    def measure(self, method: str, keep: float, seed: int) -> None:
        """Measure one method at one budget, with the training scenes of a seed."""
        if any((row.method, row.keep, row.seed) == (method, keep, seed) for row in self.rows):
            return
        begin = time.perf_counter()
        if method in SEARCHES:
            small = self._searched(method, keep, seed)
        else:
            allocation, _ = ONE_SHOT[method]
            plan = vlprune.plan(self._score(method), self.budget(keep), allocation)
            small = vlprune.prune(self.model, plan, self.inputs)
        searched = time.perf_counter() - begin
        begin = time.perf_counter()
        error = record_of(small).relative_error
        small = self._trained(small, self.arguments.retrain, 2 * seed + 101, "cosine")
        seconds = time.perf_counter() - begin
        self._note(method, keep, seed, small, searched, seconds, error or 0.0)

    def _searched(self, method: str, keep: float, seed: int) -> nn.Module:
        model = clone(self.model)
        steps = self.arguments.search
        masks = SEARCHES[method](model, self.anatomy, budget=self.budget(keep), steps=steps)
        with masks:
            self._trained(model, steps, 2 * seed + 100, "constant", masks)
        return vlprune.prune(model, masks.plan(), self.inputs)

    def _trained(
        self, model: nn.Module, steps: int, seed: int, schedule: Any, masks: Any = None
    ) -> nn.Module:
        size = self.arguments.batch_size
        task = self.make("train", steps * size, seed, size, stream=True)
        training = Training(
            steps=steps,
            lr=self.arguments.lr,
            weight_decay=0.05,
            warm_up=0.05,
            schedule=schedule,
            seed=seed,
        )
        return fit(model, task.loss, Repeated(task), training, masks=masks)

    def _score(self, metric: str) -> vlprune.Scores:
        if metric not in self._scores:
            self._scores[metric] = vlprune.score(
                self.model,
                metric,
                self.calibration,
                anatomy=self.anatomy.select(("head", "ffn")),
                **ONE_SHOT[metric][1],
            )
        return self._scores[metric]

    def _note(
        self,
        method: str,
        keep: float,
        seed: int,
        model: nn.Module,
        search: float,
        retrain: float,
        error: float = 0.0,
    ) -> None:
        row = Row(
            model=self.name,
            method=method,
            keep=keep,
            seed=seed,
            params=count_params(model),
            value=round(self.test.measure(model), 3),
            search_seconds=round(search, 1),
            retrain_seconds=round(retrain, 1),
            relative_error=error,
        )
        self.rows.append(row)
        append(self.arguments.out, row)
        print(
            f"{self.name}, {method}, keep {keep:.0%}, seed {seed}: {row.value:.2f} "
            f"({search:.0f} + {retrain:.0f} s)",
            flush=True,
        )


def measure_overhead(bench: Bench, path: Path, steps: int) -> None:
    """Time training steps with and without masks, in turns, and count what the backward keeps."""
    known = {(row.model, row.method) for row in read(path, Overhead)}
    size = bench.arguments.batch_size
    task = bench.make("train", (steps + 3) * size, 5, size)
    for method, make in SEARCHES.items():
        if (bench.name, method) in known:
            continue
        plain, model = clone(bench.model).train(), clone(bench.model).train()
        masks = make(model, bench.anatomy, budget=bench.budget(0.5), steps=steps + 3)
        optimisers = [torch.optim.AdamW(m.parameters(), lr=1e-4) for m in (plain, model)]
        seconds: tuple[list[float], list[float]] = ([], [])
        with masks:
            for batch in task.batches():
                for number, (one, optimiser) in enumerate(
                    zip((plain, model), optimisers, strict=True)
                ):
                    begin = time.perf_counter()
                    task.loss(one, batch).backward()
                    if number:
                        masks.update()
                    optimiser.step()
                    optimiser.zero_grad()
                    if number:
                        masks.step()
                    seconds[number].append(time.perf_counter() - begin)
            batch = next(iter(task.batches()))
            kept = [_kept_for_backward(partial(task.loss, m, batch)) for m in (plain, model)]
        times = [1000 * statistics.median(row[3:]) for row in seconds]
        row = Overhead(
            model=bench.name,
            method=method,
            plain_ms=round(times[0], 1),
            masked_ms=round(times[1], 1),
            plain_mb=round(kept[0] / 2**20, 1),
            masked_mb=round(kept[1] / 2**20, 1),
        )
        append(path, row)
        print(row, flush=True)


def _kept_for_backward(run: Callable[[], Tensor]) -> int:
    """Bytes of storage that a forward keeps for its backward, parameters included."""
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        alive = run()  # storages stay while the graph does, so that no address is used twice
    del alive
    return sum(kept.values())


def table(rows: list[Row]) -> str:
    """Return all rows as Markdown: a line per model, mean and deviation over seeds."""
    methods = [*ONE_SHOT, *SEARCHES]
    keeps = sorted({row.keep for row in rows if row.method != "dense"}, reverse=True)
    lines = []
    for keep in keeps:
        lines += [
            f"\n{keep:.0%} of the parameters of heads and neurons kept:\n",
            f"| model | dense | {' | '.join(methods)} |",
            "|---" * (len(methods) + 2) + "|",
        ]
        for model in dict.fromkeys(row.model for row in rows):
            own = [row for row in rows if row.model == model]
            dense = next(row.value for row in own if row.method == "dense")
            cells = []
            for method in methods:
                values = [r.value for r in own if (r.method, r.keep) == (method, keep)]
                cells.append(_cell(values))
            lines.append(f"| `{model}` | {dense:.1f} | {' | '.join(cells)} |")
    errors = [row.relative_error for row in rows]
    lines.append(f"\nSearched = cut: largest relative error {max(errors, default=0):.1e}.")
    return "\n".join(lines)


def _cell(values: list[float]) -> str:
    """Mean and deviation, or what there is."""
    if len(values) < 2:
        return f"{values[0]:.1f} (one seed)" if values else "?"
    return f"{statistics.mean(values):.1f} ± {statistics.stdev(values):.1f}"


def overhead_table(rows: list[Overhead]) -> str:
    """Return the costs of a step as Markdown."""
    lines = [
        "\n| model | masks | ms a step, plain -> masked | kept for the backward, MB |",
        "|---" * 4 + "|",
    ]
    for row in rows:
        ratio, more = row.masked_ms / row.plain_ms, row.masked_mb / row.plain_mb
        lines.append(
            f"| `{row.model}` | {row.method} | {row.plain_ms:.0f} -> {row.masked_ms:.0f} "
            f"({ratio:.2f} x) | {row.plain_mb:.0f} -> {row.masked_mb:.0f} ({more:.2f} x) |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
