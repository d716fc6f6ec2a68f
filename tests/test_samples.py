"""Measures by example: equal to the measure, with intervals that are as sure as they say."""

import math

import pytest
import torch
from torch import nn

import vlprune
from vlprune.samples import Samples, differences, samples_of
from vlprune.shipped import SHIPPED


@pytest.mark.parametrize(
    "name", ["scenes-clip", "scenes-deit", "scenes-segmenter", "scenes-blip-reasoning"]
)
def test_the_value_of_samples_is_the_measure_of_the_task(name: str) -> None:
    task = SHIPPED[name].task("test", 12, 3, 5)
    model = vlprune.create_model(name)
    samples = samples_of(task, model)
    assert len(samples.rows) == 12
    assert samples.value == pytest.approx(task.measure(model), rel=1e-9)
    low, high = samples.interval()
    assert low <= samples.value <= high
    assert (low < high) == (float(samples.rows.std(0).max()) > 0)  # all right: no spread


def test_intervals_hold_the_measure_as_often_as_they_say() -> None:
    draw = torch.Generator().manual_seed(0)
    hits = 0
    for _ in range(400):
        rows = 3 + torch.randn(150, 1, generator=draw, dtype=torch.float64)
        low, high = Samples(rows=rows).interval()
        hits += low <= 3 <= high
    assert 0.92 <= hits / 400 <= 0.98


def test_a_false_difference_in_a_whole_table_is_as_rare_as_it_says() -> None:
    draw = torch.Generator().manual_seed(0)
    false, true = 0, 0
    for _ in range(200):
        base = torch.randn(200, 1, generator=draw, dtype=torch.float64)
        noise = [0.5 * torch.randn(200, 1, generator=draw, dtype=torch.float64) for _ in range(7)]
        rows = [base + part for part in noise[:6]] + [base + 0.3 + noise[6]]  # the last is better
        found = differences([Samples(rows=row) for row in rows])
        alike = [found[pair] for pair in found if 6 not in pair]
        false += any(low > 0 or high < 0 for _, low, high in alike)
        true += sum(high < 0 for pair, (_, _, high) in found.items() if pair[1] == 6)
    assert false / 200 <= 0.09  # 5 %, and two standard errors of 200 tables
    assert true > 0.95 * 200 * 6  # paired, so that the spread of the examples does not hide it


def test_the_difference_of_equal_models_is_zero_and_not_beyond_noise() -> None:
    rows = torch.rand(50, 1, dtype=torch.float64)
    assert differences([Samples(rows=rows), Samples(rows=rows.clone())])[0, 1] == (0, 0, 0)


def test_models_on_other_examples_are_not_compared() -> None:
    both = [Samples(rows=torch.zeros(size, 1, dtype=torch.float64)) for size in (3, 4)]
    with pytest.raises(ValueError, match=r"same examples; got \[3, 4\]"):
        differences(both)


def test_a_task_with_one_number_has_no_interval() -> None:
    class One:
        def measure(self, model: nn.Module) -> float:
            return 7.0

    samples = samples_of(One(), nn.Identity())
    assert samples.value == 7
    assert all(math.isnan(side) for side in samples.interval())
    assert differences([samples, samples]) == {}
