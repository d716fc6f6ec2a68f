"""An append-only store of what ablations gave: nothing that was written is lost or computed again.

One folder a key (weights, data, settings). Every process appends lines to a file of its own, one a
removal and batch, and reads the files of all. A process that is killed loses what it was computing
at that moment; a line that was cut off is skipped. Once all batches of a removal are there, its
values are written as one line, and its parts may go (`compact`).
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from vlprune.calls import bytes_of, tensors_of
from vlprune.measures import Kept

T = TypeVar("T")


class Store:
    """Parts (removal, batch) and values (removal) under one key.

    Args:
        folder: where stores lie; made if it is not there. None: nothing is kept on disk.
        key: what the numbers depend on, see `key_of`.
    """

    def __init__(self, folder: str | Path | None, key: str):
        self.folder = None if folder is None else Path(folder) / key
        self._mine = f"{os.getpid()}-{uuid.uuid4().hex[:8]}"
        self.parts: dict[tuple[str, int], Kept] = {}
        self.values: dict[str, tuple[int, Tensor]] = {}  # batches, value of every example
        if self.folder is not None:
            self.folder.mkdir(parents=True, exist_ok=True)
            self.read()

    def read(self) -> None:
        """Take in what all processes have written so far."""
        if self.folder is None:
            return
        for removal, batches, values in _lines(self.folder.glob("values-*.jsonl"), _values):
            self.values[removal] = (batches, values)
        for removal, batch, kept in _lines(self.folder.glob("parts-*.jsonl"), _part):
            if removal not in self.values and (removal, batch) not in self.parts:
                self.parts[removal, batch] = kept

    def add_part(self, removal: str, batch: int, kept: Kept) -> None:
        """Keep what one batch gave without the units of a removal."""
        self.parts[removal, batch] = kept
        arrays = [None if t is None else _packed(t) for t in kept]
        self._append("parts", {"removal": removal, "batch": batch, "kept": arrays})

    def add_values(self, removal: str, batches: int, values: Tensor) -> None:
        """Keep the value of every example of the first batches; its parts are needed no more."""
        self.values[removal] = (batches, values)
        line = {"removal": removal, "batches": batches, "values": _packed(values)}
        self._append("values", line)
        for key in [key for key in self.parts if key[0] == removal]:
            del self.parts[key]

    def compact(self) -> None:
        """Delete this process's parts, all of whose removals have their values."""
        if self.folder is not None and not self.parts:
            (self.folder / f"parts-{self._mine}.jsonl").unlink(missing_ok=True)

    def _append(self, kind: str, line: Mapping[str, Any]) -> None:
        if self.folder is not None:
            with (self.folder / f"{kind}-{self._mine}.jsonl").open("a") as file:
                file.write(json.dumps(line) + "\n")  # one write, closed at once


def key_of(model: nn.Module, batches: Iterable[Any], settings: Mapping[str, Any]) -> str:
    """Return a short hash of weights, data and settings."""
    digest = hashlib.blake2b(digest_size=8)
    for name, tensor in model.state_dict().items():
        digest.update(name.encode())
        _feed(digest, tensor)
    for batch in batches:
        for tensor in tensors_of(batch):
            _feed(digest, tensor)
    digest.update(json.dumps(dict(settings), sort_keys=True).encode())
    return digest.hexdigest()


def content_of(batch: Any) -> str:
    """Return a hash of all tensors of a batch."""
    digest = hashlib.blake2b(digest_size=12)
    for tensor in tensors_of(batch):
        _feed(digest, tensor)
    return digest.hexdigest()


def _feed(digest: Any, tensor: Tensor) -> None:
    digest.update(f"{tuple(tensor.shape)}{tensor.dtype}".encode())
    digest.update(bytes_of(tensor))


def _lines(paths: Iterable[Path], take: Callable[[Any], T]) -> Iterator[T]:
    """What every line holds. One that holds nothing of ours was cut off: it is made again."""
    for path in sorted(paths):
        for line in path.read_bytes().splitlines():
            try:
                yield take(json.loads(line))
            except (ValueError, TypeError, KeyError, RecursionError, OverflowError):
                continue


def _values(line: Any) -> tuple[str, int, Tensor]:
    return str(line["removal"]), int(line["batches"]), _array(line["values"])


def _part(line: Any) -> tuple[str, int, Kept]:
    kept = tuple(None if t is None else _array(t) for t in line["kept"])
    return str(line["removal"]), int(line["batch"]), kept


def _packed(tensor: Tensor) -> dict[str, Any]:
    array = tensor.detach().cpu().contiguous().numpy()
    data = base64.b64encode(array.tobytes()).decode()
    return {"dtype": str(array.dtype), "shape": list(array.shape), "data": data}


def _array(packed: Mapping[str, Any]) -> Tensor:
    raw = base64.b64decode(packed["data"])
    array = np.frombuffer(raw, dtype=packed["dtype"]).reshape(packed["shape"])
    return torch.from_numpy(array.copy())
