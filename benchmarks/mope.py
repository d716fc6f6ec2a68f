"""What the ablation engine saves on a ViT-B/32 CLIP, and how far its short cuts agree.

`python benchmarks/mope.py` prints two tables.

Cost: open_clip's ViT-B/32 with random weights, all heads and 8 groups of neurons a layer, on 64
pairs of noise images and captions of 5 to 20 tokens. Seconds of the plain loop (mask, both towers
on all pairs, unmask; timed on a random sample of the removals and scaled), the engine exact, the
engine adaptive in batches of 8, and the floor (for every removal the multiply-accumulates from its
layer on, without what follows the last token, at the rate of the dense forward). Plain loop and
engine take turns, block by block. `--every n` takes every n-th head and group of all layers; what
the removals of a block share is then shared by fewer.

Agreement: on scenes-clip, plans of half of the prunable parameters and rank correlations between
adaptive and exact, and between every measure and recall on fresh scenes.
"""

from __future__ import annotations

import argparse
import collections
import random
import resource
import time
from typing import Any

import numpy as np
import open_clip
import torch
from torch import Tensor, nn

import vlprune
from vlprune.ablation.batch import Ablations
from vlprune.ablation.engine import Engine
from vlprune.ablation.removals import Removal
from vlprune.ablation.sequential import Adaptive
from vlprune.calls import quiet_eval
from vlprune.cost import dense_cost
from vlprune.measures import MEASURES
from vlprune.metrics.mope import Mope
from vlprune.tasks import Retrieval
from vlprune.tasks.scenes import loader

BUDGET = {"prunable_params": 0.5}


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--pairs", type=int, default=64)
    parser.add_argument("--every", type=int, default=1, help="take every n-th head and group")
    parser.add_argument("--sample", type=int, default=24, help="removals of the plain loop")
    parser.add_argument("--scenes", type=int, default=10_000, help="fresh scenes for recall")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only", choices=["cost", "agreement"])
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.only != "agreement":
        cost(arguments.pairs, arguments.sample, arguments.every)
    if arguments.only != "cost":
        agreement(arguments.scenes)


def captions(count: int, seed: int = 0) -> Tensor:
    """Token ids [count, 77] of open_clip's form: start, 3 to 18 words, end, zeros."""
    draw = random.Random(seed)
    ids = torch.zeros(count, 77, dtype=torch.long)
    for row in ids:
        words = draw.randint(3, 18)
        row[: words + 2] = torch.tensor(
            [49406, *(draw.randint(300, 40_000) for _ in range(words)), 49407]
        )
    return ids


