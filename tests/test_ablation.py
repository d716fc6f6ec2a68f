"""The ablation engine: equal to the plain loop, and never computing what cannot change."""

import json
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import zoo
from conftest import dissected
from test_experts import Town
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

import vlprune
from vlprune.ablation.batch import Ablations
from vlprune.ablation.engine import Effects, Engine, State
from vlprune.ablation.intervals import bootstrap
from vlprune.ablation.removals import Removal, block_of, groups_of
from vlprune.ablation.sequential import Adaptive
from vlprune.ablation.store import Store, key_of
from vlprune.calls import calls_of, run, tensors_of
from vlprune.dissect import default_inputs
from vlprune.measures import MEASURES
from vlprune.metrics.mope import Mope
from vlprune.tasks import CallableTask, Retrieval
from vlprune.zoo.check import redraw

DRAW = torch.Generator().manual_seed(0)
IMAGES = torch.randn(24, 3, 32, 32, generator=DRAW)
TEXTS = torch.randint(1, 40, (24, 12), generator=DRAW)


def pairs(end: int = 49, size: int = 8) -> list[tuple[Tensor, Tensor]]:
    """Pairs whose captions end early: `end` closes them, padding follows."""
    texts = TEXTS.clone()
    texts[:, 8] = end
    texts[:, 9:] = 0 if end == 49 else end
    return [(IMAGES[i : i + size], texts[i : i + size]) for i in range(0, len(IMAGES), size)]


def task_of(name: str) -> Retrieval | CallableTask:
    """A task for a tiny model: retrieval for dual encoders, any loss of the outputs for others."""
    if name in ("open_clip", "hf_clip"):
        return Retrieval(pairs(49 if name == "open_clip" else 59))
    model, _ = dissected(name)

    def loss(model: nn.Module, inputs: object) -> Tensor:
        parts = [t for call in calls_of(inputs) for t in tensors_of(run(model, call))]
        return sum(t.square().mean() for t in parts if t.is_floating_point())

    return CallableTask([default_inputs(model, batch=b) for b in (3, 2)], loss)


def plain(model: nn.Module, anatomy: vlprune.Anatomy, task: object) -> vlprune.Scores:
    """The plain loop: mask, measure everything, unmask."""
    meter = Mope(model, anatomy, strategies=anatomy.kinds, num_groups=4)
    with torch.no_grad():
        meter.update(lambda: task.measure(model))
    return meter.compute()


NAMES = ["open_clip", "hf_clip", "deit", "BlipForImageTextRetrieval", "BlipForQuestionAnswering"]


@pytest.mark.parametrize(
    ("name", "copies"),
    [
        *((n, 1) for n in NAMES[:-2]),
        ("open_clip", 3),
        *(pytest.param(n, 1, marks=pytest.mark.slow) for n in NAMES[-2:]),
    ],
)
def test_the_engine_equals_the_plain_loop(name: str, copies: int) -> None:
    model, anatomy = dissected(name)
    kinds = ("head", "ffn", "layer", "sublayer", "head_dim")
    anatomy = anatomy.select(kinds)
    task = task_of(name)
    expected = plain(model, anatomy, task)
    scores = vlprune.score(
        model, "mope", task, anatomy=anatomy, strategies=kinds, num_groups=4, copies=copies
    )
    scale = abs(task.measure(model))
    for axis in anatomy.axes:
        for one, other in zip(scores.values[axis.name], expected.values[axis.name], strict=True):
            assert one == pytest.approx(other, rel=1e-6, abs=1e-6 * scale), axis.name
    assert any(value != 0 for row in scores.values.values() for value in row)


