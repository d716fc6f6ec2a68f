"""MoPE-CLIP: a dual encoder loses width, then depth, by module-wise pruning error.

Two stages of the paper, both the same steps: score what is left by how much retrieval falls without
it, plan, cut, distil from the uncut model; then again with the next kind of structure.

- `finetuning_stage`: a CLIP that was fine-tuned on the task; the vision or the text tower or both.
- `pretraining_stage`: a zero-shot CLIP; both towers, width and depth in turn, then distillation on
  pairs of images and texts.

Source: Lin et al., MoPE-CLIP, CVPR 2024 (2403.07839).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from vlprune.dissect import dissect
from vlprune.pipeline import plan, prune, score
from vlprune.plan import Plan
from vlprune.recipes._stages import Outcome
from vlprune.tasks.retrieval import Retrieval

Recover = Callable[[nn.Module, nn.Module], nn.Module]  # (student, teacher) -> student

WIDTH, DEPTH, ALL = ("head", "ffn"), ("layer",), ("head", "ffn", "layer")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One round of scoring, planning and cutting.

    Attributes:
        strategies: what may go: `WIDTH`, `DEPTH`, or `ALL` for one ranking of both.
        keep: share that stays of the parameters that these strategies could remove now.
        towers: "vision", "text"; all where empty.
    """

    strategies: tuple[str, ...]
    keep: float
    towers: tuple[str, ...] = ()


def finetuning_stage(
    model: nn.Module,
    task: Retrieval,
    *,
    width: float = 0.6,
    depth: float = 0.8,
    towers: tuple[str, ...] = ("vision", "text"),
    recover: Recover | None = None,
    **settings: Any,
) -> Outcome:
    """Return `model` without (1 - width) of its heads and neurons, then of its layers.

    Layers are scored again on the model that lost its width and was distilled.

    Args:
        model: fine-tuned on the task; the teacher, left as it was.
        task: retrieval on held-out pairs, to score on.
        width: share of the parameters of heads and neurons that stays.
        depth: share of the parameters of layers that stays then.
        towers: which lose anything.
        recover: trains a cut model from the teacher, for instance `recover.distil.distil` with
            its task bound; None leaves models as cut.
        settings: of the metric mope (measure, nested, num_groups, rewire, store, ...).
    """
    steps = (
        Step(strategies=WIDTH, keep=width, towers=towers),
        Step(strategies=DEPTH, keep=depth, towers=towers),
    )
    return run(model, task, steps, recover=recover, **settings)


def pretraining_stage(
    model: nn.Module,
    task: Retrieval,
    *,
    width: float = 0.6,
    depth: float = 0.8,
    rounds: int = 2,
    recover: Recover | None = None,
    **settings: Any,
) -> Outcome:
    """Return a zero-shot CLIP cut in both towers, width and depth in turn, distilled at the end.

    Args:
        model: zero-shot; the teacher, left as it was.
        task: retrieval on pairs, to score on.
        width: share of the parameters of heads and neurons that stays in the end; every round
            keeps the `rounds`-th root of it.
        depth: the same of layers.
        rounds: how often width and depth take turns.
        recover: trains the cut model from the teacher, once, after the last cut.
        settings: of the metric mope.
    """
    keep = {WIDTH: width ** (1 / rounds), DEPTH: depth ** (1 / rounds)}
    steps = [Step(strategies=kinds, keep=keep[kinds]) for _ in range(rounds) for kinds in keep]
    return run(model, task, steps, recover=recover, recover_each=False, **settings)


def run(
    model: nn.Module,
    task: Retrieval,
    steps: Sequence[Step],
    *,
    recover: Recover | None = None,
    recover_each: bool = True,
    allocation: str = "global",
    least_layers: int = 1,
    **settings: Any,
) -> Outcome:
    """Return what is left after all steps; the two stages are this with steps of their own.

    "Depth then width" is the same steps in another order, "one shot" one step of `ALL`.

    Args:
        model: left as it was.
        task: to score on.
        steps: in order.
        recover: trains a cut model from the first one.
        recover_each: after every step, or after the last one only.
        allocation: how each step's budget is spread.
        least_layers: so many layers of a stack stay (and units of the other axes in that step).
        settings: of the metric mope.
    """
    small = model
    plans: list[Plan] = []
    for number, step in enumerate(steps):
        anatomy = dissect(small, task.example_inputs(small)).select(step.strategies, step.towers)
        scores = score(small, "mope", task, anatomy=anatomy, strategies=step.strategies, **settings)
        chosen = plan(
            scores,
            {"prunable_params": step.keep},
            allocation,
            min_units=least_layers if "layer" in step.strategies else 0,
        )
        small = prune(small, chosen, task.example_inputs(small))
        plans.append(chosen)
        if recover is not None and (recover_each or number == len(steps) - 1):
            small = recover(small, model)
    return Outcome(model=small, plans=tuple(plans))
