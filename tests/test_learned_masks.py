"""Masks that are learnt: what is searched is what is cut, whatever loop they are learnt in."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import zoo
from conftest import dissected, on_two_ranks, random_keep
from torch import Tensor, nn

import vlprune
from vlprune.calls import calls_of, run, tensors_of
from vlprune.copies import clone
from vlprune.cost import count_params
from vlprune.dissect import default_inputs
from vlprune.errors import UnsupportedModelError
from vlprune.expected import ExpectedCost
from vlprune.law import relative_error
from vlprune.metrics import HardConcrete, UPop
from vlprune.metrics.hard_concrete import stretched
from vlprune.metrics.upop import shrinkage
from vlprune.recover.finetune import Training, fit
from vlprune.recover.listening import listening_to_outputs

DRAW = torch.Generator().manual_seed(0)
X = torch.randn(32, 3, 32, 32, generator=DRAW)
Y = torch.randint(10, (32,), generator=DRAW)
BATCHES = [(X[i : i + 8], Y[i : i + 8]) for i in range(0, 32, 8)]


def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def any_loss(model: nn.Module, inputs: Any) -> Tensor:
    found = [t for call in calls_of(inputs) for t in tensors_of(run(model, call))]
    return sum(t.square().mean() for t in found if t.is_floating_point())


def search(model: nn.Module, masks: Any, steps: int, first: int = 0) -> None:
    """Train and search with an ordinary optimiser."""
    optimiser = torch.optim.SGD(model.parameters(), lr=1e-3)
    for step in range(first, steps):
        loss(model, BATCHES[step % 4]).backward()
        masks.update()
        optimiser.step()
        optimiser.zero_grad()
        masks.step()


@pytest.mark.parametrize("units", ["cost", "paper", "hard_concrete"])
@pytest.mark.parametrize("name", ["open_clip", "deit", "BlipForQuestionAnswering"])
def test_the_searched_model_is_the_cut_model(name: str, units: str) -> None:
    original, anatomy = dissected(name)
    model = clone(original).double()
    inputs = default_inputs(model, batch=4)
    inputs = [type(c)(*_double((c.args, c.kwargs))) for c in calls_of(inputs)]
    budget = {"params": 0.75}
    masks: Any
    if units == "hard_concrete":
        masks = HardConcrete(model, anatomy, budget=budget, steps=6, lr=0.5)
    else:
        masks = UPop(model, anatomy, budget=budget, steps=6, interval=2, units=units)
    optimiser = torch.optim.SGD(model.parameters(), lr=1e-3)
    with masks:
        for _ in range(6):
            any_loss(model, inputs).backward()
            masks.update()
            optimiser.step()
            optimiser.zero_grad()
            masks.step()
        values = torch.cat(list(masks.gates.values.values()))
        assert set(values.tolist()) == {0.0, 1.0}
        with torch.no_grad():
            searched = [t for call in calls_of(inputs) for t in tensors_of(run(model, call))]
    plan = masks.plan()
    small = vlprune.prune(model, plan, inputs, verify=False)
    with torch.no_grad():
        cut = [t for call in calls_of(inputs) for t in tensors_of(run(small, call))]
    errors = [relative_error(a, b) for a, b in zip(searched, cut, strict=True)]
    assert max(errors) <= 1e-9
    assert count_params(small) == plan.planned.params <= 0.75 * count_params(model)


def _double(value: Any) -> Any:
    return vlprune.calls.map_tensors(value, lambda t: t.double() if t.is_floating_point() else t)


@torch.no_grad()
def test_the_bias_of_a_fused_layer_and_the_softmax_scale_outlive_the_cut() -> None:
    """Both are lost in the authors' code; either loss would show here."""
    model, anatomy = dissected("deit")
    masks = UPop(model, anatomy, budget={"params": 0.6}, steps=1, units="paper")
    with masks, torch.enable_grad():
        loss(model, BATCHES[0]).backward()
        masks.update()
        masks.step()
    model.zero_grad()
    (images, _), plan = BATCHES[0], masks.plan()
    small = vlprune.prune(model, plan).double()
    with vlprune.mask(clone(model).double(), plan) as masked:
        expected = masked(images.double())
    assert relative_error(small(images.double()), expected) <= 1e-9

    for block, before in zip(small.blocks, model.blocks, strict=True):
        attention, old = block.attn, before.attn
        rows = attention.qkv.weight.shape[0]
        assert rows < old.qkv.weight.shape[0]
        assert attention.qkv.bias.shape == (rows,)
        assert set(attention.qkv.bias.tolist()) <= set(old.qkv.bias.double().tolist())
        assert attention.scale == old.scale == 16**-0.5
    for fault in (
        lambda attention: attention.qkv.bias.zero_(),
        lambda attention: setattr(attention, "scale", (attention.qkv.weight.shape[0] / 9) ** -0.5),
    ):
        faulty = clone(small)
        fault(faulty.blocks[0].attn)
        assert relative_error(faulty(images.double()), expected) > 1e-6


