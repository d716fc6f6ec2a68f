"""Proving what a cut model is, and checking a saved one again: makes a Certificate.

Cheap claims are always tested; compiling and exporting take seconds to minutes, and are asked for.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import os
import platform
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vlprune.calls import (
    Inputs,
    calls_of,
    cast,
)
from vlprune.certificate import (
    AxisCount,
    Certificate,
    Claim,
    Dead,
    Weights,
    hash_of_plans,
    hash_of_values,
    hash_of_weights,
)
from vlprune.contracts import Task
from vlprune.copies import clone
from vlprune.cost import count_params
from vlprune.counting import counted, counted_macs
from vlprune.cutting import cut_
from vlprune.dead import dead_units
from vlprune.dissect import default_inputs
from vlprune.errors import CheckpointError, LawError, PlanError, UnsupportedModelError
from vlprune.export import TOLERANCES, compile_error, export_error, to_onnx
from vlprune.history import fates_of
from vlprune.law import (
    TOLERANCE,
    check_masked_equals_cut,
    difference,
)
from vlprune.pipeline import create_model
from vlprune.plan import Plan
from vlprune.pruner import cut_but_last_, record_of
from vlprune.registry import FAMILIES
from vlprune.shipped import SHIPPED
from vlprune.store import from_pretrained, read_certificate, save_pretrained

COSTLY = {"compile": "cut = compiled", "export": "cut = exported", "onnx": "cut = ONNX"}
_NO_ORIGINAL = "the original's weights are not known here"


def certify(
    small: nn.Module,
    dense: nn.Module | None = None,
    example_inputs: Inputs | None = None,
    *,
    claims: Sequence[str] = (),
    task: Task | None = None,
    trained: bool | None = None,
) -> Certificate:
    """Return what can be proven of a cut model. A claim that fails is in it, and raises nothing.

    Args:
        small: as `prune`, `repair`, `fit` or `from_pretrained` returned it.
        dense: what it was cut from, with the weights it had then; without it masked = cut and dead
            units are not tested.
        example_inputs: what all is run on; default: made by the family of the model's class.
        claims: costly ones to test too: "compile", "export", "onnx".
        task: whose data was used: its batches are hashed.
        trained: whether weights may differ from the cut's; default: what the model's record says.

    Raises:
        ValueError: for an unknown claim, or a model that was never cut.
    """
    claims_of(",".join(claims))
    record = record_of(small)
    if not record.plans:
        raise ValueError("small must carry a plan; this model was never cut by vlprune.prune.")
    inputs = default_inputs(small, batch=2) if example_inputs is None else example_inputs
    one = default_inputs(small) if example_inputs is None else example_inputs  # as plans count
    trained = record.trained if trained is None else trained
    past = None if dense is None else _Past(dense, small)
    structure = dense if dense is not None else _structure(small)
    axes = counted(small, structure, fates_of(record.plans))
    plans = record.plans
    macs = counted_macs(small, structure, plans, one)
    return Certificate(
        model=type(small).__name__,
        claims=(
            _masked(small, past, inputs, trained),
            _unchanged(past, trained),
            _achieved(small, axes, macs, plans),
            _reloaded(small, inputs),
            *(_costly(name, small, inputs, name in claims) for name in COSTLY),
        ),
        asked=plans[-1].asked,
        params=(
            plans[0].dense.params if plans[0].dense else _params(structure),
            plans[-1].planned.params if plans[-1].planned else None,
            count_params(small),
        ),
        macs=macs,
        axes=axes,
        dead=None if past is None else past.dead(inputs),
        weights=None if past is None else past.weights,
        made_by=tuple(plan.made_by for plan in plans),
        versions=_versions(),
        hashes={
            "weights": hash_of_weights(small),
            **({} if dense is None else {"original": hash_of_weights(dense)}),
            "plans": hash_of_plans(plans),
            "inputs": hash_of_values([(call.args, call.kwargs) for call in calls_of(inputs)]),
            **({} if task is None else {"data": hash_of_values(list(task.batches()))}),
        },
    )


def claims_of(text: str) -> tuple[str, ...]:
    """Return the costly claims that a text with commas names.

    Raises:
        ValueError: if it names another.
    """
    names = tuple(filter(None, text.split(",")))
    unknown = [name for name in names if name not in COSTLY]
    if unknown:
        raise ValueError(f"claims must be of {', '.join(COSTLY)}; got {unknown[0]!r}.")
    return names


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Checked:
    """A saved folder, checked again: what holds now, what was written, and where they part."""

    now: Certificate
    written: Certificate | None
    faults: tuple[str, ...]


def verify_folder(
    folder: str | os.PathLike[str],
    dense: nn.Module | None = None,
    *,
    example_inputs: Inputs | None = None,
    claims: Sequence[str] = (),
) -> Checked:
    """Return all that `certify` proves of a saved model, beside what its certificate says.

    Args:
        folder: that `save_pretrained` wrote, with a certificate or without.
        dense: the original; default: made again where its weights are known.
        example_inputs: as of `certify`.
        claims: as of `certify`.

    Raises:
        CheckpointError: if a file is missing, truncated or edited.
    """
    small = from_pretrained(folder)
    written = read_certificate(folder)
    dense = original_of(small) if dense is None else dense
    may_differ = None
    if written is not None and written.weights is not None:
        may_differ = written.weights.changed > 0
    now = certify(small, dense, example_inputs, claims=claims, trained=may_differ)
    faults = [str(claim) for claim in now.failed]
    return Checked(now=now, written=written, faults=(*faults, *_differences(written, now)))


def original_of(small: nn.Module) -> nn.Module | None:
    """Return the model that `small` was cut from, made again; None if its weights are lost."""
    made = (record_of(small).source or {}).get("made") or {}
    if made.get("spec") and (made["pretrained"] or made["spec"] in SHIPPED):
        return create_model(made["spec"], pretrained=made["pretrained"], **made["arguments"])
    return None


def _differences(written: Certificate | None, now: Certificate) -> Iterator[str]:
    """Where what is now is not what was written down."""
    if written is None:
        return
    for name in ("weights", "plans", "original"):
        old, new = written.hashes.get(name), now.hashes.get(name)
        if old and new and old != new:
            yield f"{name} must be those that were certified, {old[:16]}...; got {new[:16]}..."
    if written.weights and now.weights and written.weights != now.weights:
        yield f"tensors must be as certified, {written.weights}; got {now.weights}"


# -- claims ----------------------------------------------------------------------------------------


class _Past:
    """The way from the dense model to the cut one, gone again."""

    def __init__(self, dense: nn.Module, small: nn.Module):
        plans = record_of(small).plans
        self.before_last = clone(dense)
        self.fault = ""
        self.last = plans[-1]
        try:
            cut_but_last_(self.before_last, plans)
            self.cut = clone(self.before_last)
            cut_(self.cut, self.last.rows)
        except PlanError as error:
            self.fault, self.cut = str(error), self.before_last
        one, other = self.cut.state_dict(), small.state_dict()
        repaired = set(record_of(small).repaired)
        apart = [n for n in {**one, **other} if not _equal(one.get(n), other.get(n))]
        self.changed = [name for name in apart if name not in repaired]
        self.same_names = {n: t.shape for n, t in one.items()} == {
            n: t.shape for n, t in other.items()
        }
        self.weights = Weights(
            equal=len({**one, **other}) - len(apart),
            repaired=len(apart) - len(self.changed),
            changed=len(self.changed),
        )

    def dead(self, inputs: Inputs) -> tuple[Dead, ...] | None:
        """Units of the last plan without effect; None where it does not fit the original."""
        return None if self.fault else dead_units(self.before_last, self.last, inputs)


def _equal(one: Tensor | None, other: Tensor | None) -> bool:
    return (
        one is not None and other is not None and torch.equal(one.cpu(), other.to(one.dtype).cpu())
    )


def _masked(small: nn.Module, past: _Past | None, inputs: Inputs, trained: bool) -> Claim:
    name = "masked = cut"
    if past is None:
        error = record_of(small).relative_error
        at_cut = "" if error is None else f"; {error:.1e} was measured at the last cut"
        return Claim(name=name, verdict="not tested", note=_NO_ORIGINAL + at_cut)
    if past.fault:
        return Claim(name=name, verdict="failed", tolerance=TOLERANCE, note=past.fault)
    tested, note = small, ""
    if past.weights.repaired or (trained and past.changed):
        tested, note = clone(small), "of the cut, before weights were "
        note += " and ".join(
            ["repaired"] * bool(past.weights.repaired) + ["trained"] * bool(past.changed)
        )
        if past.same_names:  # this model's own classes and knobs, with the weights of the cut
            state = dict(past.cut.state_dict())
            if not trained:
                state |= {n: small.state_dict()[n] for n in past.changed}
            tested.load_state_dict(state)
        else:
            tested = past.cut

    def measure() -> float:
        return check_masked_equals_cut(past.before_last, tested, past.last, inputs)

    return _claim(name, TOLERANCE, measure, note)


def _unchanged(past: _Past | None, trained: bool) -> Claim:
    """That all weights are the original's but for what was cut out and repaired."""
    name = "weights = original's"
    if past is None:
        return Claim(name=name, verdict="not tested", note=_NO_ORIGINAL)
    if trained:
        note = f"{past.weights.changed} tensors were trained since the cut"
        return Claim(name=name, verdict="not tested", note=note)
    changed = past.changed
    return Claim(
        name=name,
        verdict="failed" if changed else "proven",
        error=float(len(changed)),
        tolerance=0.0,
        note=f"{changed[0]!r} differs"
        if changed
        else f"bit for bit, but for {past.weights.repaired} repaired tensors",
    )