def test_the_engine_equals_the_plain_loop_on_experts() -> None:
    model = redraw(Town()).eval()
    inputs = [torch.randn(3, 16, 24), torch.randn(2, 16, 24)]
    anatomy = vlprune.dissect(model, inputs[0]).select(("expert", "head", "head_dim_per_head"))
    task = CallableTask(inputs, lambda model, x: model(x).square().mean())
    expected = plain(model, anatomy, task)
    scores = vlprune.score(
        model, "mope", task, anatomy=anatomy, strategies=anatomy.kinds, num_groups=4, copies=2
    )
    scale = abs(task.measure(model))
    for name, row in expected.values.items():
        assert scores.values[name] == pytest.approx(row, rel=1e-6, abs=1e-6 * scale), name


@pytest.mark.parametrize("measure", list(MEASURES))
def test_measures_are_what_they_say(measure: str) -> None:
    model, anatomy = dissected("open_clip")
    anatomy = anatomy.select(("layer",))
    task = Retrieval(pairs())
    scores = vlprune.score(
        model, "mope", task, anatomy=anatomy, strategies=("layer",), measure=measure
    )
    name, unit = "visual.transformer.resblocks:layer", 1
    keep = {name: (0, 2)}
    plan = vlprune.make_plan(anatomy, keep)
    with torch.no_grad():
        dense = [task.outputs(model, batch) for batch in task.batches()]
        with vlprune.mask(model, plan):
            cut = [task.outputs(model, batch) for batch in task.batches()]
    scale = float(model.logit_scale.detach().exp())
    expected = 0.0
    if measure == "task":
        with vlprune.mask(model, plan):
            masked = task.measure(model)
        expected = task.measure(model) - masked
    for (image, text), (image_, text_) in zip(dense, cut, strict=True):
        if measure == "cosine":
            distances = [1 - (a * b).sum(-1) for a, b in ((image, image_), (text, text_))]
            expected += float(torch.stack(distances).mean()) / 3
        before, after = scale * image @ text.T, scale * image_ @ text_.T
        if measure == "kl":
            both = [
                nn.functional.kl_div(y.log_softmax(-1), x.softmax(-1), reduction="batchmean")
                for x, y in ((before, after), (before.T, after.T))
            ]
            expected += float(sum(both)) / 2 / 3
        if measure == "loss":
            target = torch.arange(len(before))
            ce = nn.functional.cross_entropy
            losses = [(ce(x, target) + ce(x.T, target)) / 2 for x in (before, after)]
            expected += float(losses[1] - losses[0]) / 3
    assert scores.values[name][unit] == pytest.approx(expected, rel=2e-4, abs=1e-6)
    low, high = scores.intervals[name][unit]
    assert low <= scores.values[name][unit] <= high
    assert "units are told apart from zero" in str(scores)


class _Products(TorchFunctionMode):
    """Counts multiply-accumulates of linear layers and attentions."""

    def __init__(self) -> None:
        super().__init__()
        self.macs = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if getattr(func, "__name__", "") == "linear":
            self.macs += args[0].numel() * args[1].shape[0]
        return out