def test_masks_shrink_as_the_paper_says() -> None:
    shares = [shrinkage(t, 1000) for t in (0, 100, 250, 500, 750, 900, 1000)]
    assert shares == pytest.approx([0, 0.156, 0.383, 0.707, 0.924, 0.988, 1], abs=6e-4)
    original, anatomy = dissected("deit")
    model = clone(original)
    with UPop(
        model,
        anatomy,
        budget={"params": 0.6},
        steps=8,
        interval=2,
        strategies=("head", "ffn"),  # a mask of dimensions is squared on queries and keys
    ) as masks:
        search(model, masks, 4)
        values = torch.cat(list(masks.gates.values.values()))
        assert sorted(set(values.tolist())) == pytest.approx([1 - math.sqrt(0.5), 1.0])
        with pytest.raises(RuntimeError, match="plan must come after all 8 steps"):
            masks.plan()


def test_sums_are_gradients_of_gates_and_the_order_is_the_authors() -> None:
    model, anatomy = dissected("deit")
    total: dict[str, Tensor] = {}
    for batch in BATCHES:
        with vlprune.Gates(model, anatomy.select(("head_dim", "ffn")).axes) as gates:
            gates.values = {n: g.clone().requires_grad_() for n, g in gates.values.items()}
            loss(model, batch).backward()
            for name, gate in gates.values.items():
                total[name] = total.get(name, 0) + gate.grad
    model.zero_grad(set_to_none=True)
    masks = UPop(model, anatomy, ratio=0.5, steps=4, interval=4, units="paper")
    with masks:
        for batch in BATCHES:
            loss(model, batch).backward()
            masks.update()
            masks.step()
    model.zero_grad(set_to_none=True)
    rows, owners, weights, scores = [], [], [], []
    for kind, weight in (("head_dim", 36.0), ("ffn", 1.0)):
        if kind == "head_dim":  # queries and keys carry the mask each
            paths = [n.removesuffix(".v") for n in total if n.endswith("head_dim.v")]
            sums = {p: 2 * total[f"{p}.qk"] + total[f"{p}.v"] for p in paths}
        else:
            sums = {n: row for n, row in total.items() if n.endswith(":ffn")}
        every = torch.cat(list(sums.values())).double()
        for name, row in sums.items():
            rows += [(name, unit) for unit in range(len(row))]
            owners += [name] * len(row)
            weights += [weight] * len(row)
            scores += ((row.double() - every.mean()) / every.std(correction=0)).tolist()
    order = sorted(range(len(rows)), key=lambda i: -scores[i])
    lowest = {
        n: min((i for i, o in enumerate(owners) if o == n), key=lambda i: scores[i]) for n in owners
    }
    order = [i for i in order if i != lowest[owners[i]]]
    reached, count = 0.0, 0
    while reached + weights[order[count]] / 2 < 0.5 * sum(weights):
        reached += weights[order[count]]
        count += 1
    gone = {rows[i] for i in order[:count]}
    plan = masks.plan()
    found = {
        (row.axis.name.removesuffix(".qk").removesuffix(".v"), unit)
        for row in plan.rows
        for unit in row.removed
    }
    assert found == gone
    assert all(len(row.keep) >= 1 for row in plan.rows)


