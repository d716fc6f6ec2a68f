"""How sure a measure is: a row of numbers for every example, and the measure of their means.

Resampling the rows gives intervals; resampling several models' rows alike gives intervals of their
differences, which are far narrower. Source: Efron, Bootstrap methods: another look at the
jackknife, 1979.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vlprune.calls import quiet_eval
from vlprune.measures import is_example_task

RESAMPLES = 1000


def _first(means: Tensor) -> Tensor:
    return means[..., 0]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Samples:
    """What a model did on every example.

    Attributes:
        rows: numbers of every example [examples, numbers], float64.
        of_means: from the means of rows [..., numbers] to the measure [...]; by default the first.
    """

    rows: Tensor
    of_means: Callable[[Tensor], Tensor] = _first

    @property
    def value(self) -> float:
        """The measure."""
        return float(self.of_means(self.rows.mean(0)))

    def interval(self, level: float = 0.95, seed: int = 0) -> tuple[float, float]:
        """Return the bootstrap interval of the measure; NaN where there is a single example."""
        return _percentiles(self.drawn(seed), level, len(self.rows))

    def drawn(self, seed: int) -> Tensor:
        """Return the measure of every resample [resamples]."""
        counts = resampling_counts(len(self.rows), seed)
        return self.of_means(counts @ self.rows / len(self.rows))


def _percentiles(drawn: Tensor, level: float, examples: int) -> tuple[float, float]:
    if examples < 2:
        return float("nan"), float("nan")
    tail = (1 - level) / 2
    low, high = drawn.quantile(torch.tensor([tail, 1 - tail], dtype=drawn.dtype)).tolist()
    return low, high


def differences(
    samples: Sequence[Samples], level: float = 0.95, seed: int = 0
) -> dict[tuple[int, int], tuple[float, float, float]]:
    """Return of all pairs (i, j) measure i minus measure j, and an interval around it.

    Examples are resampled alike for all. The intervals hold together, for all pairs at once, with
    probability `level`: each is as many standard errors wide as the largest deviation of any pair
    needs.

    Raises:
        ValueError: if they are not of the same examples.

    Source: Westfall and Young, Resampling-based multiple testing, 1993 (single-step max-T).
    """
    if len({len(one.rows) for one in samples}) > 1:
        raise ValueError(
            f"samples must be of the same examples; got {[len(one.rows) for one in samples]} "
            "examples. Measure all on one task."
        )
    pairs = list(itertools.combinations(range(len(samples)), 2))
    if not pairs or len(samples[0].rows) < 2:
        return {}
    drawn = torch.stack([one.drawn(seed) for one in samples])  # [models, resamples]
    values = torch.tensor([one.value for one in samples], dtype=drawn.dtype)
    first, second = torch.tensor(pairs).T
    found = values[first] - values[second]  # [pairs]
    deviations = drawn[first] - drawn[second] - found[:, None]
    errors = deviations.std(1)
    largest = (deviations.abs() / errors.clamp(min=1e-12)[:, None]).amax(0)  # of any pair
    half = largest.quantile(level) * errors
    rows = torch.stack([found, found - half, found + half], dim=1).tolist()
    return {pair: (row[0], row[1], row[2]) for pair, row in zip(pairs, rows, strict=True)}


@functools.lru_cache(maxsize=2)
def resampling_counts(examples: int, seed: int) -> Tensor:
    """Return how often every example is in every resample [resamples, examples], float64."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(examples, (RESAMPLES, examples), generator=generator)
    counts = torch.zeros(RESAMPLES, examples, dtype=torch.float64)
    return counts.scatter_add_(1, drawn, torch.ones_like(drawn, dtype=torch.float64))


def samples_of(task: Any, model: nn.Module) -> Samples:
    """Return what `model` does on every example of a task.

    A task may offer `samples(model)` itself. One that values every example (`measures.ExampleTask`)
    is asked for all outputs, then for their values. Of any other the measure alone is known: one
    row, and no interval.
    """
    if callable(getattr(task, "samples", None)):
        found: Samples = task.samples(model)
        return found
    if not is_example_task(task):
        return Samples(rows=torch.tensor([[task.measure(model)]], dtype=torch.float64))
    with torch.no_grad(), quiet_eval(model):
        parts = [(task.outputs(model, batch), task.targets(batch)) for batch in task.batches()]
        outputs = tuple(map(torch.cat, zip(*(out for out, _ in parts), strict=True)))
        values = task.values(outputs, torch.cat([targets for _, targets in parts]))
    return Samples(rows=values.double().cpu()[:, None])
