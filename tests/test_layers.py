"""Imports point to lower ranks only, plug-ins never import each other, importing is cheap."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import vlprune

PACKAGE = Path(vlprune.__file__).parent
RANKS = {
    "errors": 0,
    "timetable": 0,
    "anatomy": 1,
    "bounded": 1,
    "calls": 1,
    "registry": 1,
    "trusted": 1,
    "copies": 2,
    "measures": 2,
    "samples": 3,
    "moments": 2,
    "intercepts": 2,
    "shapes": 2,
    "latency": 2,
    "layout": 2,
    "models": 2,
    "plan": 2,
    "history": 3,
    "classes": 3,
    "clocks": 3,
    "consumers": 3,
    "cost": 3,
    "gates": 3,
    "graph": 3,
    "cutting": 4,
    "expected": 4,
    "faults": 2,
    "law": 4,
    "ranking": 4,
    "ablation": 5,
    "discovery": 5,
    "dissect": 6,
    "contracts": 7,
    "profile": 7,
    "pruner": 7,
    "allocation": 8,
    "families": 8,
    "metrics": 8,
    "strategies": 8,
    "tasks": 8,
    "recover": 9,
    "report": 9,
    "shipped": 9,
    "certificate": 9,
    "export": 9,
    "store": 10,
    "pipeline": 11,
    "counting": 10,
    "dead": 10,
    "certify": 12,
    "compare": 13,
    "console": 12,
    "demo": 12,
    "plain": 12,
    "recipes": 12,
    "zoo": 12,
    "hub": 13,
    "cli": 14,
    "__init__": 14,
}
FOLDERS = {  # folders that are no plug-ins: rank inside of them
    "ablation": {
        "removals": 0,
        "replay": 0,
        "intervals": 0,
        "store": 1,
        "sequential": 1,
        "trimming": 1,
        "batch": 2,
        "engine": 3,
        "__init__": 4,
    },
    "compare": {"results": 0, "charts": 1, "commands": 0, "run": 1, "page": 2, "__init__": 3},
    "classes": {
        "_rewriting": 0,
        "padded": 1,
        "passing": 1,
        "picking": 1,
        "split": 1,
        "calling": 2,
        "narrow": 3,
        "__init__": 4,
    },
    "discovery": {
        "regions": 0,
        "tracing": 1,
        "skip": 1,
        "decoding": 2,
        "probe": 3,
        "fit": 4,
        "dims": 5,
        "experts": 5,
        "discover": 6,
        "__init__": 7,
    },
    "models": {"blip_reasoning": 0, "segmenter": 0, "__init__": 1},
    "recover": {
        "finetune": 0,
        "listening": 0,
        "losses": 0,
        "projections": 0,
        "queries": 1,
        "stepping": 0,
        "streams": 0,
        "teacher": 0,
        "distil": 1,
        "layerwise": 2,
        "repair": 2,
        "__init__": 3,
    },
    "recipes": {"_stages": 0, "efficientvlm": 1, "mope_clip": 1, "upop": 1, "__init__": 2},
    "zoo": {
        "entries": 0,
        "check": 1,
        "open_clip": 1,
        "timm": 1,
        "transformers": 1,
        "table": 2,
        "__init__": 3,
    },
}
PLUGINS = {"allocation", "families", "metrics", "strategies", "tasks"}
FILES = sorted(PACKAGE.rglob("*.py"))


def imported(path: Path) -> set[str]:
    """Modules of vlprune that a file imports, at its top or inside a function."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("vlprune"):
            inner = {f"{node.module}.{name.name}" for name in node.names}
            found |= inner if node.module == "vlprune" else {node.module}
            if node.module in {f"vlprune.{plugin}" for plugin in PLUGINS}:
                found |= inner
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names if name.name.startswith("vlprune")}
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_to_lower_ranks(path: Path) -> None:
    here = path.relative_to(PACKAGE).with_suffix("").parts
    for module in imported(path):
        there = module.split(".")[1:]
        if not there:  # `import vlprune`: the verbs, only from above them
            assert RANKS[here[0]] >= RANKS["__init__"], module
            continue
        if here[0] in PLUGINS and there[0] == here[0]:
            shared = (
                there[-1].startswith("_")
                or len(there) == 1
                or any(step.startswith("_") for step in there[1:])
            )
            own = here[1:2] == tuple(there[1:2])  # inside a plug-in that is a folder
            assert shared or own or len(here) == 1, f"plug-in {here} imports plug-in {module}"
        elif here[0] in FOLDERS and there[0] == here[0]:
            ranks = FOLDERS[here[0]]
            assert ranks[there[1]] < ranks[here[1]], f"{'.'.join(here)} imports {module}"
        else:
            assert RANKS[there[0]] < RANKS[here[0]], f"{'.'.join(here)} imports {module}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_every_file_says_what_it_is(path: Path) -> None:
    doc = ast.get_docstring(ast.parse(path.read_text()))
    assert doc
    assert doc.partition("\n")[0].endswith((".", ":"))


def test_import_loads_no_model_library() -> None:
    heavy = (
        "timm",
        "open_clip",
        "transformers",
        "torch_pruning",
        "matplotlib",
        "pydantic",
        "triton",
    )
    code = f"import torch, vlprune, sys; print([m for m in {heavy} if m in sys.modules])"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "[]"


def test_import_costs_little_over_torch() -> None:
    code = (
        "import time, torch; start = time.process_time(); import vlprune; "
        "print(time.process_time() - start)"
    )
    times = [
        float(subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout)
        for _ in range(3)
    ]
    assert min(times) < 0.3
