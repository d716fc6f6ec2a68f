"""How much faster models at half of their MACs really are, beside what the MACs promise.

`python benchmarks/speedup.py --page docs/latency.md` cuts ViT-B/32 CLIP and DeiT-B (random weights:
time does not depend on them) to one number of MACs in several ways and times them beside the dense
model: every layer alike, layers unlike each other, and on DeiT torch-pruning's result, whose MACs
all others of that model then have.
"""

from __future__ import annotations

import argparse
import copy
import math
import random
from pathlib import Path

import _page
import torch
import torch_pruning as tp
from _torch_pruning import cut_
from torch import nn

import vlprune
from vlprune.calls import Inputs, calls_of
from vlprune.clocks import DeviceClock, resized
from vlprune.cost import count_macs
from vlprune.dissect import default_inputs
from vlprune.ranking import savings


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--models", default="open_clip:ViT-B-32,timm:deit_base_patch16_224")
    parser.add_argument("--backend", default="eager")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--timer", default="wall", help="wall or cpu")
    parser.add_argument("--take", default="median", help="median or least of the rounds")
    parser.add_argument("--page", type=Path, help="Markdown with markers to write the table into")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    clock = DeviceClock(
        backend=arguments.backend,
        rounds=arguments.rounds,
        timer=arguments.timer,
        take=arguments.take,
    )
    lines = [
        "| model | cut | MACs kept | ideal speed-up | measured | of ideal |",
        "|---|---|---|---|---|---|",
    ]
    for name in arguments.models.split(","):
        lines += rows(name, arguments.batch, clock)
    lines += ["", _page.machine(arguments.timer, arguments.take)]
    _page.write(arguments.page, "speedup", "\n".join(lines))


def rows(name: str, batch: int, clock: DeviceClock) -> list[str]:
    """Return the lines of one model."""
    dense = vlprune.create_model(name)
    one = default_inputs(dense, 1)
    models: dict[str, nn.Module] = {}
    macs = count_macs(dense, one) // 2
    if name.startswith("timm:"):
        models["torch-pruning, uniform"] = cut_by_torch_pruning(dense, one)
        macs = count_macs(models["torch-pruning, uniform"], one)
    anatomy = vlprune.dissect(dense, one).select(("head", "ffn"))
    for title, spread in (("uniform", 0.0), ("uneven", 2.0)):
        scores = drawn(anatomy, spread)
        for width in (1, 32):
            plan = vlprune.plan(scores, {"macs": macs}, "global", round_to=width, min_units=1)
            if not spread:
                plan = vlprune.plan(scores, {"macs": macs}, "uniform", round_to=width)
            said = f"{title}, widths of {width}" if width > 1 else title
            models[said] = vlprune.prune(dense, plan, verify=False)
    whole = count_macs(dense, one)
    times = clock([dense, *models.values()], resized(default_inputs(dense, batch), batch))
    lines = []
    for (title, model), ms in zip(models.items(), times[1:], strict=True):
        ideal, real = whole / count_macs(model, one), times[0] / ms
        lines.append(
            f"| {name}, batch {batch}, {times[0]:,.0f} ms | {title} | {1 / ideal:.1%} | "
            f"{ideal:.2f} | {real:.2f} | {real / ideal:.2f} |"
        )
        print(lines[-1], flush=True)
    return lines


def drawn(anatomy: vlprune.Anatomy, spread: float) -> vlprune.Scores:
    """Return random scores; with a spread, layers differ by up to e to the power of it."""
    draw, saved = random.Random(0), savings(anatomy, "macs")
    values = {}
    for axis in anatomy.axes:
        scale = saved[axis.name][0] * math.exp(spread * draw.random())
        values[axis.name] = tuple(scale * draw.random() for _ in range(axis.units))
    return vlprune.Scores(anatomy=anatomy, values=values, metric="drawn")


def cut_by_torch_pruning(model: nn.Module, example_inputs: Inputs) -> nn.Module:
    """Return a copy of a timm model of which torch-pruning keeps half of heads and neurons."""
    call = calls_of(example_inputs)[0]
    importance = tp.importance.GroupMagnitudeImportance(p=2)
    return cut_(copy.deepcopy(model), call.args or dict(call.kwargs), importance, 0.5)


if __name__ == "__main__":
    main()
