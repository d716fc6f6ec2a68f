"""Rows of a benchmark in a CSV file: what is there is not measured again."""

from __future__ import annotations

import csv
import dataclasses
from pathlib import Path
from typing import Any, TypeVar

R = TypeVar("R")


def read(path: Path, kind: type[R]) -> list[R]:
    """Return the rows of a file, none where there is no file; `kind` is a dataclass of scalars."""
    if not path.exists():
        return []
    convert = {"int": int, "float": float, "str": str}
    fields = dataclasses.fields(kind)  # type: ignore[arg-type]
    kinds = {field.name: convert[str(field.type)] for field in fields}
    with path.open(newline="") as file:
        return [
            kind(**{name: kinds[name](value) for name, value in row.items()})
            for row in csv.DictReader(file)
        ]


def append(path: Path, row: Any) -> None:
    """Write one more row, with the names of the columns before the first."""
    fresh = not path.exists()
    with path.open("a", newline="") as file:
        names = [field.name for field in dataclasses.fields(row)]
        writer = csv.DictWriter(file, names, lineterminator="\n")
        if fresh:
            writer.writeheader()
        writer.writerow(dataclasses.asdict(row))