def test_only_what_can_change_is_computed() -> None:
    model, anatomy = dissected("open_clip")
    task = Retrieval(pairs())
    (batch, *_) = task.batches()
    axes = {axis.name: axis for axis in anatomy.axes}
    removals = [
        Removal("visual.transformer.resblocks.2.attn:head", (1,)),
        Removal("visual.transformer.resblocks.2.mlp:ffn", tuple(range(16))),
        Removal("transformer.resblocks.1.attn:head", (0,)),
        Removal("visual.transformer.resblocks.0.attn:head", (0,)),
    ]
    with torch.no_grad():
        with _Products() as dense:
            task.outputs(model, batch)
        share = {}
        forward = lambda batch: task.outputs(model, batch)  # noqa: E731
        with Ablations(model, anatomy, removals, forward) as ablations:
            ablations.begin(batch)
            for block, members in ablations.blocks.items():
                list(ablations.of_block(block, members, members))  # what is found out once
                with _Products() as once:  # what all removals of the block share
                    list(ablations.of_block(block, members, members))
                for removal in members:
                    known = [r for r in members if r is not removal]
                    with _Products() as counted:
                        list(ablations.of_block(block, members, known))
                    share[removal] = (counted.macs - once.macs) / dense.macs
            costs = {block: ablations.cost(block) for block in ablations.blocks}
    assert block_of(model, axes[removals[0].axis], 1) == "visual.transformer.resblocks.2"
    head, ffn, text, first = (share[removal] for removal in removals)
    tokens, width = 17, 32  # a block: 3 units for queries, keys, values; 1 and 8 after the heads
    unit = len(batch[0]) * tokens * width**2 / dense.macs
    rest = len(batch[0]) * 2 * width**2 / dense.macs  # both features, projected
    assert head == pytest.approx(9 * unit, abs=2 * rest)
    assert ffn == pytest.approx(4 * unit, abs=2 * rest)
    # block 1 has no gates here: its attention is one fused call, which is not counted
    assert first == pytest.approx((9 + 8 + 12) * unit, abs=2 * rest)
    assert text == pytest.approx(9 * unit * 10 / 17, abs=2 * rest)  # ten of its twelve tokens
    assert costs["visual.transformer.resblocks.0"] > costs["visual.transformer.resblocks.2"] > 0


def test_text_ends_at_its_last_token_only_where_the_model_allows_it() -> None:
    removal = [Removal("transformer.resblocks.1.attn:head", (0,))]
    model, anatomy = dissected("open_clip")
    task = Retrieval(pairs())
    (batch, *_) = task.batches()
    with (
        torch.no_grad(),
        Ablations(model, anatomy, removal, lambda batch: task.outputs(model, batch)) as ablations,
    ):
        ablations.begin(batch)
        assert ablations.trimming.lengths == {"transformer.resblocks": (12, 10)}
    blind = zoo.make("open_clip")
    blind.attn_mask = torch.zeros_like(blind.attn_mask)  # every token sees the padding
    with (
        torch.no_grad(),
        Ablations(
            blind, vlprune.dissect(blind), removal, lambda batch: task.outputs(blind, batch)
        ) as ablations,
    ):
        ablations.begin(batch)
        assert ablations.trimming.lengths == {}


@pytest.mark.parametrize("size", [6, 4, 12])
def test_as_many_examples_as_tokens_confuse_nothing(size: int) -> None:
    model, anatomy = dissected("open_clip")
    anatomy = anatomy.select(("head",))
    task = Retrieval(pairs(size=size))  # 12 tokens; 2 x 6, 3 x 4 and 12 are as many
    expected = plain(model, anatomy, task)
    scores = vlprune.score(
        model, "mope", task, anatomy=anatomy, strategies=("head",), num_groups=4, copies=3
    )
    for name, row in expected.values.items():
        assert scores.values[name] == pytest.approx(row, rel=1e-6, abs=1e-4), name


