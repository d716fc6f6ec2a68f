"""Files that anyone could have written: a value or one of our errors, and nothing else happens."""

import json
import random
import resource
import sys
import warnings
from pathlib import Path

import pytest
import torch
from fuzzing import feed, forge, guard, mutate, seeds
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import vlprune
from vlprune.bounded import Bounded
from vlprune.errors import CheckpointError, TraceError, UnknownNameError, UnsupportedModelError
from vlprune.layout import resolve
from vlprune.tasks import Classification
from vlprune.trusted import import_trusted

READERS = {  # inputs in the default run, in the slow one
    "scores": (150, 20_000),
    "plan": (150, 20_000),
    "latency": (150, 20_000),
    "store parts": (150, 16_000),
    "store values": (150, 16_000),
    "config.json": (40, 3_000),
    "plan.json": (40, 3_000),
    "model.safetensors": (40, 2_000),
}


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, bytes]]:
    folder = tmp_path_factory.mktemp("fuzz")
    return folder, seeds(folder)


def fuzz(reader: str, count: int, good: tuple[Path, dict[str, bytes]], seed: int) -> None:
    folder, files = good
    draw = random.Random(f"{reader} {seed}")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert feed(reader, files[reader], folder) == "read"
    refused = 0
    for number in range(count):
        data = files[reader]
        for _ in range(draw.choice((1, 1, 1, 2, 4))):
            data = mutate(data, draw)
        try:
            refused += feed(reader, data, folder) != "read"
        except Exception as error:
            raise AssertionError(f"input {number} of {reader}: {data[:2000]!r}") from error
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < 1.5 * 2**20  # kilobytes: the bound on what an original may take, and some
    if not reader.startswith("store"):  # whose bad lines are made again
        assert refused > 0.3 * count


@pytest.mark.parametrize("reader", READERS)
def test_whatever_a_file_holds_is_read_or_refused(
    reader: str, good: tuple[Path, dict[str, bytes]]
) -> None:
    fuzz(reader, READERS[reader][0], good, 0)


@pytest.mark.slow
@pytest.mark.parametrize("reader", READERS)
def test_whatever_a_hundred_thousand_files_hold_is_read_or_refused(
    reader: str, good: tuple[Path, dict[str, bytes]]
) -> None:
    fuzz(reader, READERS[reader][1], good, 1)


def test_the_guard_sees_what_must_not_happen(tmp_path: Path) -> None:
    outside = tmp_path / "outside.txt"
    inside = tmp_path / "inside"
    inside.mkdir()
    with pytest.raises(AssertionError, match=r"outside\.txt"), guard(inside):
        outside.write_text("x")
    with guard(inside):
        (inside / "fine.txt").write_text("x")


@pytest.mark.parametrize("name", ["antigravity:fly", "this:s", "idlelib.run:main"])
def test_a_class_name_in_a_plan_imports_nothing_that_is_not_trusted(
    name: str, good: tuple[Path, dict[str, bytes]]
) -> None:
    folder, files = good
    module = name.partition(":")[0]
    content = json.loads(files["plan.json"])
    for plan in content["plans"]:
        for row in plan["rows"]:
            owner = row["axis"]["gate"]["modules"][0]
            row["axis"]["swaps"] = [{"module": owner, "to": name, "when": "cut"}]
    forge(folder / "model", "plan.json", json.dumps(content).encode())
    with pytest.raises(CheckpointError, match=rf"plan\.json must fit.*{module}"):
        vlprune.from_pretrained(folder / "model")
    assert module not in sys.modules


def test_only_classes_of_modules_are_taken_on() -> None:
    with pytest.raises(UnknownNameError, match="must be a class of torch modules"):
        resolve("torch:save")
    with pytest.raises(UnknownNameError, match="must exist"):
        resolve("torch.nn:Nothing")
    with pytest.raises(UnknownNameError, match="Import it first where you trust it"):
        import_trusted("antigravity")
    assert import_trusted("json") is json  # imported already


def test_an_original_without_bound_is_refused_before_it_is_made(
    good: tuple[Path, dict[str, bytes]],
) -> None:
    folder, files = good
    content = json.loads(files["config.json"])
    content["vlprune"]["source"]["arguments"]["arguments"]["embed_dim"] = 48 * 4096
    forge(folder / "model", "config.json", json.dumps(content).encode())
    with pytest.raises(CheckpointError, match="must fit into 1,073,741,824 bytes; it takes more"):
        vlprune.from_pretrained(folder / "model")


def test_memory_is_counted_before_it_is_taken() -> None:
    with Bounded(4000):
        torch.zeros(500)
        torch.nn.Linear(10, 10)
        with pytest.raises(CheckpointError, match="must fit into 4,000 bytes"):
            torch.empty(10**12)
    torch.zeros(10**6)  # no bound any more


def test_a_file_elsewhere_is_not_read(good: tuple[Path, dict[str, bytes]]) -> None:
    folder, files = good
    content = json.loads(files["config.json"])
    content["vlprune"]["sha256"]["../secret"] = "0"
    forge(folder / "model", "config.json", json.dumps(content).encode())
    with pytest.raises(CheckpointError, match="must name files beside it"):
        vlprune.from_pretrained(folder / "model")


# -- models and data ------------------------------------------------------------------------------

BATCHES = [(torch.randn(4, 3, 32, 32), torch.randint(5, (4,))) for _ in range(3)]
METRICS_SHOWN = ("magnitude", "taylor", "activation", "mope")


def deit() -> nn.Module:
    torch.manual_seed(0)
    name = "timm:deit_tiny_patch16_224"
    return vlprune.create_model(name, img_size=32, depth=2, embed_dim=48, num_classes=5)


