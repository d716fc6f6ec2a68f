"""What every verb costs: seconds, and how much more memory the process held at most.

`python benchmarks/verbs.py --page docs/costs.md` runs the verbs one after another on a CLIP that
ships and on a ViT-S/32 CLIP of open_clip's with random weights. Memory is the peak of the resident
set while a verb ran over what was resident before it (Linux: the peak is set back in between, and
pages that the allocator holds are given back first), beside the size of the dense model.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import _page
import torch

import vlprune
from vlprune.certify import certify
from vlprune.compare import compare
from vlprune.cost import count_params
from vlprune.export import to_onnx, to_torch_export
from vlprune.tasks import Retrieval
from vlprune.tasks.scenes import loader

T = TypeVar("T")
BUDGET = {"prunable_params": 0.5}


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--models", default="scenes-clip,open_clip:ViT-S-32")
    parser.add_argument("--page", type=Path, help="Markdown with markers to write the table into")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    names = arguments.models.split(",")
    columns = [Costs(name) for name in names]
    for column in columns:
        column.run()
    lines = [
        f"| verb | {' | '.join(f'`{c.name}` s | MB' for c in columns)} |",
        "|---" * (1 + 2 * len(columns)) + "|",
    ]
    for verb in columns[0].rows:
        cells = [f"{c.rows[verb][0]:.2f} | {c.rows[verb][1]:.0f}" for c in columns]
        lines.append(f"| {verb} | {' | '.join(cells)} |")
    sizes = [f"`{c.name}` {c.megabytes:.0f} MB, {c.data}" for c in columns]
    lines += ["", f"{'; '.join(sizes)}.", "", _page.machine("wall")]
    _page.write(arguments.page, "costs", "\n".join(lines))


class Costs:
    """One model, its task, and what each verb cost.

    Args:
        name: as `vlprune.create_model` takes it; tasks are retrieval.
    """

    def __init__(self, name: str):
        self.name = name
        self.rows: dict[str, tuple[float, float]] = {}
        vlprune.create_model(name)  # libraries are imported
        self.model = self._of("create_model", lambda: vlprune.create_model(name).eval())
        self.megabytes = 4 * count_params(self.model) / 2**20
        if name.startswith("scenes"):
            self.task = Retrieval(loader("train", 256, 1, 64))
            self.data = "256 scenes in batches of 64"
        else:
            self.task = Retrieval(_noise(64, 16))
            self.data = "64 pairs of noise in batches of 16"

    def run(self) -> None:
        """Run every verb once."""
        model, task = self.model, self.task
        self._of("dense forward of the task, for comparison", lambda: task.measure(model))
        anatomy = self._of("dissect", lambda: vlprune.dissect(model))
        some = anatomy.select(("head", "ffn"))
        for metric in ("magnitude", "activation", "taylor", "fisher", "reconstruction"):
            scores = self._of(
                f"score, {metric}", lambda m=metric: vlprune.score(model, m, task, anatomy=some)
            )
        for allocation in ("global", "knapsack"):
            plan = self._of(
                f"plan, {allocation}", lambda a=allocation: vlprune.plan(scores, BUDGET, a)
            )
        self._of("mask, one forward of the task", lambda: self._masked(plan))
        self._of("prune, not verified", lambda: vlprune.prune(model, plan, verify=False))
        self._of("prune", lambda: vlprune.prune(model, plan))
        small = self._of("repair", lambda: vlprune.repair(model, plan, task))
        self._of("compress", lambda: vlprune.compress(model, task, BUDGET))
        self._of("verify", lambda: vlprune.verify(model, vlprune.prune(model, plan, verify=False)))
        self._of("certify", lambda: certify(small, model))
        self._of("certify, with compile, export, onnx", lambda: self._certified(small))
        self._of("profile", lambda: vlprune.profile(model, anatomy=anatomy, rounds=3))
        self._of("compare: 2 metrics, 1 budget, cut and repaired", self._compared)
        self._files(small, plan)

    def _masked(self, plan: vlprune.Plan) -> None:
        with vlprune.mask(self.model, plan) as masked:
            self.task.measure(masked)

    def _certified(self, small: torch.nn.Module) -> None:
        certify(small, self.model, claims=("compile", "export", "onnx"))

    def _compared(self) -> None:
        compare(self.model, self.task, self.task, metrics=("taylor", "magnitude"), keeps=(0.5,))

    def _files(self, small: torch.nn.Module, plan: vlprune.Plan) -> None:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder)
            self._of("save_pretrained", lambda: vlprune.save_pretrained(small, path / "small"))
            self._of("from_pretrained", lambda: vlprune.from_pretrained(path / "small"))
            self._of("verify_folder", lambda: vlprune.verify_folder(path / "small"))
            self._of("export to torch.export", lambda: to_torch_export(small, path / "small.pt2"))
            self._of("export to ONNX", lambda: to_onnx(small, path / "small.onnx"))

    def _of(self, verb: str, run: Callable[[], T]) -> T:
        gc.collect()
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # the peak is the present
        before, begin = _resident("VmRSS"), time.perf_counter()
        result = run()
        self.rows[verb] = time.perf_counter() - begin, _resident("VmHWM") - before
        print(self.name, verb, *(f"{x:.2f}" for x in self.rows[verb]), flush=True)
        return result


def _resident(field: str) -> float:
    """A line of /proc/self/status in MB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(field))


def _noise(count: int, size: int) -> list[dict[str, Any]]:
    draw = torch.Generator().manual_seed(0)
    images = torch.randn(count, 3, 224, 224, generator=draw)
    texts = torch.zeros(count, 77, dtype=torch.long)
    for row in texts:
        words = int(torch.randint(5, 20, (), generator=draw))
        row[:words] = torch.randint(1, 49_000, (words,), generator=draw)
        row[words] = 49_407  # the end of a text is where its largest token is
    parts = (images.split(size), texts.split(size))
    return [{"image": image, "text": text} for image, text in zip(*parts, strict=True)]


if __name__ == "__main__":
    main()