class _Rough(nn.Module):
    """Blocks that change their inputs in place, a norm over the batch, and two readers."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.act, self.down = nn.Linear(8, 16), nn.ReLU(inplace=True), nn.Linear(16, 8)

        def forward(self, x: Tensor) -> Tensor:
            y = self.down(self.act(self.up(x)))
            y += x
            return y

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([self.Block() for _ in range(3)])
        self.other = nn.ModuleList([self.Block() for _ in range(2)])
        self.read = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        first = x
        for block in self.blocks:
            x = block(x)
        x *= 2
        for block in self.other:
            first = block(first)
        x = x - x.mean(0)  # examples of a batch are not alone
        return self.read(x + first)


@pytest.mark.parametrize("copies", [1, 4])
def test_changes_in_place_and_batches_that_mix_stay_exact(copies: int) -> None:
    torch.manual_seed(0)
    model = _Rough().eval()
    inputs = [torch.randn(5, 8) for _ in range(2)]
    anatomy = vlprune.dissect(model, (inputs[0],)).select(("ffn", "layer"))
    task = CallableTask(inputs, lambda model, x: model(x).square().mean())
    expected = plain(model, anatomy, task)
    scores = vlprune.score(
        model, "mope", task, anatomy=anatomy, strategies=anatomy.kinds, num_groups=4, copies=copies
    )
    scale = abs(task.measure(model))
    for name, row in expected.values.items():
        assert scores.values[name] == pytest.approx(row, rel=1e-6, abs=1e-6 * scale), name


@pytest.mark.parametrize("fault", ["_dependent", "_before_gate"])
def test_a_call_that_is_wrongly_handed_out_is_caught(
    fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, anatomy = dissected("open_clip")
    anatomy = anatomy.select(("head",))
    task = Retrieval(pairs())
    good = vlprune.score(model, "mope", task, anatomy=anatomy, strategies=("head",), measure="kl")
    if fault == "_dependent":
        monkeypatch.setattr(Ablations, fault, lambda self, stack: set())
    else:
        monkeypatch.setattr(Ablations, fault, lambda self, *args: args[-1].hand(args[-1].answers))
        monkeypatch.setattr(Ablations, "_instead", lambda *args: {})
    bad = vlprune.score(model, "mope", task, anatomy=anatomy, strategies=("head",), measure="kl")
    assert bad.values != good.values


def test_nothing_is_left_on_the_model() -> None:
    model, anatomy = dissected("open_clip")
    before = [(dict(vars(m)), len(m._forward_hooks)) for m in model.modules()]
    task = Retrieval(pairs())
    vlprune.score(model, "mope", task, anatomy=anatomy, strategies=("head",))
    assert [(dict(vars(m)), len(m._forward_hooks)) for m in model.modules()] == before


def test_auto_fills_the_device() -> None:
    from vlprune.ablation.engine import _filling

    cpu = torch.device("cpu")
    assert [_filling(cpu, tokens, 0) for tokens in (1, 136, 4_096, 10**6)] == [4_096, 30, 1, 1]
    model, anatomy = dissected("open_clip")
    anatomy = anatomy.select(("head",))
    removals = Mope(model, anatomy, strategies=("head",)).removals()
    engine = Engine(model, Retrieval(pairs()), anatomy, removals, copies="auto", measure="kl")
    auto = engine.run()
    assert engine._ablations.copies == 4_096 // (8 * 17)
    one = Engine(model, Retrieval(pairs()), anatomy, removals, measure="kl").run()
    for removal in removals:
        assert torch.allclose(auto.falls[removal], one.falls[removal], atol=1e-6)


def test_memory_is_bounded_by_passes_and_stated() -> None:
    model, anatomy = dissected("open_clip")
    anatomy = anatomy.select(("head", "layer"))
    task = Retrieval(pairs())
    removals = Mope(model, anatomy, strategies=anatomy.kinds).removals()
    engines = [Engine(model, task, anatomy, removals, memory=m) for m in (2**30, 30_000)]
    one, many = (engine.run() for engine in engines)
    assert engines[1].expected_bytes < engines[0].expected_bytes
    for removal in removals:
        assert torch.equal(one.falls[removal], many.falls[removal])


# -- resume, shards, ranks ------------------------------------------------------------------------

SCRIPT = """
import sys, time, torch, vlprune
sys.path.insert(0, {tests!r})
torch.set_num_threads(1)
from test_ablation import measured
measured({folder!r}, shard={shard}, slow={slow})
"""


def measured(folder: str, shard: tuple[int, int] = (0, 1), slow: float = 0.0) -> Effects:
    """Run the engine on the tiny CLIP with a store."""
    model, anatomy = dissected("open_clip")
    anatomy = anatomy.select(("head", "layer"))
    removals = Mope(model, anatomy, strategies=anatomy.kinds).removals()
    wait = lambda state: time.sleep(slow)  # noqa: E731
    engine = Engine(
        model,
        Retrieval(pairs()),
        anatomy,
        removals,
        store=folder,
        shard=shard,
        copies=2,
        progress=wait,
    )
    return engine.run()


def started(folder: Path, shard: tuple[int, int] = (0, 1), slow: float = 0.0) -> subprocess.Popen:
    tests = str(Path(__file__).parent)
    code = SCRIPT.format(tests=tests, folder=str(folder), shard=shard, slow=slow)
    return subprocess.Popen([sys.executable, "-c", code])


def lines(folder: Path) -> int:
    return sum(len(p.read_bytes().split(b"\n")) - 1 for p in folder.glob("*/*.jsonl"))


@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_a_killed_run_resumes_bit_equal(tmp_path: Path, seed: int) -> None:
    expected = measured(str(tmp_path / "whole"))
    folder, draw = tmp_path / "killed", random.Random(seed)
    for _ in range(2):
        process = started(folder, slow=0.03)
        aim = lines(folder) + draw.randint(1, 20)
        while lines(folder) < aim and process.poll() is None:
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        process.wait()
    kept = lines(folder)
    assert 0 < kept < expected.possible
    again = measured(str(folder))
    pack = 2
    assert again.evaluations <= expected.possible - kept + 2 * pack  # what was in the making
    assert torch.equal(again.dense, expected.dense)
    for removal, falls in expected.falls.items():
        assert torch.equal(again.falls[removal], falls), removal


def test_a_line_that_was_cut_off_is_measured_again(tmp_path: Path) -> None:
    expected = measured(str(tmp_path / "store"))
    (path,) = (tmp_path / "store").glob("*/values-*.jsonl")
    text = path.read_text()
    path.write_text(text[: len(text) // 2])
    again = measured(str(tmp_path / "store"))
    assert 0 < again.evaluations < again.possible
    assert all(torch.equal(again.falls[r], falls) for r, falls in expected.falls.items())


def test_other_weights_data_and_settings_have_other_keys() -> None:
    model, _ = dissected("open_clip")
    batches = pairs()
    key = key_of(model, batches, {"measure": "kl"})
    assert key == key_of(model, pairs(), {"measure": "kl"})
    assert key != key_of(model, batches, {"measure": "task"})
    assert key != key_of(model, batches[::-1], {"measure": "kl"})
    other = zoo.make("open_clip", seed=1)
    assert key != key_of(other, batches, {"measure": "kl"})


def test_shards_share_the_blocks_and_add_up(tmp_path: Path) -> None:
    expected = measured(str(tmp_path / "one"))
    parts = [measured(str(tmp_path / "two"), shard=(i, 2)) for i in range(2)]
    assert all(0 < part.evaluations < expected.possible for part in parts)
    assert sum(part.evaluations for part in parts) == expected.possible
    for removal, falls in expected.falls.items():
        assert torch.equal(parts[1].falls[removal], falls)
    model, anatomy = dissected("open_clip")
    with pytest.warns(UserWarning, match="left to other shards"):
        part = vlprune.score(
            model,
            "mope",
            Retrieval(pairs()),
            anatomy=anatomy,
            strategies=("head",),
            shard=(0, 2),
        )
    assert part.settings["evaluations"] < part.settings["of"]
    with pytest.raises(ValueError, match="index < count"):
        measured(str(tmp_path / "two"), shard=(2, 2))


def test_what_a_dead_process_left_is_picked_up(tmp_path: Path) -> None:
    expected = measured(str(tmp_path / "one"))
    first = measured(str(tmp_path / "two"), shard=(0, 2))
    process = started(tmp_path / "two", shard=(1, 2), slow=0.05)
    before = lines(tmp_path / "two")
    while lines(tmp_path / "two") < before + 3 and process.poll() is None:
        time.sleep(0.002)
    process.kill()
    process.wait()
    rest = measured(str(tmp_path / "two"))
    assert 0 < rest.evaluations < expected.possible - first.evaluations
    assert all(torch.equal(rest.falls[r], falls) for r, falls in expected.falls.items())


ADAPTIVE = (None, {"prunable_params": 0.5})
RANK = """
import sys, torch, torch.distributed as dist
sys.path.insert(0, {tests!r})
torch.set_num_threads(1)
dist.init_process_group("gloo")
import vlprune
from test_ablation import ADAPTIVE, told_plan
for adaptive in ADAPTIVE:
    line = told_plan(adaptive, {folder!r} + str(adaptive))
    with open({folder!r} + f"-said-by-{{dist.get_rank()}}", "a") as said:
        print(line, file=said)
