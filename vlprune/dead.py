"""Units without any effect: removed ones cost nothing, kept ones could go, too."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from vlprune.calls import Inputs, answers_of, calls_of, cast, frozen, quiet_eval, run
from vlprune.certificate import Dead
from vlprune.copies import exact_clone
from vlprune.gates import Gates, zeros_and_ones
from vlprune.law import TOLERANCE, relative_error_of_outputs
from vlprune.plan import Plan

_DEAD = 1e-12


def dead_units(dense: nn.Module, plan: Plan, inputs: Inputs) -> tuple[Dead, ...]:
    """Return units without which, all at once, no output changes: by gradient, then by trial.

    Args:
        dense: before the plan; left as it was.
        plan: whose axes are looked at.
        inputs: what outputs are compared on, in float64.
    """
    model = exact_clone(dense)
    calls = [cast(call, torch.float64) for call in calls_of(inputs)]
    axes = plan.axes
    with quiet_eval(model), frozen(model), Gates(model, axes) as gates:
        expected = [list(answers_of(run(model, call))) for call in calls]
        for axis in axes:
            gates.values[axis.name] = torch.ones(axis.units, dtype=torch.float64).requires_grad_()
        generator = torch.Generator().manual_seed(0)
        for call in calls:
            answers = [a for a in answers_of(run(model, call)) if a.requires_grad]
            directions = [torch.randn(a.shape, generator=generator, dtype=a.dtype) for a in answers]
            seen = [a.masked_fill(a.abs() > 1e30, 0) for a in answers]
            if seen:
                torch.autograd.backward(seen, directions)
        gradients = {name: _gradient(value) for name, value in gates.values.items()}
        most = max(float(g.max()) for g in gradients.values())
        candidates = [
            (name, unit)
            for name, gradient in gradients.items()
            for unit in (gradient <= _DEAD * most).nonzero().flatten().tolist()
        ]

        def unchanged(units: Sequence[tuple[str, int]]) -> bool:
            for axis in axes:
                off = {unit for name, unit in units if name == axis.name}
                stay = [unit for unit in range(axis.units) if unit not in off]
                gates.values[axis.name] = zeros_and_ones(stay, torch.ones(axis.units))
            with torch.no_grad():
                got = [list(answers_of(run(model, call))) for call in calls]
            return relative_error_of_outputs(expected, got) <= TOLERANCE

        dead = set(_without_effect(candidates, unchanged))
    rows = (
        Dead(
            name=row.axis.name,
            removed=tuple(unit for unit in row.removed if (row.axis.name, unit) in dead),
            kept=tuple(unit for unit in row.keep if (row.axis.name, unit) in dead),
        )
        for row in plan.rows
    )
    return tuple(row for row in rows if row.removed or row.kept)


def _gradient(value: Tensor) -> Tensor:
    return torch.zeros_like(value) if value.grad is None else value.grad.abs()


def _without_effect(
    units: list[tuple[str, int]], unchanged: Callable[[Sequence[tuple[str, int]]], bool]
) -> list[tuple[str, int]]:
    """The units of a list that can go, found by halving where not all can."""
    if not units or unchanged(units):
        return units
    if len(units) == 1:
        return []
    half = len(units) // 2
    return [
        *_without_effect(units[:half], unchanged),
        *_without_effect(units[half:], unchanged),
    ]
