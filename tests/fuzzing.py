"""What the fuzz tests share: files that we wrote, inputs that anyone could write, and a guard.

`feed` hands bytes to a reader. Whatever happens must be a value or one of our errors; the guard
listens to Python's audit events meanwhile: nothing is written outside of the folder, no process is
started, nothing is unpickled, no socket is opened.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import random
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from conftest import dissected

import vlprune
from vlprune import errors
from vlprune.ablation.store import Store
from vlprune.profile import profile
from vlprune.store import _checksum, read_latency, read_plan, read_scores, write_json

OURS = tuple(
    value
    for value in vars(errors).values()
    if isinstance(value, type) and issubclass(value, Exception)
)
_FORBIDDEN = ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "pickle.find_class")
_FORBIDDEN += ("socket.connect", "ctypes.dlopen")
_WRITING = ("os.remove", "os.rename", "os.rmdir", "os.mkdir", "os.symlink", "os.link", "os.chmod")
_guarded: list[Path] = []
_seen: list[str] = []


def _listen(event: str, arguments: tuple[Any, ...]) -> None:
    if not _guarded:
        return
    if event in _FORBIDDEN:
        _seen.append(f"{event} {arguments[:1]}")
    elif (
        event == "open" and isinstance(arguments[1], str) and set(arguments[1]) & set("wax+")
    ) or event in _WRITING:
        _check(event, arguments[0])


def _check(event: str, path: Any) -> None:
    if isinstance(path, (str, bytes, os.PathLike)):
        where = Path(os.fsdecode(path)).resolve()
        if not where.is_relative_to(_guarded[0]) and where.suffix not in (".pyc", ""):
            _seen.append(f"{event} {where}")


sys.addaudithook(_listen)


@contextlib.contextmanager
def guard(folder: Path) -> Iterator[None]:
    """Fail where something is done that reading a file must not do."""
    _seen.clear()
    _guarded.append(folder.resolve())
    try:
        yield
    finally:
        _guarded.clear()
    assert not _seen, _seen


def seeds(folder: Path) -> dict[str, bytes]:
    """Write one good file of every kind; return their bytes by the reader's name."""
    model, anatomy = dissected("deit")
    anatomy = anatomy.select(("head", "ffn"))
    scores = vlprune.score(model, "magnitude", anatomy=anatomy)
    plan = vlprune.plan(scores, {"prunable_params": 0.6})
    write_json(scores, folder / "scores.json")
    write_json(plan, folder / "plan.json")
    table = profile(model, torch.randn(1, 3, 32, 32), widths=(0.5,), rounds=1)
    write_json(table, folder / "latency.json")
    small = vlprune.prune(model, plan, verify=False)
    vlprune.save_pretrained(small, folder / "model", verify=False)
    store = Store(folder / "store", "key")
    store.add_part("a", 0, (torch.rand(3), None))
    store.add_values("b", 1, torch.rand(3))
    parts, values = (next((folder / "store" / "key").glob(f"{k}-*")) for k in ("parts", "values"))
    return {
        "scores": (folder / "scores.json").read_bytes(),
        "plan": (folder / "plan.json").read_bytes(),
        "latency": (folder / "latency.json").read_bytes(),
        "store parts": parts.read_bytes(),
        "store values": values.read_bytes(),
        "config.json": (folder / "model" / "config.json").read_bytes(),
        "plan.json": (folder / "model" / "plan.json").read_bytes(),
        "model.safetensors": (folder / "model" / "model.safetensors").read_bytes(),
    }


def feed(reader: str, data: bytes, folder: Path) -> str:
    """Read bytes as a file of a kind; return "read", or the name of our error."""
    read = _reader(reader, data, folder)
    with guard(folder):
        try:
            read()
        except OURS as error:
            return type(error).__name__
    return "read"


def _reader(reader: str, data: bytes, folder: Path) -> Callable[[], Any]:
    if reader.startswith("store"):
        place = folder / "fuzzed" / "key"
        place.mkdir(parents=True, exist_ok=True)
        for old in place.iterdir():
            old.unlink()
        (place / f"{reader.split()[1]}-1.jsonl").write_bytes(data)
        return lambda: Store(folder / "fuzzed", "key")
    if reader in ("scores", "plan", "latency"):
        path = folder / "fuzzed.json"
        path.write_bytes(data)
        kinds = {"scores": read_scores, "plan": read_plan, "latency": read_latency}
        return lambda: kinds[reader](path)
    forge(folder / "model", reader, data)
    return lambda: vlprune.from_pretrained(folder / "model")


def forge(folder: Path, name: str, data: bytes) -> None:
    """Replace one file of a checkpoint and let every hash agree, as an attacker would."""
    originals = folder.parent / "originals"
    if not originals.exists():
        originals.mkdir()
        for path in folder.iterdir():
            (originals / path.name).write_bytes(path.read_bytes())
    for path in originals.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    (folder / name).write_bytes(data)
    try:
        content = json.loads((folder / "config.json").read_bytes())
        config = content["vlprune"]
        for file in config["sha256"]:
            if (folder / Path(file).name).is_file():
                raw = (folder / Path(file).name).read_bytes()
                config["sha256"][file] = hashlib.sha256(raw).hexdigest()
        config["checksum"] = _checksum(config)
        (folder / "config.json").write_text(json.dumps(content))
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return  # no JSON of ours any more: as it is


def mutate(data: bytes, draw: random.Random) -> bytes:
    """Change bytes a little or a lot; JSON also by value: wrong kinds, huge and odd numbers."""
    if data[:1] in (b"{", b"[") and draw.random() < 0.6:
        try:
            return json.dumps(_changed(json.loads(data), draw)).encode()
        except ValueError:
            pass
    raw = bytearray(data)
    for _ in range(draw.choice((1, 1, 2, 8))):
        place = draw.randrange(len(raw) + 1)
        kind = draw.randrange(4)
        if kind == 0:
            raw[place : place + draw.randrange(1, 9)] = b""
        elif kind == 1:
            raw[place:place] = draw.randbytes(draw.randrange(1, 5))
        elif kind == 2 and place < len(raw):
            raw[place] = draw.randrange(256)
        else:
            raw = raw[:place]
    return bytes(raw)


_ODD = (
    *(
        None,
        True,
        -1,
        0,
        2**31,
        2**63,
        10**30,
        1e308,
        float("nan"),
        "",
        "..",
        "../../x",
        "os:system",
    ),
    *(
        "subprocess:Popen",
        "antigravity:fly",
        "__class__",
        [],
        {},
        [[]],
        "a" * 1000,
        "vlprune.cli:app",
    ),
)


def _changed(value: Any, draw: random.Random) -> Any:
    """A value with one place in it replaced, taken out or repeated."""
    if isinstance(value, dict) and value and draw.random() < 0.93:
        key = draw.choice(list(value))
        if draw.random() < 0.05:
            return {k: v for k, v in value.items() if k != key}
        return {**value, key: _changed(value[key], draw)}
    if isinstance(value, list) and value and draw.random() < 0.9:
        place = draw.randrange(len(value))
        if draw.random() < 0.1:
            return value + value[place : place + 1]
        return [*value[:place], _changed(value[place], draw), *value[place + 1 :]]
    if isinstance(value, int) and draw.random() < 0.5:
        return value + draw.choice((-1, 1, 7, 10**4, -(10**4)))
    return draw.choice(_ODD)
