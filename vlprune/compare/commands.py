"""What the command line needs for a comparison: settings, test data, commands to make it again."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from vlprune.console import make_task
from vlprune.contracts import Task
from vlprune.errors import UnknownNameError
from vlprune.shipped import SHIPPED

Settings = Mapping[str, Mapping[str, Any]]


def settings_of(
    metrics: Sequence[str], given: Mapping[str, Any], seed: int
) -> dict[str, dict[str, Any]]:
    """Return settings by metric, from "metric.key" to value; `random` takes the seed.

    Raises:
        UnknownNameError: if a key names none of the metrics.
    """
    found: dict[str, dict[str, Any]] = {name: {} for name in metrics}
    if "random" in found:
        found["random"]["seed"] = seed
    for key, value in given.items():
        metric, dot, setting = key.partition(".")
        if not dot or metric not in found:
            raise UnknownNameError(
                f"set must be metric.key=value with one of {', '.join(metrics)}; got {key!r}."
            )
        found[metric][setting] = value
    return found


def test_task(name: str, task: str, model: Any, examples: int, seed: int) -> Task | None:
    """Return the task to measure on: the named one, else test scenes of a task that ships.

    None where the task is the user's own and no other is named.
    """
    if name and name not in SHIPPED:
        made: Task = make_task(name, model, examples, seed)
        return made
    scenes = name or task
    return SHIPPED[scenes].task("test", examples, seed, 250) if scenes in SHIPPED else None


def prune_commands(
    model: str,
    settings: Settings,
    *,
    resource: str,
    task: str,
    examples: int,
    strategies: str,
    pretrained: str,
    device: str,
    seed: int,
) -> Callable[[str, str, float, bool], str]:
    """Return what gives, for a point, the `vlprune prune` that makes its model again."""

    def command(metric: str, allocation: str, keep: float, repaired: bool) -> str:
        words = ["vlprune", "prune", model, "--out", f"{metric}-{allocation}-{keep:g}"]
        words += ["--metric", metric, "--allocation", allocation]
        words += ["--budget", f"{resource}={keep:g}", "--task", task]
        words += ["--examples", str(examples), "--seed", str(seed), "--strategies", strategies]
        words += ["--repair" if repaired else "--no-repair"]
        for key, value in settings.get(metric, {}).items():
            words += ["--set", f"{key}={value}"]
        words += ["--pretrained", pretrained] if pretrained else []
        words += ["--device", device] if device != "cpu" else []
        return shlex.join(words)

    return command
