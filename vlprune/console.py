"""What every command shares: where words go, progress bars, models and tasks by name, key=value."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from vlprune.errors import UnknownNameError
from vlprune.pipeline import create_model
from vlprune.plan import Plan
from vlprune.pruner import record_of
from vlprune.shipped import SHIPPED
from vlprune.store import from_pretrained, read_plan

out = Console()
err = Console(stderr=True)


def say(text: str) -> None:
    """Print plain text, as long as it is: names and paths may hold anything."""
    out.print(text, markup=False, highlight=False, soft_wrap=True)


def make_model(spec: str, pretrained: str, device: str) -> Any:
    """Return the model that a command was given.

    Raises:
        ValueError: if the device is not there.
    """
    weights: str | bool | None = pretrained or None
    if pretrained in ("yes", "no"):
        weights = pretrained == "yes"
    model = create_model(spec, pretrained=weights)
    try:
        return model.to(device)
    except (RuntimeError, AssertionError) as error:  # torch's words for a device that is not there
        reason = str(error).partition("\n")[0]
        raise ValueError(
            f"device must be one of this machine's; got {device!r}: {reason}"
        ) from error


def default_task(model: str) -> str:
    """Return the task that comes with a model, "" where none does."""
    return model if model in SHIPPED else ""


def make_task(name: str, model: Any, examples: int, seed: int) -> Any:
    """Return the task that a command was given, None for "".

    Raises:
        UnknownNameError: if it names nothing.
    """
    if not name:
        return None
    if name in SHIPPED:
        return SHIPPED[name].task("train", examples, seed, 128)
    module, _, function = name.partition(":")
    try:
        return getattr(importlib.import_module(module), function)(model)
    except (ImportError, AttributeError) as error:
        raise UnknownNameError(
            f"task {name!r} must be {', '.join(SHIPPED)} or module:function; {error}."
        ) from error


def read_cut(path: Path, device: str) -> tuple[Plan, Any]:
    """Return the plan in a JSON file, or that of a saved folder and the cut model in it.

    Raises:
        ValueError: if the saved model was not cut by one plan.
    """
    if not path.is_dir():
        return read_plan(path), None
    small = from_pretrained(path, device=device)
    plans = record_of(small).plans
    if len(plans) != 1:
        raise ValueError(
            f"{path} must be cut by one plan, as a latency table fits one structure; it was cut by "
            f"{len(plans)}."
        )
    return plans[0], small


def pairs(entries: list[str], what: str, convert: Callable[[str], Any]) -> dict[str, Any]:
    """Return entries "key=value" of an option as a dict.

    Raises:
        ValueError: if one is none.
    """
    found = {}
    for entry in entries:
        key, equals, value = entry.partition("=")
        try:
            found[key] = convert(value)
        except ValueError:
            equals = ""
        if not equals:
            raise ValueError(f"--{what} must be key=value; got {entry!r}.")
    return found


def literal(text: str) -> Any:
    """Return a number where it is one, else the text."""
    for convert in (int, float):
        with contextlib.suppress(ValueError):
            return convert(text)
    return text


@contextlib.contextmanager
def progress() -> Iterator[Callable[[str], Callable[[int, int], None]]]:
    """Yield a function from a title to a progress callback (done, total), with an ETA."""
    columns = (
        TextColumn("{task.description:<10}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=err) as bars:

        def stage(title: str) -> Callable[[int, int], None]:
            shown: list[Any] = []  # a bar appears with the first step, not before a failure

            def step(done: int, total: int) -> None:
                if not shown:
                    shown.append(bars.add_task(title))
                bars.update(shown[0], completed=done, total=total)

            return step

        yield stage