dist.destroy_process_group()
"""


def test_two_ranks_give_the_scores_and_the_plan_of_one(tmp_path: Path) -> None:
    code, folder = tmp_path / "rank.py", str(tmp_path / "store")
    code.write_text(RANK.format(tests=str(Path(__file__).parent), folder=folder))
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    done = subprocess.run([*command, "--standalone", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    said = [Path(f"{folder}-said-by-{rank}").read_text() for rank in range(2)]
    assert said[0] == said[1]
    assert said[0].splitlines() == [told_plan(adaptive) for adaptive in ADAPTIVE]


def told_plan(adaptive: dict[str, float] | None, store: str | None = None) -> str:
    """What a process says of its scores and plan."""
    model, anatomy = dissected("open_clip")
    scores = vlprune.score(
        model,
        "mope",
        Retrieval(pairs()),
        anatomy=anatomy,
        strategies=("head", "layer"),
        store=store,
        measure="kl",
        adaptive=adaptive,
    )
    plan = vlprune.plan(scores, {"prunable_params": 0.5})
    total = sum(map(sum, scores.values.values()))
    return f"{adaptive is None} {plan.digest} {total.hex()}"


# -- statistics -----------------------------------------------------------------------------------


def test_intervals_hold_the_mean_as_often_as_they_say() -> None:
    generator = torch.Generator().manual_seed(0)
    rows = {i: torch.randn(200, generator=generator) + 0.3 for i in range(400)}
    hits = sum(low <= 0.3 <= high for low, high in bootstrap(rows).values())
    assert 0.91 <= hits / 400 <= 0.98
    low, high = bootstrap({0: torch.full((50,), 2.0)})[0]
    assert low == high == 2.0


def test_stopping_early_errs_no_more_often_than_it_says() -> None:
    _, anatomy = dissected("deit")
    anatomy = anatomy.select(("ffn",))
    removals = [
        Removal(axis.name, group)
        for axis in anatomy.axes
        for group in groups_of(torch.arange(axis.units), 16)
    ]
    wrong = settled = spent = 0
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        truth = torch.randn(len(removals), generator=generator)
        noise = torch.randn(len(removals), 512, generator=generator) * 2
        cut = truth.sort().values[len(removals) // 2 - 1 : len(removals) // 2 + 1].mean()
        adaptive = Adaptive(anatomy, {"prunable_params": 0.5}, error_rate=0.05)
        rows = {r: truth[i] + noise[i] for i, r in enumerate(removals)}
        size = dict.fromkeys(removals, 512)
        for look in (16, 32, 64, 128, 256, 512):
            seen = {r: rows[r][: min(look, size[r])] for r in removals}
            for removal in adaptive.decided(seen):
                if size[removal] == 512 and look < 512:
                    size[removal] = look
                    settled += 1
                    i = removals.index(removal)
                    wrong += (truth[i] > cut) != (rows[removal][:look].mean() > cut)
        spent += sum(size.values())
    assert settled > 0.5 * 20 * len(removals)
    assert spent < 0.6 * 20 * len(removals) * 512
    assert wrong <= 0.05 * settled


def test_adaptive_keeps_what_the_exact_engine_keeps() -> None:
    model, anatomy = dissected("open_clip")
    anatomy = anatomy.select(("head", "ffn"))
    task = Retrieval(pairs(size=2))
    budget = {"prunable_params": 0.5}
    settings = {"anatomy": anatomy, "measure": "kl", "num_groups": 4}
    exact = vlprune.score(model, "mope", task, **settings)
    quick = vlprune.score(model, "mope", task, adaptive=budget, **settings)
    assert quick.settings["evaluations"] < exact.settings["evaluations"]
    assert quick.settings["adaptive"] == budget
    names = {r.name for r in Mope(model, anatomy, num_groups=4).removals()}
    assert set(quick.settings["unsure"]) < names
    plans = [vlprune.plan(scores, budget) for scores in (exact, quick)]
    same = units = 0
    for one, other in zip(*(plan.rows for plan in plans), strict=True):
        same += one.axis.units - len(set(one.keep) ^ set(other.keep))
        units += one.axis.units
    assert same / units >= 0.95
    with pytest.raises(ValueError, match="give no shard"):
        vlprune.score(model, "mope", task, adaptive=budget, shard=(0, 2), **settings)


def test_nested_removals_add_up_to_all_that_goes() -> None:
    model, anatomy = dissected("open_clip")
    kinds = ("head", "ffn", "layer", "sublayer")
    anatomy = anatomy.select(kinds)
    task = Retrieval(pairs())
    scores = vlprune.score(
        model, "mope", task, anatomy=anatomy, strategies=kinds, measure="kl", nested=True
    )
    with torch.no_grad():
        dense = [task.outputs(model, batch) for batch in task.batches()]
        measure = MEASURES["kl"](task, model)
        for axis in anatomy.axes:
            with vlprune.Gates(model, [axis]) as gates:
                gates.keep({axis.name: ()})
                values = [
                    measure.value(task.outputs(model, batch), before, batch[1])
                    for batch, before in zip(task.batches(), dense, strict=True)
                ]
            everything = -float(torch.cat(values).mean())
            total = sum(scores.values[axis.name])
            assert total == pytest.approx(everything, rel=1e-3, abs=1e-4), axis.name
    with pytest.raises(ValueError, match="one by one"):
        Mope(model, anatomy, nested=True, adaptive={"params": 0.5})


def test_progress_tells_the_time_left_and_what_is_known() -> None:
    model, anatomy = dissected("open_clip")
    anatomy = anatomy.select(("head",))
    states: list[State] = []
    last: list[vlprune.Scores] = []

    def watch(state: State, scores: Callable[[], vlprune.Scores]) -> None:
        states.append(state)
        last[:] = [scores()]

    meter = Mope(model, anatomy, strategies=("head",), measure="kl", watch=watch)
    meter.update(Retrieval(pairs()))
    assert [state.done for state in states] == list(range(1, states[-1].total + 1))
    assert states[-1].seconds_left == pytest.approx(0, abs=1e-6)
    assert states[3].seconds_left > 0
    assert last[0].values == meter.compute().values


def test_contiguous_groups_come_with_a_warning() -> None:
    model, anatomy = dissected("deit")
    with pytest.warns(UserWarning, match="say little about single neurons"):
        meter = Mope(model, anatomy, rewire="contiguous", num_groups=3)
    groups = [r.units for r in meter.removals() if r.axis == "blocks.0.mlp:ffn"]
    assert groups[0] == tuple(range(64))
    assert groups[2][-1] == 191


def test_stores_name_removals_shortly(tmp_path: Path) -> None:
    assert Removal("a:ffn", (0, 1, 2, 5, 7, 8)).name == "a:ffn/0-2,5,7-8"
    store = Store(tmp_path, "key")
    store.add_part("a", 0, (torch.arange(3.0), None))
    again = Store(tmp_path, "key")
    assert torch.equal(again.parts["a", 0][0], torch.arange(3.0))
    assert again.parts["a", 0][1] is None
    (line,) = [json.loads(t) for p in tmp_path.glob("*/*") for t in p.read_text().splitlines()]
    assert line["batch"] == 0