def test_accumulation_and_one_batch_search_alike() -> None:
    original, anatomy = dissected("deit")
    plans, sums = [], []
    for parts in (1, 4):
        model = clone(original)
        with UPop(model, anatomy, budget={"params": 0.6}, steps=4, interval=2) as masks:
            optimiser = torch.optim.SGD(model.parameters(), lr=1e-2)
            for x, y in BATCHES:
                for image, label in zip(x.chunk(parts), y.chunk(parts), strict=True):
                    (loss(model, (image, label)) / parts).backward()
                    masks.update()
                optimiser.step()
                optimiser.zero_grad()
                masks.step()
        plans.append(masks.plan().digest)
        sums.append(torch.cat(list(masks._sums.values())))
    torch.testing.assert_close(sums[0], sums[1], rtol=1e-3, atol=1e-5)
    assert plans[0] == plans[1]


@pytest.mark.parametrize("kind", [UPop, HardConcrete])
def test_a_search_goes_on_bit_equal(kind: Any) -> None:
    original, anatomy = dissected("deit")
    whole = clone(original)
    with kind(whole, anatomy, budget={"params": 0.6}, steps=8) as masks:
        search(whole, masks, 8)
    begun = clone(original)
    with kind(begun, anatomy, budget={"params": 0.6}, steps=8) as first:
        search(begun, first, 3)
        state = first.state_dict()
    with kind(begun, anatomy, budget={"params": 0.6}, steps=8) as second:
        second.load_state_dict(state)
        search(begun, second, 8, first=3)
    assert second.plan() == masks.plan()
    assert second.compute() == masks.compute()
    assert all(
        torch.equal(a, b) for a, b in zip(whole.parameters(), begun.parameters(), strict=True)
    )


def test_fit_moves_masks_along() -> None:
    original, anatomy = dissected("deit")
    model = clone(original)
    with UPop(model, anatomy, budget={"params": 0.6}, steps=4, interval=2) as masks:
        fit(model, loss, BATCHES, Training(steps=4, accumulate=2, lr=1e-4), masks=masks)
    assert masks.is_done
    assert masks._count == 8


RANKS = """
import sys, torch
sys.path.insert(0, sys.argv[2])
from test_learned_masks import BATCHES, HardConcrete, Training, UPop, fit, half_plan, loss
import torch.distributed as dist
for kind in (UPop, HardConcrete):
    masks, model = half_plan(kind)
    rank = dist.get_rank() if dist.is_initialized() else 0
    torch.save(masks.state_dict(), f"{sys.argv[1]}/{kind.__name__}{rank}.pt")
    open(f"{sys.argv[1]}/{kind.__name__}{rank}.txt", "w").write(masks.plan().digest)
dist.destroy_process_group()
"""


def half_plan(kind: Any, accumulate: int = 1) -> tuple[Any, nn.Module]:
    """Masks that have searched for eight steps of `accumulate` batches in every process."""
    original, anatomy = dissected("deit")
    model = clone(original)
    options = {"interval": 2} if kind is UPop else {"lr": 0.3}
    with kind(model, anatomy, budget={"params": 0.6}, steps=8, **options) as masks:
        training = Training(steps=8, lr=1e-3, accumulate=accumulate)
        fit(model, loss, BATCHES, training, masks=masks)
    return masks, model


def test_two_ranks_learn_the_masks_of_one_with_the_same_global_batch(tmp_path: Path) -> None:
    on_two_ranks(RANKS, tmp_path)
    for kind in (UPop, HardConcrete):
        one, two = (torch.load(tmp_path / f"{kind.__name__}{rank}.pt") for rank in (0, 1))
        assert _equal(one, two)
        alone, _ = half_plan(kind, accumulate=2)
        digest = alone.plan().digest
        assert {(tmp_path / f"{kind.__name__}{r}.txt").read_text() for r in (0, 1)} == {digest}
        row = "sums" if kind is UPop else "log_alpha"
        for name, value in alone.state_dict()[row].items():
            torch.testing.assert_close(one[row][name], value, rtol=1e-3, atol=1e-5)


