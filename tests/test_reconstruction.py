"""Reconstruction: errors are those that least squares leave, whichever way a unit is laid out."""

import pytest
import torch
from conftest import dissected
from torch import Tensor, nn

import vlprune
from vlprune.metrics.reconstruction import _left_by_each
from vlprune.tasks import CallableTask, Retrieval

DRAW = torch.Generator().manual_seed(0)


def left(x: Tensor, target: Tensor, kept: list[int], ridge: float) -> float:
    """The squared error per row of predicting targets from the kept features, by definition."""
    x, target = x - x.mean(0), target - target.mean(0)
    rows = x.T @ x / len(x)
    rows = rows + ridge * torch.eye(len(rows), dtype=x.dtype)
    part = rows[kept][:, kept]
    weight = torch.linalg.solve(part, rows[kept] @ torch.linalg.lstsq(x, target).solution)
    whole = torch.linalg.lstsq(x, target).solution
    change = whole.clone()
    change[kept] -= weight
    return float((change.T @ rows @ change).trace())


@pytest.mark.parametrize("size", [1, 3])
def test_units_go_by_what_least_squares_cannot_make_up_for(size: int) -> None:
    features = 12
    x = torch.randn(300, features, generator=DRAW, dtype=torch.float64)
    x = x @ torch.randn(features, features, generator=DRAW, dtype=torch.float64)
    weight = torch.randn(5, features, generator=DRAW, dtype=torch.float64)
    target = x @ weight.T
    centred = x - x.mean(0)
    covariance = centred.T @ centred / len(x)
    inverse = torch.linalg.inv(covariance + 0.01 * torch.eye(features, dtype=torch.float64))
    index = torch.arange(features).reshape(size, -1).T  # a unit's features lie apart
    errors = _left_by_each([(inverse, weight)], index)
    gone: list[int] = []
    for unit in errors.argsort(stable=True).tolist():
        others = [u for u in range(len(index)) if u not in gone]
        added = {}
        for other in others:
            kept = [f for u in others if u != other for f in index[u].tolist()]
            without = [f for u in others for f in index[u].tolist()]
            added[other] = left(x, target, kept, 0.01) - left(x, target, without, 0.01)
        assert unit == min(added, key=lambda u: added[u])  # greedy
        gone.append(unit)
        assert float(errors[unit]) >= added[unit] * (1 - 1e-6)
    first = errors.argmin()
    kept = [f for u in range(len(index)) if u != first for f in index[u].tolist()]
    assert float(errors.min()) == pytest.approx(left(x, target, kept, 0.01), rel=1e-6)


def test_a_copy_is_worth_nothing_and_what_no_output_feels_neither() -> None:
    model, anatomy = dissected("open_clip")
    model = __import__("copy").deepcopy(model)
    (axis,) = (a for a in anatomy.axes if a.name == "visual.transformer.resblocks.1.mlp:ffn")
    block = model.visual.transformer.resblocks[1].mlp
    with torch.no_grad():
        block.c_fc.weight[5], block.c_fc.bias[5] = block.c_fc.weight[3], block.c_fc.bias[3]
    images = torch.randn(64, 3, 32, 32, generator=DRAW)
    texts = torch.randint(1, 40, (64, 12), generator=DRAW)
    texts[:, 8], texts[:, 9:] = 49, 0
    task = Retrieval([(images[i : i + 16], texts[i : i + 16]) for i in range(0, 64, 16)])
    scores = vlprune.score(
        model, "reconstruction", task, anatomy=anatomy, strategies=("head", "ffn"), ridge=1e-6
    )
    row = torch.tensor(scores.values[axis.name])
    assert min(row[3], row[5]) < 1e-3 * row.median()
    blind = CallableTask(list(task.batches()), lambda m, b: m.encode_text(b[1]).square().mean())
    scores = vlprune.score(
        model, "reconstruction", blind, anatomy=anatomy, strategies=("head", "ffn", "layer")
    )
    for axis in scores.anatomy.axes:
        largest = max(scores.values[axis.name])
        assert largest == 0 if axis.tower == "vision" else largest > 0


def test_a_layer_is_worth_what_a_constant_leaves() -> None:
    model, anatomy = dissected("deit")
    images = torch.randn(8, 3, 32, 32, generator=DRAW)
    task = CallableTask([images[:4], images[4:]], lambda m, x: m(x).square().mean())
    scores = vlprune.score(
        model, "reconstruction", task, anatomy=anatomy, strategies=("layer",), sensitivity=False
    )
    added: list[Tensor] = []
    block: nn.Module = model.blocks[1]
    with torch.no_grad():
        handle = block.register_forward_hook(lambda m, args, out: added.append(out - args[0]))
        model(images)
        handle.remove()
    rows = added[0].flatten(0, -2).double()
    expected = float((rows - rows.mean(0)).square().sum()) / len(images)
    assert scores.values["blocks:layer"][1] == pytest.approx(expected, rel=1e-4)
