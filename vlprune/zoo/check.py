"""One entry of the zoo put through the law: masked = cut per strategy, then saved and reloaded."""

from __future__ import annotations

import dataclasses
import random
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vlprune.anatomy import Anatomy
from vlprune.calls import Inputs, calls_of, run, tensors_of
from vlprune.dissect import default_inputs, dissect
from vlprune.errors import LawError, UnsupportedModelError
from vlprune.law import relative_error
from vlprune.pipeline import mask, prune
from vlprune.plan import Plan, make_plan
from vlprune.pruner import record_of
from vlprune.registry import FAMILIES
from vlprune.store import from_pretrained, save_pretrained
from vlprune.zoo.entries import Entry

STRATEGIES = ("head", "ffn", "layer", "head_dim")
WHERE_FOUND = ("expert",)  # strategies for what few models have


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What holds for one strategy on one model.

    Attributes:
        axes, units: what can be cut.
        error: largest relative error between masked and cut model, None where nothing was cut.
        moved: how far the mask moves the outputs, relative: 0 would prove nothing.
        refused: "module: reason" of what is left whole, each reason once.
    """

    axes: int = 0
    units: int = 0
    error: float | None = None
    moved: float = 0.0
    refused: tuple[str, ...] = ()

    @property
    def is_exact(self) -> bool:
        """Whether there was something to cut, all of it could be, and the law holds."""
        holds = self.error is not None and self.error <= 1e-9 and self.moved > 1e-6
        return holds and not self.refused


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """All that holds for one entry; `fault` is what ended the check, "" where nothing did."""

    name: str
    group: str
    transformer: bool
    params: int = 0
    outcomes: dict[str, Outcome] = dataclasses.field(default_factory=dict)
    reloads: bool = False
    seconds: float = 0.0
    fault: str = ""


def check(entry: Entry) -> Row:
    """Build the model of `entry` and return what holds for it; whatever it raises is in the row."""
    begin = time.monotonic()
    row = Row(name=entry.name, group=entry.group, transformer=entry.transformer)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            row = _checked(entry, row)
    except Exception as error:  # the row says so: one model must not end the whole table
        said = str(error).partition("\n")[0]
        row = dataclasses.replace(row, fault=f"{type(error).__name__}: {said}")
    return dataclasses.replace(row, seconds=round(time.monotonic() - begin, 2))


def _checked(entry: Entry, row: Row) -> Row:
    family = FAMILIES[entry.family]
    assert family.build is not None, entry.family
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = redraw(family.build(entry.arguments)).eval()
    params = sum(p.numel() for p in model.parameters())
    inputs = default_inputs(model, batch=2)
    try:
        anatomy = dissect(model, inputs)
    except UnsupportedModelError as error:
        reason = str(error).partition("\n")[0]
        outcomes = {kind: Outcome(refused=(reason,)) for kind in STRATEGIES}
        return dataclasses.replace(row, params=params, outcomes=outcomes)
    named = {*anatomy.kinds, *(refusal.kind for refusal in anatomy.refusals)}
    kinds = (*STRATEGIES, *(kind for kind in WHERE_FOUND if kind in named))
    outcomes = {kind: _outcome(model, anatomy, inputs, kind) for kind in kinds}
    row = dataclasses.replace(row, params=params, outcomes=outcomes)
    plan = make_plan(anatomy, random_keep(anatomy, 2))
    proven = all(o.error is not None for o in outcomes.values() if o.axes)
    small = prune(model, plan, inputs, verify=proven)
    return dataclasses.replace(row, reloads=_reloads(small, entry))


def _outcome(model: nn.Module, anatomy: Anatomy, inputs: Inputs, kind: str) -> Outcome:
    chosen = anatomy.select((kind,))
    refused = tuple(
        dict.fromkeys(f"{r.module}: {r.reason}" for r in anatomy.refusals if r.kind == kind)
    )
    if not chosen.axes:
        other = [f"{r.module}: {r.reason}" for r in anatomy.refusals if not r.kind]
        return Outcome(refused=refused or tuple(other) or (f"no {kind} was found",))
    errors, moved = [], 0.0
    for seed in (0, 1):
        plan = make_plan(anatomy, random_keep(chosen, seed))
        try:
            error = record_of(prune(model, plan, inputs)).relative_error
        except LawError as unproven:
            said = str(unproven).partition("\n")[0]
            return Outcome(axes=len(chosen.axes), refused=(f"{unproven.module}: {said}", *refused))
        errors.append(float("inf") if error is None else error)
        moved = max(moved, _moved(model, plan, inputs))
    return Outcome(
        axes=len(chosen.axes),
        units=sum(axis.units for axis in chosen.axes),
        error=max(errors),
        moved=moved,
        refused=refused,
    )


def _moved(model: nn.Module, plan: Plan, inputs: Inputs) -> float:
    """How far a mask moves the outputs, relative to them; 0 where they are not finite."""
    calls = calls_of(inputs)
    with torch.no_grad():
        before = [t for call in calls for t in tensors_of(run(model, call))]
        with mask(model, plan):
            after = [t for call in calls for t in tensors_of(run(model, call))]
    pairs = [(a, b) for a, b in zip(before, after, strict=True) if a.is_floating_point()]
    finite = [(a, b) for a, b in pairs if a.shape == b.shape and bool(a.isfinite().all())]
    return max((relative_error(a, b) for a, b in finite), default=0.0)


def random_keep(anatomy: Anatomy, seed: int) -> dict[str, tuple[int, ...]]:
    """Return an uneven plan: every axis loses another number of units, at least one if it may."""
    draw = random.Random(seed)
    keep = {}
    for axis in anatomy.axes:
        least = axis.least if axis.units == 1 else max(axis.least, 1)
        count = draw.randint(least, max(axis.units - 1, axis.least))
        keep[axis.name] = tuple(sorted(draw.sample(range(axis.units), count)))
    return keep


def _reloads(small: nn.Module, entry: Entry) -> bool:
    source: dict[str, Any] = {"family": entry.family, "arguments": entry.arguments}
    with tempfile.TemporaryDirectory() as folder:
        path = save_pretrained(small, Path(folder) / "model", source=source)
        again = from_pretrained(path).state_dict()
    return all(torch.equal(again[name], tensor) for name, tensor in small.state_dict().items())


@torch.no_grad()
def redraw(model: nn.Module, seed: int = 0) -> nn.Module:
    """Draw matrices from N(0, 1 / fan_in) and shift vectors, biases and norms by N(0, 0.3).

    Libraries start biases, tables and gates at zero, where a wrong cut would not show.
    """
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
        if parameter.dim() > 1 and parameter.numel():
            parameter.copy_(noise / (parameter.numel() / parameter.shape[0]) ** 0.5)
        else:
            parameter.add_(0.3 * noise)
    return model
