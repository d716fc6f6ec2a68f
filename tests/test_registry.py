"""Registries: names to plug-ins, filled at first look-up, with errors that help."""

import importlib
import importlib.metadata
import sys
from pathlib import Path

import pytest

import vlprune
from vlprune.errors import UnknownNameError
from vlprune.registry import ALLOCATIONS, FAMILIES, METRICS, STRATEGIES, TASKS, Registry

ALL = {r.noun: r for r in (METRICS, STRATEGIES, ALLOCATIONS, FAMILIES, TASKS)}
WITH_CODE = [(r, name) for r in (METRICS, STRATEGIES, ALLOCATIONS, TASKS) for name in r]


@pytest.fixture
def plugs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """An empty package `plugs` with a registry of its own, and a writer of plug-in files."""
    (tmp_path / "plugs").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)

    def write(name: str, text: str) -> None:
        (tmp_path / "plugs" / f"{name}.py").write_text(text)
        importlib.invalidate_caches()

    write(
        "__init__",
        "from vlprune.registry import Registry\nREG = Registry('plugs', 'plug')\n"
        "def add(name):\n    REG.register(name)(type(name, (), {}))\n",
    )
    yield importlib.import_module("plugs").REG, write
    for name in [name for name in sys.modules if name.partition(".")[0] in ("plugs", "outside")]:
        del sys.modules[name]


def enter(monkeypatch: pytest.MonkeyPatch, *points: importlib.metadata.EntryPoint) -> None:
    def entry_points(group: str) -> list[importlib.metadata.EntryPoint]:
        return [point for point in points if point.group == group]

    monkeypatch.setattr(importlib.metadata, "entry_points", entry_points)


@pytest.mark.parametrize("noun", ALL)
def test_an_unknown_name_lists_every_known_one(noun: str) -> None:
    with pytest.raises(UnknownNameError) as caught:
        ALL[noun]["qqq"]
    assert caught.value.args[0] == f"{noun} 'qqq' is not known; known are {', '.join(ALL[noun])}."


@pytest.mark.parametrize(
    ("registry", "typo", "nearest"),
    [
        (METRICS, "tailor", "taylor"),
        (STRATEGIES, "heads", "head"),
        (ALLOCATIONS, "gobal", "global"),
    ],
)
def test_an_unknown_name_tells_the_nearest(registry: Registry, typo: str, nearest: str) -> None:
    with pytest.raises(UnknownNameError, match=f"Did you mean '{nearest}'\\?"):
        registry[typo]
    assert typo not in registry
    assert registry.get(typo) is None


def test_names_come_sorted_and_as_many_as_are_counted() -> None:
    for registry in ALL.values():
        assert list(registry) == sorted(registry)
        assert len(registry) == len(list(registry)) > 0
    assert {"magnitude", "random", "taylor", "fisher"} <= set(METRICS)
    strategies = ["expert", "ffn", "head", "head_dim", "head_dim_per_head", "layer", "sublayer"]
    assert list(STRATEGIES) == strategies
    assert list(TASKS) == [
        "callables",
        "captioning",
        "classification",
        "question_answering",
        "reasoning",
        "retrieval",
        "segmentation",
    ]


def test_one_name_twice_is_refused_and_the_first_stays() -> None:
    registry = Registry("nowhere", "plug")
    first, second = object(), object()
    assert registry.register("name")(first) is first
    assert registry.register("name")(first) is first  # the same again is no conflict
    with pytest.raises(ValueError, match=r"plug 'name' must be registered once; got .* beside"):
        registry.register("name")(second)
    assert registry._entries == {"name": first}


def test_a_plug_in_is_one_file_and_underscore_files_are_none(plugs) -> None:
    registry, write = plugs
    write("one", "from plugs import add\nadd('One')")
    write("_two", "raise AssertionError('imported')")
    assert list(registry) == ["One"]


def test_an_import_error_is_raised_and_the_registry_can_be_loaded_again(plugs) -> None:
    registry, write = plugs
    write("early", "from plugs import add\nadd('Early')")
    write("late", "import not_there_at_all")
    for _ in range(2):  # raised at every look-up, not only at the first
        with pytest.raises(ModuleNotFoundError, match="not_there_at_all"):
            registry["Early"]
    write("late", "from plugs import add\nadd('Late')")
    assert list(registry) == ["Early", "Late"]


def test_a_plug_in_that_fails_after_registering_can_be_loaded_again(plugs) -> None:
    registry, write = plugs
    write("late", "from plugs import add\nadd('Late')\nimport not_there_at_all")
    with pytest.raises(ModuleNotFoundError, match="not_there_at_all"):
        list(registry)
    write("late", "from plugs import add\nadd('Late')")
    assert list(registry) == ["Late"]


def test_an_outside_package_joins_through_an_entry_point(plugs, tmp_path, monkeypatch) -> None:
    registry, _ = plugs
    (tmp_path / "outside.py").write_text(
        "from plugs import REG\nclass Plain: pass\n@REG.register('decorated')\nclass Own: pass\n"
    )
    enter(
        monkeypatch,
        importlib.metadata.EntryPoint("plain", "outside:Plain", "plugs"),
        importlib.metadata.EntryPoint("own", "outside:Own", "plugs"),
        importlib.metadata.EntryPoint("other", "not_there:Nothing", "another group"),
    )
    assert list(registry) == ["decorated", "plain"]
    assert registry["plain"].__name__ == "Plain"


def test_an_entry_point_that_fails_is_raised(plugs, monkeypatch) -> None:
    registry, _ = plugs
    enter(monkeypatch, importlib.metadata.EntryPoint("plain", "not_there_at_all:X", "plugs"))
    with pytest.raises(ModuleNotFoundError, match="not_there_at_all"):
        len(registry)


@pytest.mark.parametrize(("registry", "name"), WITH_CODE, ids=lambda x: x if x is str(x) else "")
def test_every_plug_in_says_in_its_module_what_it_is(registry: Registry, name: str) -> None:
    module = importlib.import_module(registry[name].__module__)
    first_line = (module.__doc__ or "").strip().partition("\n")[0]
    assert len(first_line) > 20, f"{module.__name__} needs a docstring"


def test_classes_resolve_by_name_and_others_raise_attribute_error() -> None:
    assert vlprune.metrics.Taylor is METRICS["taylor"]
    assert vlprune.tasks.Retrieval is TASKS["retrieval"]
    with pytest.raises(AttributeError, match=r"module 'vlprune.metrics' has no attribute 'Tailor'"):
        _ = vlprune.metrics.Tailor
    assert not hasattr(vlprune.tasks, "_private")
