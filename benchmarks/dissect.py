"""How dissecting, planning and cutting grow with depth and width, beside torch-pruning's graph.

`python benchmarks/dissect.py` prints three tables: vision transformers of timm by depth and width,
each in the same process as torch-pruning's dependency graph and the enumeration of its groups; the
largest CLIP of open_clip without weights; and the memory that a real ViT-L/14 CLIP takes. Seconds
are of one thread. Every model runs in a process of its own, so that peaks of memory are its own.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

SIZES = [(6, 384), (12, 384), (24, 384), (12, 192), (12, 768), (24, 1024)]  # depth, width


def main() -> None:
    """Print the tables; with arguments, measure one model and print JSON."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--one", nargs="*", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        kind, *values = arguments.one
        print(json.dumps(MEASURES[kind](*values)))
        return
    print("| depth | width | dissect s | plan s | cut s | torch-pruning graph s | its groups s |")
    print("|---|---|---|---|---|---|---|")
    for depth, width in SIZES:
        row = measured("timm", depth, width)
        print(f"| {depth} | {width} | " + " | ".join(f"{row[k]:.2f}" for k in TIMES) + " |")
    row = measured("meta", "ViT-bigG-14")
    total = row["build"] + row["dissect"] + row["plan"] + row["cut"]
    print(
        f"\nViT-bigG-14 without weights, {row['params']:,} parameters to {row['left']:,}: build "
        f"{row['build']:.1f} s, dissect {row['dissect']:.1f} s, plan to half of the MACs "
        f"{row['plan']:.1f} s, cut {row['cut']:.1f} s; {total:.1f} s in all (aim: < 15 s), "
        f"{row['extra_gib']:.2f} GiB over the imports (aim: < 1 GiB)."
    )
    row = measured("real", "ViT-L-14")
    print(
        f"\nViT-L-14 in float32, {row['params']:,} parameters, {row['gib']:.2f} GiB: dissect "
        f"{row['dissect']:.1f} s, cut to half of the MACs in place {row['cut']:.1f} s; peak "
        f"{row['peak']:.2f} x the model (aim: < 1.3 x)."
    )


TIMES = ("dissect", "plan", "cut", "graph", "groups")


def measured(*arguments: Any) -> dict[str, Any]:
    """Return what a fresh process measures."""
    command = [sys.executable, __file__, "--one", *map(str, arguments)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def timed(function: Callable[[], Any]) -> tuple[float, Any]:
    """Return the seconds that a call takes, and its answer."""
    begin = time.perf_counter()
    answer = function()
    return time.perf_counter() - begin, answer


def peak_gib() -> float:
    """Return the peak resident memory of this process."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def measure_timm(depth: str, width: str) -> dict[str, float]:
    """A ViT at 64 x 64 pixels: vlprune and torch-pruning on the same module."""
    import torch
    import torch_pruning

    import vlprune

    torch.set_num_threads(1)
    size = {"depth": int(depth), "embed_dim": int(width), "num_heads": int(width) // 64}
    model = vlprune.create_model("timm:vit_small_patch16_224", img_size=64, **size)
    images = torch.randn(1, 3, 64, 64)
    vlprune.dissect(vlprune.create_model("timm:vit_tiny_patch16_224", img_size=64, depth=1))  # warm
    graph = torch_pruning.DependencyGraph()
    graph_s, _ = timed(lambda: graph.build_dependency(model, images))
    groups_s, _ = timed(lambda: list(graph.get_all_groups()))
    model = vlprune.create_model("timm:vit_small_patch16_224", img_size=64, **size)
    dissect_s, anatomy = timed(lambda: vlprune.dissect(model))
    scores = vlprune.score(model, "random", anatomy=anatomy)
    plan_s, plan = timed(lambda: vlprune.plan(scores, {"macs": 0.5}))
    cut_s, _ = timed(lambda: vlprune.prune(model, plan, verify=False))
    return dict(zip(TIMES, (dissect_s, plan_s, cut_s, graph_s, groups_s), strict=True))


def measure_meta(name: str) -> dict[str, float]:
    """A CLIP on the meta device: nothing is allocated but one block at a time."""
    import open_clip  # noqa: F401  # its import is no part of the measure
    import torch
    import torch.utils.flop_counter

    import vlprune

    torch.set_num_threads(1)
    base = peak_gib()
    build_s, model = timed(lambda: vlprune.create_model(f"open_clip:{name}", device="meta"))
    dissect_s, anatomy = timed(lambda: vlprune.dissect(model))
    scores = vlprune.score(model, "random", anatomy=anatomy)
    plan_s, plan = timed(lambda: vlprune.plan(scores, {"macs": 0.5}))
    params = sum(p.numel() for p in model.parameters())
    cut_s, small = timed(lambda: vlprune.prune(model, plan, verify=False, inplace=True))
    left = sum(p.numel() for p in small.parameters())
    assert left == plan.planned.params
    return {
        "build": build_s,
        "dissect": dissect_s,
        "plan": plan_s,
        "cut": cut_s,
        "params": params,
        "left": left,
        "extra_gib": peak_gib() - base,
    }


def measure_real(name: str) -> dict[str, float]:
    """A CLIP with weights: peak memory over what the imports take."""
    import open_clip  # noqa: F401  # its import is no part of the measure
    import torch
    import torch.utils.flop_counter

    import vlprune

    torch.set_num_threads(1)
    base = peak_gib()
    model = vlprune.create_model(f"open_clip:{name}")
    params = sum(p.numel() for p in model.parameters())
    gib = 4 * params / 2**30
    dissect_s, anatomy = timed(lambda: vlprune.dissect(model))
    plan = vlprune.plan(vlprune.score(model, "random", anatomy=anatomy), {"macs": 0.5})
    cut_s, _ = timed(lambda: vlprune.prune(model, plan, verify=False, inplace=True))
    peak = (peak_gib() - base) / gib
    return {"params": params, "gib": gib, "dissect": dissect_s, "cut": cut_s, "peak": peak}


MEASURES = {"timm": measure_timm, "meta": measure_meta, "real": measure_real}

if __name__ == "__main__":
    main()
