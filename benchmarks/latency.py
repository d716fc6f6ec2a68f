"""Predicted beside measured: random plans of a model, priced by its latency table and timed.

`python benchmarks/latency.py --page docs/latency.md` measures a table of each model, draws plans
that keep between a quarter and all units of every axis, and in half of them a part of the layers,
and prints by how much the predictions are off.
"""

from __future__ import annotations

import argparse
import random
import statistics
from pathlib import Path

import _page
import torch

import vlprune
from vlprune.clocks import DeviceClock
from vlprune.profile import predicted_beside_measured

KINDS = ("head", "ffn", "layer")


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "--models", default="scenes-clip:16,open_clip:ViT-B-32:8", help="NAME:BATCH"
    )
    parser.add_argument("--backend", default="eager")
    parser.add_argument("--plans", type=int, default=20)
    parser.add_argument("--rounds", default="15,3", help="of each model")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--timer", default="wall", help="wall or cpu")
    parser.add_argument("--take", default="median", help="median or least of the rounds")
    parser.add_argument("--page", type=Path, help="Markdown with markers to write the table into")
    parser.add_argument("--name", default="latency", help="of the markers")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    lines = [
        "| model | batch | backend | plans | measured shares | median error | most | within 10 % |",
        "|---|---|---|---|---|---|---|---|",
    ]
    rounds = [int(count) for count in arguments.rounds.split(",")]
    for number, entry in enumerate(arguments.models.split(",")):
        name, _, batch = entry.rpartition(":")
        clock = DeviceClock(
            backend=arguments.backend,
            timer=arguments.timer,
            take=arguments.take,
            rounds=rounds[number % len(rounds)],
        )
        shares, errors = measure(name, int(batch), clock, arguments.plans)
        within = sum(error <= 0.1 for error in errors)
        lines.append(
            f"| {name} | {batch} | {arguments.backend} | {len(errors)} | "
            f"{min(shares):.0%} to {max(shares):.0%} | {statistics.median(errors):.1%} | "
            f"{max(errors):.1%} | {within} of {len(errors)} |"
        )
    lines += ["", _page.machine(arguments.timer, arguments.take)]
    _page.write(arguments.page, arguments.name, "\n".join(lines))


def measure(
    name: str, batch: int, clock: DeviceClock, plans: int
) -> tuple[list[float], list[float]]:
    """Return measured shares of the dense time, and errors of the predictions."""
    model = vlprune.create_model(name)
    anatomy = vlprune.dissect(model)
    table = vlprune.profile(model, anatomy=anatomy, strategies=KINDS, batch_size=batch, clock=clock)
    print(table, flush=True)
    draw = random.Random(0)
    shares, errors = [], []
    for number in range(plans):
        kinds = KINDS if number % 2 else KINDS[:2]
        keep = {
            axis.name: tuple(
                sorted(
                    draw.sample(range(axis.units), draw.randint(-(-axis.units // 4), axis.units))
                )
            )
            for axis in anatomy.select(kinds).axes
        }
        found = predicted_beside_measured(
            table, model, vlprune.make_plan(anatomy, keep), clock=clock
        )
        print(f"{name} {number}: {found}", flush=True)
        shares.append(found.measured)
        errors.append(abs(found.error))
    return shares, errors


if __name__ == "__main__":
    main()
