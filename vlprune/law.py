"""The law of the house, checked: the masked model computes what the cut model computes.

Both run in float64 on the example inputs, as copies. Where they disagree, the first module whose
outputs differ is named.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vlprune.calls import (
    Call,
    Inputs,
    WideFloats,
    answers_of,
    calls_of,
    cast,
    float64_default,
    quiet_eval,
    removing,
    run,
    tensors_of,
)
from vlprune.copies import exact_clone
from vlprune.errors import LawError
from vlprune.faults import check_weights
from vlprune.gates import Gates
from vlprune.plan import Plan

TOLERANCE = 1e-9
_HIDDEN = 1e30


def check_masked_equals_cut(
    dense: nn.Module,
    cut: nn.Module,
    plan: Plan,
    example_inputs: Inputs,
    *,
    tolerance: float = TOLERANCE,
) -> float:
    """Return the largest relative error between the masked `dense` and the `cut` model.

    The relative error of two tensors is the largest absolute difference over the largest absolute
    value of the masked one's.

    Raises:
        LawError: if it is above `tolerance`, or the outputs differ in number or shape.
        ValueError: if weights are not finite: named.
    """
    check_weights(dense)  # where all is NaN, all agrees
    calls = [cast(call, torch.float64) for call in calls_of(example_inputs)]
    masked64, cut64 = exact_clone(dense), exact_clone(cut)
    with (
        quiet_eval(masked64),
        quiet_eval(cut64),
        torch.no_grad(),
        Gates(masked64, plan.axes) as gates,
    ):
        gates.keep(plan.keep)
        error = _disagreement(masked64, cut64, calls)
        if not error <= tolerance:  # a NaN is no agreement either; float32 asked for by name rounds
            with contextlib.suppress(LawError), WideFloats():
                exact = _disagreement(masked64, cut64, calls)
                error = exact if exact <= tolerance else error
        if not error <= tolerance:
            module = _first_difference(masked64, cut64, calls, plan, tolerance)
            raise LawError(
                f"masked and cut model must agree to {tolerance:g}; got a relative error of "
                f"{error:.3g}, first at module {module or '(the outputs only)'!r} of "
                f"{type(dense).__name__}. The cut model is not returned; keep this module whole, "
                "or declare its class in a family.",
                module=module,
                relative_error=error,
            )
    return error


def _disagreement(masked: nn.Module, cut: nn.Module, calls: Sequence[Call]) -> float:
    expected = _run(masked, calls, "masked")
    return relative_error_of_outputs(expected, _run(cut, calls, "cut"))


def relative_error(expected: Tensor, got: Tensor) -> float:
    """Return max |got - expected| / max |expected|; 0 for two empty tensors, inf for shapes.

    Entries that a model hides (infinite, or the smallest number of a dtype) must be equal, and do
    not count in either maximum: nothing else would show beside them.
    """
    if expected.shape != got.shape:
        return float("inf")
    if expected.numel() == 0:
        return 0.0
    if not expected.is_floating_point():
        return 0.0 if torch.equal(expected, got) else float("inf")
    same = (expected == got) | (expected.isnan() & got.isnan())
    if bool(same.all()):
        return 0.0
    hidden = expected.abs() > _HIDDEN
    if not torch.equal(hidden, got.abs() > _HIDDEN) or not bool(same[hidden].all()):
        return float("inf")
    seen, other = expected[~hidden], got[~hidden]
    difference = float((other - seen).abs().max())
    return difference / max(float(seen.abs().max()), torch.finfo(expected.dtype).tiny)


def relative_error_of_outputs(expected: Any, got: Any) -> float:
    """Return the largest relative error between two answers; inf for none, or another number.

    Attention weights [batch, heads, target, source] may have fewer heads, for as long as there is
    anything else to compare.
    """
    before, after = list(answers_of(expected)), list(answers_of(got))
    if len(before) != len(after):
        return float("inf")
    pairs = [(a, b) for a, b in zip(before, after, strict=True) if not _lost_heads(a, b)]
    errors = [relative_error(a, b) for a, b in pairs]
    return max((float("inf") if e != e else e for e in errors), default=float("inf"))


def difference(one: nn.Module, other: nn.Module, calls: Iterable[Call]) -> float:
    """Return the largest relative error between what two models answer to the same calls."""
    with torch.no_grad(), quiet_eval(one), quiet_eval(other):
        return max(relative_error_of_outputs(run(one, call), run(other, call)) for call in calls)


def _lost_heads(expected: Tensor, got: Tensor) -> bool:
    """Say whether these may be attention weights, before and after a cut."""
    if expected.dim() != 4 or got.dim() != 4:
        return False
    (batch, heads, *rest), (batch_, heads_, *rest_) = expected.shape, got.shape
    return (batch, rest) == (batch_, rest_) and heads_ < heads


def _outputs(model: nn.Module, calls: Sequence[Call]) -> list[Tensor]:
    return [tensor for call in calls for tensor in answers_of(run(model, call))]


def _run(model: nn.Module, calls: Sequence[Call], which: str) -> list[Tensor]:
    try:
        return _outputs(model, calls)
    except Exception as error:
        for wide in (contextlib.nullcontext(), WideFloats()):  # for what it makes on its way
            with contextlib.suppress(Exception), float64_default(), wide:
                return _outputs(model, calls)
        raise LawError(
            f"the {which} {type(model).__name__} must run in float64; it raised "
            f"{type(error).__name__}: {error}. Nothing was proven and no cut model is returned.",
            module=_raising_module(model, calls),
        ) from error


def _first_difference(
    masked: nn.Module,
    cut: nn.Module,
    calls: Sequence[Call],
    plan: Plan,
    tolerance: float,
) -> str:
    """The innermost module that is first, in order of execution, to answer differently."""
    now = _names_after(masked, plan)
    expected = _trace(masked, calls)
    got = dict(_trace(cut, calls))
    for (path, visit), tensors in expected:
        renamed = now[path]
        other = got.get((renamed, visit)) if renamed is not None else None
        comparable = other is not None and [t.shape for t in tensors] == [t.shape for t in other]
        if comparable and other and not relative_error_of_outputs(tensors, other) <= tolerance:
            return path
    return ""


def _names_after(model: nn.Module, plan: Plan) -> dict[str, str | None]:
    """Module path before the cut to path after it, None where it is gone."""
    names: dict[str, str | None] = {path: path for path, _ in model.named_modules()}
    for row in plan.rows:
        whole = [row.axis.path] if row.axis.removal == "delete" else []
        for holder in (*whole, *row.axis.lists):
            inside = holder + "."
            gone = {row.axis.layer(u) if whole else u for u in row.removed}
            for path in [path for path in names if path.startswith(inside)]:
                index, dot, rest = path.removeprefix(inside).partition(".")
                place = int(index)
                now = place - sum(layer < place for layer in gone)
                names[path] = None if place in gone else f"{inside}{now}{dot}{rest}"
    return names


def _trace(model: nn.Module, calls: Sequence[Call]) -> list[tuple[tuple[str, int], list[Tensor]]]:
    """((module path, visit), outputs) of every module, in the order in which they answer."""
    seen: list[tuple[tuple[str, int], list[Tensor]]] = []
    visits: dict[str, int] = {}

    def note(path: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            visits[path] = visits.get(path, -1) + 1
            kept = [t.clone() for t in tensors_of(output) if t.is_floating_point()]
            seen.append(((path, visits[path]), kept))

        return hook

    handles = [m.register_forward_hook(note(path)) for path, m in model.named_modules() if path]
    with removing(handles):
        for call in calls:
            run(model, call)
    return seen


def _raising_module(model: nn.Module, calls: Sequence[Call]) -> str:
    """The path of the innermost module inside which a forward raises."""
    inside: list[str] = []
    handles = [
        module.register_forward_pre_hook(lambda m, a, path=path: inside.append(path))
        for path, module in model.named_modules()
    ]
    handles += [
        module.register_forward_hook(lambda m, a, o: inside.pop() and None)
        for module in model.modules()
    ]
    try:
        for call in calls:
            run(model, call)
    except Exception:
        return inside[-1] if inside else ""
    finally:
        for handle in handles:
            handle.remove()
    return ""
