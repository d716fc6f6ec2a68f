"""Files that anyone could have written: a value or one of our errors, and nothing else happens."""

import json
import random
import resource
import sys
from pathlib import Path

import pytest
from fuzzing import feed, forge, guard, mutate, seeds

import vlprune
from vlprune.bounded import Bounded
from vlprune.errors import CheckpointError, UnknownNameError
from vlprune.layout import resolve
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
    import torch

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