def _achieved(
    small: nn.Module,
    axes: Sequence[AxisCount],
    macs: tuple[int | None, int | None, int | None],
    plans: Sequence[Plan],
) -> Claim:
    """That units and parameters are as planned; MACs where they were counted on the same inputs."""
    last = plans[-1]
    like = plans[0].dense is not None and plans[0].dense.macs == macs[0]
    wrong = [axis for axis in axes if axis.achieved not in (None, axis.planned)]
    error = float(max((abs((a.achieved or 0) - a.planned) for a in wrong), default=0))
    note = f"{sum(axis.achieved is not None for axis in axes)} axes counted"
    if wrong:
        note = f"axis {wrong[0].name!r} has {wrong[0].achieved} units, {wrong[0].planned} planned"
    elif last.planned is not None and last.planned.params != count_params(small):
        error = float(abs(last.planned.params - count_params(small)))
        note = f"{last.planned.params:,} params were planned, {count_params(small):,} are there"
    elif like and macs[1] is not None and macs[2] is not None and macs[1] != macs[2]:
        error = float(abs(macs[1] - macs[2]))
        note = f"{macs[1]:,} multiply-accumulates were planned, {macs[2]:,} are there"
    return Claim(
        name="planned = achieved",
        verdict="failed" if error else "proven",
        error=error,
        tolerance=0.0,
        note=note,
    )