def cost(pairs: int, sample: int, every: int) -> None:
    """Time plain loop, engine and floor on a ViT-B/32."""
    torch.manual_seed(0)
    model = open_clip.create_model("ViT-B-32").eval()
    images, texts = torch.randn(pairs, 3, 224, 224), captions(pairs)
    whole = Retrieval([(images, texts)])
    parts = Retrieval([(images[i : i + 8], texts[i : i + 8]) for i in range(0, pairs, 8)])
    anatomy = vlprune.dissect(model, (images[:1], texts[:1])).select(("head", "ffn"))
    everything = Mope(model, anatomy).removals()
    places: dict[str, int] = collections.defaultdict(int)
    removals = []
    for removal in everything:  # every n-th head and group of every layer
        if places[removal.axis] % every == 0:
            removals.append(removal)
        places[removal.axis] += 1
    drawn = set(random.Random(0).sample(removals, sample))
    measure = MEASURES["cosine"](whole, model)
    plain: list[float] = []
    differences = []
    engine = floor = 0.0
    falls: dict[Removal, Tensor] = {}
    (batch,) = whole.batches()
    forward = lambda batch: whole.outputs(model, batch)  # noqa: E731
    ablations = Ablations(model, anatomy, removals, forward)
    with torch.no_grad(), quiet_eval(model):
        dense = forward(batch)
        rate = min(timed(lambda: forward(batch)) for _ in range(2))
        with ablations:
            engine += timed(lambda: ablations.begin(batch))
            reference = ablations.begin(batch)
        lengths = dict(ablations.trimming.lengths)
        whole_macs = dense_cost(anatomy).macs
        for block, members in ablations.blocks.items():
            with ablations:
                begin = time.perf_counter()
                for removal, outputs in ablations.of_block(block, members):
                    falls[removal] = -measure.value(outputs, reference, texts)
                engine += time.perf_counter() - begin
                share = ablations.cost(block) / whole_macs
            few = [n / t for stack, (t, n) in lengths.items() if block.startswith(stack)]
            floor += len(members) * share * (few[0] if few else 1.0) * rate
            for removal in drawn & set(members):
                begin = time.perf_counter()
                with masked(model, anatomy, removal):
                    outputs = forward(batch)
                value = measure.value(outputs, dense, texts)
                plain.append(time.perf_counter() - begin)
                other = float(-value.mean())
                differences.append(abs(other - float(falls[removal].mean())) / abs(other))
        saved = sum(removal_cost(anatomy, removal) for removal in removals)
        budget = {"params": dense_cost(anatomy).params - saved // 2}
        stopper = Adaptive(anatomy, budget)
        quick = Engine(model, parts, anatomy, removals, measure="cosine", stopper=stopper)
        begin = time.perf_counter()
        effects = quick.run()
        adaptive = time.perf_counter() - begin
    loop = sum(plain) / len(plain) * len(removals)
    print(
        f"ViT-B/32, {len(removals)} of {len(everything)} removals, {pairs} pairs, "
        f"{torch.get_num_threads()} thread(s)"
    )
    print("| | seconds | times the plain loop | of the floor |")
    print("|---|---|---|---|")
    rows = {"plain loop (scaled)": loop, "exact": engine, "adaptive": adaptive, "floor": floor}
    for name, seconds in rows.items():
        print(f"| {name} | {seconds:.0f} | {loop / seconds:.1f} | {seconds / floor:.2f} |")
    kept = [best_half(anatomy, found) for found in (falls, effects.falls)]
    alike = 1 - len(kept[0] ^ kept[1]) / len(removals)
    print(
        f"\nThe plain loop was timed on {len(plain)} of them; its falls differ from the engine's "
        f"by at most {max(differences):.1e} relative. Text was cut to "
        f"{', '.join(f'{n} of {t}' for t, n in lengths.values()) or 'no fewer'} tokens. Adaptive "
        f"ran {effects.evaluations:,} of {effects.possible:,} evaluations, left "
        f"{len(stopper.undecided)} removals undecided, and agrees with exact on {alike:.1%} of "
        f"the removals that a cut in the middle keeps. Recorded answers took "
        f"{ablations.bytes / 2**20:.0f} MiB, those of 8 pairs {quick.expected_bytes / 2**20:.0f}; "
        f"peak of the process {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.1f} GiB."
    )


def timed(function: Any) -> float:
    """Return the seconds that a call takes."""
    begin = time.perf_counter()
    function()
    return time.perf_counter() - begin


def removal_cost(anatomy: vlprune.Anatomy, removal: Removal) -> int:
    """Return the parameters that go with a removal."""
    keep = removal.rest(anatomy.axis(removal.axis))
    return dense_cost(anatomy).params - vlprune.price(anatomy, keep).params


def best_half(anatomy: vlprune.Anatomy, falls: dict[Removal, Tensor]) -> set[Removal]:
    """Return the removals that are worth most per parameter, those of half of the parameters."""
    costs = {removal: removal_cost(anatomy, removal) for removal in falls}
    order = sorted(falls, key=lambda r: -float(falls[r].mean()) / costs[r])
    kept: set[Removal] = set()
    for removal in order:
        if sum(costs[r] for r in kept) < sum(costs.values()) / 2:
            kept.add(removal)
    return kept


def masked(model: nn.Module, anatomy: vlprune.Anatomy, removal: Removal) -> Any:
    """The model without one removal."""
    keep = removal.rest(anatomy.axis(removal.axis))
    return vlprune.mask(model, vlprune.make_plan(anatomy, keep))


def same_units(model: nn.Module, anatomy: vlprune.Anatomy, *effects: Any) -> float:
    """Return the share of units on which plans by two effects agree."""
    meter = Mope(model, anatomy)
    plans = []
    for found in effects:
        meter.effects = found
        plans.append(vlprune.plan(meter.compute(), BUDGET))
    rows = zip(*(plan.rows for plan in plans), strict=True)
    counts = [(a.axis.units - len(set(a.keep) ^ set(b.keep)), a.axis.units) for a, b in rows]
    return sum(same for same, _ in counts) / sum(units for _, units in counts)


def spearman(one: dict[Removal, Tensor], other: dict[Removal, Tensor]) -> float:
    """Return the rank correlation of mean falls."""
    keys = list(one)
    ranks = [
        np.argsort(np.argsort([float(falls[key].mean()) for key in keys])) for falls in (one, other)
    ]
    return float(np.corrcoef(*ranks)[0, 1])


def agreement(scenes: int) -> None:
    """Compare adaptive with exact, and measures with recall, on scenes-clip."""
    model = vlprune.create_model("scenes-clip").eval()
    task = Retrieval(loader("train", 512, 0, 32))
    anatomy = vlprune.dissect(model, task.example_inputs(model)).select(("head", "ffn"))
    cheap = vlprune.score(model, "taylor", task, anatomy=anatomy)
    removals = Mope(model, anatomy, rewire=cheap).removals()
    print(f"\nscenes-clip, {len(removals)} removals, 512 scenes")
    print("| measure | exact s | adaptive s | evaluations | undecided | same units | ranks alike |")
    print("|---|---|---|---|---|---|---|")
    found = {}
    for measure in ("loss", "kl", "cosine"):
        begin = time.perf_counter()
        exact = Engine(model, task, anatomy, removals, measure=measure).run()
        middle = time.perf_counter()
        stopper = Adaptive(anatomy, BUDGET)
        quick = Engine(model, task, anatomy, removals, measure=measure, stopper=stopper).run()
        end = time.perf_counter()
        found[measure] = exact.falls
        print(
            f"| {measure} | {middle - begin:.0f} | {end - middle:.0f} | "
            f"{quick.evaluations / quick.possible:.0%} | {len(stopper.undecided)} | "
            f"{same_units(model, anatomy, exact, quick):.1%} | "
            f"{spearman(exact.falls, quick.falls):.3f} |"
        )
    fresh = Retrieval(loader("test", scenes, 7, 500))
    recall = Engine(model, fresh, anatomy, removals, measure="task").run().falls
    print(f"\nrank correlation with the fall of recall on {scenes:,} fresh scenes")
    print("| measure on 512 scenes | all | heads | groups |")
    print("|---|---|---|---|")
    found["task (recall)"] = Engine(model, task, anatomy, removals, measure="task").run().falls
    for measure, falls in found.items():
        cells = []
        for kind in ("", "head", "ffn"):
            keys = [r for r in removals if r.axis.endswith(kind)]
            cells.append(
                f"{spearman({k: falls[k] for k in keys}, {k: recall[k] for k in keys}):.3f}"
            )
        print(f"| {measure} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
