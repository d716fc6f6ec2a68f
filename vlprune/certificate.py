"""What was proven of a cut model, as names and numbers: claims, counts, hashes.

Made by `certify.py`, kept in `certificate.json` beside the model (`store.py`). What was not tested
is said to be so.
"""

from __future__ import annotations

import collections
import dataclasses
import hashlib
import json
from collections.abc import Iterable
from typing import Any, Literal

from torch import Tensor, nn

from vlprune.calls import bytes_of, tensors_of
from vlprune.plan import Plan, show_limit

Verdict = Literal["proven", "failed", "not tested"]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Claim:
    """One thing that was to be proven.

    Attributes:
        name: such as "masked = cut".
        verdict: "not tested" where there was no asking for it, or no way; `note` says why.
        error: the largest, relative where outputs are compared; None where it has no number.
        tolerance: what it must not exceed.
        note: of what exactly it was proven, or why not.
    """

    name: str
    verdict: Verdict
    error: float | None = None
    tolerance: float | None = None
    note: str = ""

    def __str__(self) -> str:
        numbers = ""
        if self.error is not None and self.tolerance is not None:
            numbers = f" to {self.error:.1e} (tolerance {self.tolerance:g})"
        return f"{self.name:<20} {self.verdict}{numbers}{'; ' if self.note else ''}{self.note}"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class AxisCount:
    """Units of one axis: in the original, planned, and counted in the cut model (None: cannot)."""

    name: str
    tower: str
    kind: str
    depth: int
    units: int
    planned: int
    achieved: int | None


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Dead:
    """Units of one axis without which all outputs stay the same, removed and kept ones."""

    name: str
    removed: tuple[int, ...]
    kept: tuple[int, ...]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Weights:
    """How many tensors are the original's (but for what was cut out), repaired, or otherwise."""

    equal: int
    repaired: int
    changed: int


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Certificate:
    """What was proven of a cut model.

    Attributes:
        model: its class.
        claims: each with its largest error and tolerance.
        asked: the budget of the last plan.
        params: of the original, planned, and counted; None where unknown.
        macs: on the inputs: of the original, and counted; between them what was planned on the
            inputs that the plan was made with.
        axes: asked, planned and achieved layer by layer.
        dead: units whose removal changed nothing; None where that was not looked for.
        weights: what the tensors are beside the original's; None without it.
        made_by: of every plan: metric, allocation, seeds, versions.
        versions: of what certified.
        hashes: SHA-256 of "weights", "original", "plans", "inputs" and "data", where there are any.
    """

    model: str
    claims: tuple[Claim, ...]
    asked: dict[str, float]
    params: tuple[int | None, int | None, int]
    axes: tuple[AxisCount, ...]
    dead: tuple[Dead, ...] | None
    weights: Weights | None
    made_by: tuple[dict[str, Any], ...]
    versions: dict[str, str]
    hashes: dict[str, str]
    macs: tuple[int | None, int | None, int | None] = (None, None, None)

    @property
    def failed(self) -> tuple[Claim, ...]:
        """The claims that do not hold."""
        return tuple(claim for claim in self.claims if claim.verdict == "failed")

    def claim(self, name: str) -> Claim:
        """Return the claim of that name."""
        return next(claim for claim in self.claims if claim.name == name)

    def __str__(self) -> str:
        lines = [f"certificate of {self.model}", *(f"  {claim}" for claim in self.claims)]
        lines += [f"  {line}" for line in (*self._budget(), *self._counts(), self._dead())]
        if self.weights:
            w = self.weights
            lines.append(
                f"  weights  {w.equal} tensors are the original's, {w.repaired} repaired, "
                f"{w.changed} otherwise changed"
            )
        lines += [f"  {name:<8} sha256 {digest[:16]}..." for name, digest in self.hashes.items()]
        lines.append("  " + ", ".join(f"{k} {v}" for k, v in self.versions.items()))
        return "\n".join(lines)

    def _budget(self) -> list[str]:
        asked = ", ".join(f"{key} {show_limit(value)}" for key, value in self.asked.items())
        dense, planned, achieved = map(_number, self.params)
        return [
            f"asked    {asked or 'no budget'}",
            f"params   {dense} dense, {planned} planned, {achieved} achieved",
            "macs     {} dense, {} planned, {} achieved".format(*map(_number, self.macs)),
        ]

    def _counts(self) -> list[str]:
        return [
            f"{tower} {kind}: {' '.join(_count(axis) for axis in axes)} of "
            f"{axes[0].units} planned = achieved, by layer"
            for (tower, kind), axes in self.groups().items()
        ]

    def groups(self) -> dict[tuple[str, str], list[AxisCount]]:
        """The axes by tower and kind, in order of depth."""
        groups: dict[tuple[str, str], list[AxisCount]] = collections.defaultdict(list)
        for axis in self.axes:
            groups[axis.tower, axis.kind].append(axis)
        return dict(groups)

    def _dead(self) -> str:
        if self.dead is None:
            return "dead     units: not looked for"
        gone, kept = (
            sum(len(getattr(d, which)) for d in self.dead) for which in ("removed", "kept")
        )
        return f"dead     units without any effect: {gone} of the removed, {kept} of the kept"


def _number(value: int | None) -> str:
    return "?" if value is None else f"{value:,}"


def _count(axis: AxisCount) -> str:
    if axis.achieved == axis.planned:
        return str(axis.planned)
    return f"{axis.planned}{'(not counted)' if axis.achieved is None else f'!={axis.achieved}'}"


def hash_of_weights(model: nn.Module) -> str:
    """Return the SHA-256 of names, types, shapes and values of all that is saved of a model."""
    return hash_of_tensors(model.state_dict().items())


def hash_of_values(values: Any) -> str:
    """Return the SHA-256 of all tensors in inputs or batches."""
    return hash_of_tensors((str(i), t) for i, t in enumerate(tensors_of(values)))


def hash_of_tensors(named: Iterable[tuple[str, Tensor]]) -> str:
    """Return the SHA-256 of names, types, shapes and values; "" where there are no values."""
    digest = hashlib.sha256()
    for name, tensor in named:
        if tensor.is_meta:
            return ""
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(bytes_of(tensor))
    return digest.hexdigest()


def hash_of_plans(plans: Iterable[Plan]) -> str:
    """Return the SHA-256 of plans: all that they say, sites, knobs and class swaps included."""
    told = [dataclasses.asdict(plan) for plan in plans]
    for plan in told:  # as a file gives them back
        plan["asked"] = {name: float(value) for name, value in plan["asked"].items()}
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()