def _reloaded(small: nn.Module, inputs: Inputs) -> Claim:
    def measure() -> float:
        with tempfile.TemporaryDirectory() as scratch:
            folder = save_pretrained(small, Path(scratch) / "model", verify=False)
            loaded = from_pretrained(folder)
            if hash_of_weights(loaded) != hash_of_weights(small):
                raise LawError("reloaded weights must be equal; they differ.")
            return _difference(small, loaded, inputs)

    return _claim("cut = reloaded", 0.0, measure)


def _costly(name: str, small: nn.Module, inputs: Inputs, asked: bool) -> Claim:
    title = COSTLY[name]
    if not asked:
        return Claim(name=title, verdict="not tested", note=f"ask with --certify {name}")

    def onnx() -> float:
        with tempfile.TemporaryDirectory() as scratch:
            path = Path(scratch) / "model.onnx"
            forwards: Any = calls_of(inputs)
            return max(to_onnx(small, path, example_inputs=f).relative_error for f in forwards)

    measures: dict[str, Callable[[], float]] = {
        "compile": lambda: compile_error(small, inputs),
        "export": lambda: export_error(small, inputs),
        "onnx": onnx,
    }
    return _claim(title, TOLERANCES[name], measures[name])


def _claim(name: str, tolerance: float, measure: Callable[[], float], note: str = "") -> Claim:
    """What a measurement says: what disagrees has failed, what cannot be run was not tested."""
    try:
        error = measure()
    except LawError as fault:
        error, told = fault.relative_error, str(fault)
        known = None if error != error else error
        return Claim(name=name, verdict="failed", error=known, tolerance=tolerance, note=told)
    except Exception as fault:  # a compiler, an exporter or a runtime that is not there or gives up
        reason = f"{type(fault).__name__}: {str(fault).strip().partition(chr(10))[0]}"
        return Claim(name=name, verdict="not tested", tolerance=tolerance, note=reason)
    if not error <= tolerance:
        return Claim(name=name, verdict="failed", error=error, tolerance=tolerance, note=note)
    return Claim(name=name, verdict="proven", error=error, tolerance=tolerance, note=note)


def _difference(one: nn.Module, other: nn.Module, inputs: Inputs) -> float:
    """The largest relative error of outputs, in the models' own dtype.

    Raises:
        LawError: if one of them does not run.
    """
    one = clone(one)  # weights mapped from a file lie unaligned: kernels add in another order
    other = clone(other)
    dtype = next(p.dtype for p in one.parameters() if p.is_floating_point())
    try:
        return difference(one, other, [cast(call, dtype) for call in calls_of(inputs)])
    except Exception as error:
        raise LawError(f"both models must run; {type(error).__name__}: {error}") from error


# -- counts ----------------------------------------------------------------------------------------


def _structure(small: nn.Module) -> nn.Module | None:
    """The original's architecture without its weights; None where no family can build it."""
    from accelerate import init_empty_weights  # lazy: slow to import

    source = record_of(small).source
    family = None if source is None else FAMILIES[source["family"]]
    if source is None or family is None or family.build is None:
        return None
    try:
        with init_empty_weights(), torch.random.fork_rng(devices=[]):
            built: nn.Module = family.build(source["arguments"])
            return built
    except (CheckpointError, UnsupportedModelError, NotImplementedError):
        return None


def _params(model: nn.Module | None) -> int | None:
    return None if model is None else count_params(model)


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in ("vlprune", "torch", "timm", "open_clip_torch", "transformers", "numpy"):
        found[package] = importlib.metadata.version(package)
    return found