def _equal(one: Any, two: Any) -> bool:
    if isinstance(one, Tensor):
        return torch.equal(one, two)
    if isinstance(one, dict):
        return one.keys() == two.keys() and all(_equal(one[key], two[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(two) and all(map(_equal, one, two))
    return bool(one == two)


def test_autocast_adds_up_all_steps_as_float32_does() -> None:
    """In the authors' code half precision leaves the last batch's gradient alone."""
    original, anatomy = dissected("deit")
    sums: dict[str, Tensor] = {}
    for precision in ("float32", "bf16"):
        model = clone(original)
        with UPop(model, anatomy) as masks:
            training = Training(steps=4, lr=1e-5, precision=precision)  # type: ignore[arg-type]
            fit(model, loss, BATCHES, training, masks=masks)
        sums[precision] = torch.cat(list(masks._sums.values()))
    model = clone(original)
    with UPop(model, anatomy) as masks:
        loss(model, BATCHES[-1]).backward()
        masks.update()
        masks.step()
    last = torch.cat(list(masks._sums.values()))

    def alike(a: Tensor, b: Tensor) -> float:
        return float(F.cosine_similarity(a, b, dim=0))

    assert alike(sums["float32"], sums["bf16"]) > 0.99
    assert alike(sums["float32"], last) < 0.9
    plans = []
    for precision in ("float32", "bf16"):
        model = clone(original)
        with UPop(model, anatomy, budget={"params": 0.6}, steps=8, interval=2) as masks:
            training = Training(steps=8, lr=1e-4, precision=precision)  # type: ignore[arg-type]
            fit(model, loss, BATCHES, training, masks=masks)
        plans.append(masks.plan().keep)
    one, other = ({(name, u) for name, row in plan.items() for u in row} for plan in plans)
    assert len(one ^ other) <= 0.05 * len(one)  # units whose sums rounding tells apart


def test_compiled_models_are_refused_and_attached_ones_compile() -> None:
    original, anatomy = dissected("deit")
    model = clone(original)
    compiled = torch.compile(model, backend="eager")
    with pytest.raises(UnsupportedModelError, match=r"attached before torch\.compile"):
        UPop(compiled, anatomy)
    plain, inside = clone(original), clone(original)
    with UPop(plain, anatomy) as one, UPop(inside, anatomy) as other:
        fast = torch.compile(inside, backend="aot_eager")
        for batch in BATCHES[:2]:  # the second with masks that are no longer all ones
            for masks, net in ((one, plain), (other, fast)):
                loss(net, batch).backward()
                masks.update()
                masks.step()
                for gate in masks.gates.values.values():
                    with torch.no_grad():
                        gate.copy_(torch.linspace(0.2, 1.0, len(gate)))
    for name, row in one._sums.items():
        assert float(row.abs().max()) > 0
        torch.testing.assert_close(other._sums[name], row, rtol=1e-3, atol=1e-6)


def test_the_mask_of_each_fusion_layer_acts_on_that_layer() -> None:
    """In the authors' code the masks of text layers act there, and the last have no gradient."""
    original, anatomy = dissected("BlipForQuestionAnswering")
    model, crosses = clone(original), [a for a in anatomy.axes if a.tower == "fusion"]
    crosses = [axis for axis in crosses if axis.kind == "head"]
    inputs = calls_of(default_inputs(model, batch=2))
    assert len(crosses) == 2
    with HardConcrete(model, anatomy, budget={"prunable_params": 0.7}, steps=4) as masks:
        for axis in crosses:
            for gate in masks.gates.values.values():
                with torch.no_grad():
                    gate.fill_(1)
            open_ = _answers(model, crosses, inputs)
            with torch.no_grad():
                masks.gates.values[axis.name][1] = 0
            closed = _answers(model, crosses, inputs)
            same = [torch.equal(a, b) for a, b in zip(open_, closed, strict=True)]
            assert same == [other.depth < axis.depth for other in crosses]
        for gate in masks.gates.values.values():
            with torch.no_grad():
                gate.fill_(1)
        any_loss(model, list(inputs)).backward()
        for axis in crosses:
            assert float(masks.gates.values[axis.name].grad.abs().min()) > 0


def _answers(model: nn.Module, axes: list[Any], inputs: Any) -> list[Tensor]:
    """What the attentions of axes answer, with their output projections."""
    paths = [axis.path.rpartition(".")[0] for axis in axes]
    with torch.no_grad(), listening_to_outputs(model, paths) as heard:
        for call in inputs:
            run(model, call)
    return [heard[path][0] for path in paths]


@pytest.mark.parametrize("name", list(zoo.MAKERS))
def test_expected_cost_of_what_is_sure_is_its_price(name: str) -> None:
    _, anatomy = dissected(name)
    expected = ExpectedCost(anatomy)
    for seed in range(3):
        keep = random_keep(anatomy, seed)
        stay = {
            axis.name: torch.tensor([float(u in keep[axis.name]) for u in range(axis.units)])
            for axis in anatomy.axes
        }
        cost, price = expected(stay), vlprune.price(anatomy, keep)
        assert float(cost["params"]) == pytest.approx(price.params, abs=0.5)
        assert float(cost["macs"]) == pytest.approx(price.macs, abs=len(anatomy.operations))


def test_expected_cost_is_the_mean_over_draws() -> None:
    _, anatomy = dissected("deit")
    anatomy = anatomy.select(("head", "ffn", "layer"))
    draw = torch.Generator().manual_seed(0)
    stay = {a.name: torch.rand(a.units, generator=draw) for a in anatomy.axes}
    prices = []
    for _ in range(400):
        keep = {
            n: tuple((torch.rand(len(p), generator=draw) < p).nonzero().flatten().tolist())
            for n, p in stay.items()
        }
        prices.append(vlprune.price(anatomy, keep).params)
    mean = torch.tensor(prices, dtype=torch.float64)
    error = float(mean.std()) / 20
    assert abs(float(ExpectedCost(anatomy)(stay)["params"]) - float(mean.mean())) < 4 * error


def test_a_hard_concrete_mask_stays_with_its_probability() -> None:
    draw = torch.Generator().manual_seed(0)
    for log_alpha in (-2.0, 0.0, 1.5):
        noise = torch.rand(200_000, generator=draw).clamp(1e-6, 1 - 1e-6)
        share = float((stretched(torch.full_like(noise, log_alpha), noise) > 0).double().mean())
        exact = 1 / (1 + math.exp(-(log_alpha - 2 / 3 * math.log(0.1 / 1.1))))
        assert share == pytest.approx(exact, abs=4e-3)
    assert 1 / (1 + math.exp(2 / 3 * math.log(0.1 / 1.1))) == pytest.approx(0.832, abs=1e-3)


def test_hard_concrete_masks_reach_their_target_and_say_where_they_are() -> None:
    original, anatomy = dissected("deit")
    model = clone(original)
    masks = HardConcrete(model, anatomy, budget={"prunable_params": 0.6}, steps=60, lr=0.2)
    with masks:
        search(model, masks, 59)
        assert masks.removed()["params"] == pytest.approx(0.4, abs=0.2)
        before = {name: gate.detach().clone() for name, gate in masks.gates.values.items()}
        with masks.deterministic():
            for name, stay in masks.probabilities().items():
                gate = masks.gates.values[name].detach()
                assert set(gate.tolist()) <= {0.0, 1.0}
                expected = float(stay.detach().sum())
                assert float(gate.sum()) == len(stay) - round(len(stay) - expected)
        assert all(torch.equal(before[n], g.detach()) for n, g in masks.gates.values.items())
        search(model, masks, 60, first=59)
    least = vlprune.cost.least_cost(masks.anatomy).params
    limit = least + int(0.6 * (count_params(original) - least))
    largest = max(count_params(original) // 20, 1)
    assert limit - largest < masks.plan().planned.params <= limit


def test_borders_are_told() -> None:
    original, anatomy = dissected("deit")
    model = clone(original)
    with pytest.raises(ValueError, match="a budget or a ratio"):
        UPop(model, anatomy, steps=4)
    with pytest.raises(ValueError, match="steps must be at least 1; got 0 in UPop"):
        UPop(model, anatomy, budget={"params": 0.5}, steps=0)
    with UPop(model, anatomy) as masks:
        with pytest.raises(RuntimeError, match=r"UPop\.update must follow loss\.backward"):
            masks.update()
        (loss(model, BATCHES[0]) * float("nan")).backward()
        with pytest.raises(FloatingPointError, match="NaN or infinity at 'blocks"):
            masks.update()
        (loss(model, BATCHES[0]) * float("inf")).backward()
        masks.update(scale=2.0**16)  # an overflow at a scale is left out
        assert masks._count == 0
    other = UPop(model, anatomy, strategies=("layer",))
    with pytest.raises(ValueError, match="state must be of the same axes"):
        other.load_state_dict(masks.state_dict())