@pytest.mark.parametrize("metric", METRICS_SHOWN)
def test_weights_that_are_not_finite_are_named(metric: str) -> None:
    model = deit()
    with torch.no_grad():
        model.blocks[1].mlp.fc1.weight[3, 4] = float("nan")
        model.head.bias[0] = float("inf")
    with pytest.raises(
        ValueError, match=r"2 parameters .*: 'blocks.1.mlp.fc1.weight', 'head.bias'"
    ):
        vlprune.score(model, metric, Classification(BATCHES))


@pytest.mark.parametrize("metric", METRICS_SHOWN[1:])
def test_where_numbers_stop_being_finite_is_named(metric: str) -> None:
    images, labels = BATCHES[1]
    bad = [BATCHES[0], (images * float("inf"), labels)]
    with pytest.raises(ValueError, match=r"infinity is in what 'patch_embed.proj' is given"):
        vlprune.score(deit(), metric, Classification(bad))

    class Leaky(nn.Identity):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x / 0

    model = deit()
    model.blocks[1].norm2 = Leaky()
    with pytest.raises(ValueError, match=r"in the output of 'blocks.1.norm2'"):
        vlprune.score(model, metric, Classification(BATCHES), strategies=("ffn",))


def test_a_model_of_nan_is_not_proven() -> None:
    model = deit()
    plan = vlprune.plan(vlprune.score(model, "magnitude"), {"params": 0.8})
    with torch.no_grad():
        model.cls_token[:] = float("nan")
    with pytest.raises(ValueError, match="'cls_token'"):
        vlprune.prune(model, plan)


@pytest.mark.parametrize("metric", METRICS_SHOWN[1:])
@pytest.mark.parametrize("sizes", [(4, 1), (1,)])
def test_ragged_and_single_batches_are_scored(metric: str, sizes: tuple[int, ...]) -> None:
    loader = [(BATCHES[0][0][:size], BATCHES[0][1][:size]) for size in sizes]
    scores = vlprune.score(deit(), metric, Classification(loader))
    assert set(scores.values) == {axis.name for axis in scores.anatomy.axes}


@pytest.mark.parametrize("metric", METRICS_SHOWN[1:])
def test_an_empty_loader_is_named(metric: str) -> None:
    with pytest.raises(ValueError, match="loader must yield at least one batch"):
        vlprune.score(deit(), metric, Classification([]))


def test_compiled_and_quantised_models_are_refused_with_what_to_do() -> None:
    model = deit()
    plan = vlprune.plan(vlprune.score(model, "magnitude"), {"params": 0.8})
    compiled = torch.compile(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the old way to quantise says that it is old
        quantised = torch.ao.quantization.quantize_dynamic(deit(), {nn.Linear})
    for wrong, said in ((compiled, "Prune its `_orig_mod`"), (quantised, "then quantise")):
        with pytest.raises(UnsupportedModelError, match=said):
            vlprune.prune(wrong, plan)
        with pytest.raises(UnsupportedModelError, match=said):
            vlprune.dissect(wrong, torch.randn(1, 3, 32, 32))


def test_models_on_several_devices_are_refused_by_name() -> None:
    model = deit()
    plan = vlprune.plan(vlprune.score(model, "magnitude"), {"params": 0.8})
    model.blocks[1].to("meta")
    for call in (lambda: vlprune.prune(model, plan), lambda: vlprune.score(model, "magnitude")):
        with pytest.raises(UnsupportedModelError, match=r"'blocks\.1\.norm1\.weight' has none"):
            call()
    model = deit()
    with FakeTensorMode(allow_non_fake_inputs=True):
        model.blocks[1].to("cuda")
        with pytest.raises(TraceError, match=r"on cpu, 'blocks\.1\.\S+' on cuda:0\): move it to"):
            vlprune.dissect(model, torch.randn(1, 3, 32, 32))


def test_train_mode_frozen_and_mixed_dtypes_come_through() -> None:
    model = deit().train()
    plan = vlprune.plan(vlprune.score(model, "magnitude"), {"params": 0.8})
    model.blocks[0].to(torch.bfloat16)
    model.head.requires_grad_(False)
    small = vlprune.prune(model, plan)
    assert model.training
    assert small.training
    assert {p.dtype for p in small.blocks[0].parameters()} == {torch.bfloat16}
    assert {p.dtype for p in small.blocks[1].parameters()} == {torch.float32}
    assert not small.head.weight.requires_grad
    assert small.blocks[0].mlp.fc1.weight.requires_grad


@pytest.mark.parametrize("call", ["score", "repair", "mask"])
def test_an_interrupt_leaves_the_model_as_it_was(call: str) -> None:
    model = deit()
    plan = vlprune.plan(vlprune.score(model, "magnitude"), {"params": 0.8})
    before = {name: value.clone() for name, value in model.state_dict().items()}
    images = BATCHES[0][0]
    expected = model(images)

    def interrupted():
        yield BATCHES[0]
        raise KeyboardInterrupt

    class Loader:
        def __iter__(self):
            return interrupted()

    task = Classification(Loader())

    def mask() -> None:
        with vlprune.mask(model, plan):
            raise KeyboardInterrupt

    calls = {
        "score": lambda: vlprune.score(model, "taylor", task),
        "repair": lambda: vlprune.repair(model, plan, task),
        "mask": mask,
    }
    with pytest.raises(KeyboardInterrupt):
        calls[call]()
    assert torch.equal(model(images), expected)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
    assert not any(module._forward_hooks for module in model.modules())
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert all(parameter.requires_grad for parameter in model.parameters())
