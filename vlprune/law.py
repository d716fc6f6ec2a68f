"""The law of the house, checked: the masked model computes what the cut model computes.

Both run in float64 on the example inputs, as copies. Where they disagree, the first module whose
outputs differ is named.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vlprune.calls import Call, Inputs, calls_of, cast, quiet_eval, run, tensors_of
from vlprune.copies import exact_clone
from vlprune.errors import LawError
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
    """
    calls = [cast(call, torch.float64) for call in calls_of(example_inputs)]
    masked64, cut64 = exact_clone(dense), exact_clone(cut)
    with (
        quiet_eval(masked64),
        quiet_eval(cut64),
        torch.no_grad(),
        Gates(masked64, plan.axes) as gates,
    ):
        gates.keep(plan.keep)
        expected = _outputs(masked64, calls)
        got = _run_cut(cut64, calls, plan, masked64)
        error = _compare(expected, got)
        if not error <= tolerance:  # a NaN is no agreement either
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
    """Return the largest relative error between two answers of a module.

    Attention weights [batch, heads, ...] after the first tensor may have fewer heads.
    """
    pairs = list(zip(tensors_of(expected), tensors_of(got), strict=False))
    if len(list(tensors_of(expected))) != len(list(tensors_of(got))):
        return float("inf")
    errors = [
        relative_error(a, b)
        for i, (a, b) in enumerate(pairs)
        if i == 0 or a.shape == b.shape or a.dim() != 4
    ]
    return max((float("inf") if e != e else e for e in errors), default=float("inf"))


def _outputs(model: nn.Module, calls: Sequence[Call]) -> list[Tensor]:
    return [tensor for call in calls for tensor in tensors_of(run(model, call))]


def _run_cut(cut: nn.Module, calls: Sequence[Call], plan: Plan, dense: nn.Module) -> list[Tensor]:
    try:
        return _outputs(cut, calls)
    except Exception as error:
        raise LawError(
            f"the cut {type(dense).__name__} must run as the masked one does; it raised "
            f"{type(error).__name__}: {error}. The cut model is not returned.",
            module=_raising_module(cut, calls),
        ) from error


def _compare(expected: Sequence[Tensor], got: Sequence[Tensor]) -> float:
    if len(expected) != len(got):
        return float("inf")
    errors = [relative_error(a, b) for a, b in zip(expected, got, strict=True)]
    return max((float("inf") if e != e else e for e in errors), default=0.0)


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
        if comparable and other is not None and not _compare(tensors, other) <= tolerance:
            return path
    return ""


def _names_after(model: nn.Module, plan: Plan) -> dict[str, str | None]:
    """Module path before the cut to path after it, None where it is gone."""
    names: dict[str, str | None] = {path: path for path, _ in model.named_modules()}
    for row in plan.rows:
        if row.axis.removal == "delete":
            inside = row.axis.path + "."
            gone = {row.axis.layer(unit) for unit in row.removed}
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
    try:
        for call in calls:
            run(model, call)
    finally:
        for handle in handles:
            handle.remove()
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
