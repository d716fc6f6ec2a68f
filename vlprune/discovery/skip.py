"""Which layers of a stack can go, and what counts them: tried out on the model itself.

The model with skipped layers (gates) and a copy without them, which shares all tensors, must answer
alike. A layer that fails is named: others may read what it hands on beside the residual stream.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

from vlprune.anatomy import Axis, Knob, KnobMeaning
from vlprune.calls import Call, quiet_eval, run, tensors_of
from vlprune.copies import shared_copy
from vlprune.cutting import cut_
from vlprune.gates import Gates
from vlprune.law import relative_error_of_outputs
from vlprune.plan import PlanRow
from vlprune.shapes import QuickShapes

_DEPTHS = (
    "num_hidden_layers",
    "num_layers",
    "n_layers",
    "n_layer",
    "depth",
    "layers",
    "layer_types",
)
_NUMBERS: dict[str, KnobMeaning] = {
    "vision_feature_layer": "states",
    "vision_feature_layers": "states",
    "feature_layer": "states",
    **dict.fromkeys(
        [
            "extract_layers",
            "out_indices",
            "deepstack_visual_indexes",
            "fullatt_block_indexes",
            "intermediate_layers_indices",
            "global_attn_indexes",
            "feature_select_layer",
        ],
        "layers",
    ),
}
_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}


def fault(model: nn.Module, calls: Sequence[Call], axis: Axis, keep: tuple[int, ...]) -> str:
    """Return why the cut `model` is not the masked one, when only `keep` of `axis` stays; or ""."""
    return fault_of(model, calls, [PlanRow(axis=axis, keep=keep)])


def fault_of(model: nn.Module, calls: Sequence[Call], rows: Sequence[PlanRow]) -> str:
    """Return why the `model` that is cut by `rows` is not the masked one; or ""."""
    cut = shared_copy(model)
    with quiet_eval(model), torch.no_grad(), QuickShapes():
        try:
            cut_(cut, rows)
            got = [run(cut.eval(), call) for call in calls]
        except Exception as error:
            said = str(error).partition("\n")[0]
            return f"{type(error).__name__}: {said}"
        if not has_data(model):
            return ""  # nothing to compare: shapes ran through
        with Gates(model, [row.axis for row in rows]) as gates:
            gates.keep({row.axis.name: row.keep for row in rows})
            expected = [run(model, call) for call in calls]
    pairs = list(zip(expected, got, strict=True))
    error_size = max(relative_error_of_outputs(*pair) for pair in pairs)
    dtype = next((t.dtype for t in tensors_of(expected) if t.is_floating_point()), torch.float32)
    if error_size <= _TOLERANCE.get(dtype, 5e-2):
        return ""
    return f"masked and cut model differ by {error_size:.2g}"


def has_data(model: nn.Module) -> bool:
    """Say whether `model` has its weights; else only shapes can be tried."""
    return not any(parameter.is_meta for parameter in model.parameters())


def keeps_to_try(units: int, thorough: bool = True) -> Iterator[tuple[int, ...]]:
    """Yield what to keep in a trial: some without either end.

    If it is to be thorough also one end alone, and all but one end.
    """
    everything = tuple(range(units))
    inner = everything[1:-1]
    draw = random.Random(units)
    kept = [tuple(sorted(draw.sample(inner, (len(inner) + 1) // 2))), everything[1:]]
    if thorough:
        kept += [everything[-1:], everything[:1], everything[:-1]]
    found = dict.fromkeys(keep for keep in kept if len(keep) < units and (keep or units == 1))
    yield from list(found)[: None if thorough else 1]


def knob_sets(model: nn.Module, stack: str, depth: int) -> list[tuple[Knob, ...]]:
    """Return sets of knobs that may have to follow a stack of `depth` layers, to be tried in turn.

    Looked for on every module around the stack and on its config: what counts the layers, and what
    names layers or hidden states by number.
    """
    counts: list[Knob] = []
    numbers: list[Knob] = []
    path = stack
    while path:
        path = path.rpartition(".")[0]
        module: Any = model.get_submodule(path)
        for prefix, holder in (("", module), ("config.", getattr(module, "config", None))):
            if holder is not None:
                counts += _counts(path, prefix, holder, depth)
                numbers += _numbers(path, prefix, holder, depth)
    sets = [tuple(counts), (*counts, *numbers), (), tuple(numbers)]
    return list(dict.fromkeys(sets))


def _counts(path: str, prefix: str, holder: Any, depth: int) -> list[Knob]:
    values = [(name, getattr(holder, name, None)) for name in _DEPTHS]
    return [
        Knob(module=path, attribute=prefix + name)
        for name, value in values
        if (type(value) is int and value == depth)
        or (isinstance(value, (list, tuple)) and len(value) == depth)
    ]


def _numbers(path: str, prefix: str, holder: Any, depth: int) -> list[Knob]:
    knobs = []
    for name, meaning in _NUMBERS.items():
        value = getattr(holder, name, None)
        entries = list(value) if isinstance(value, (list, tuple)) else [value]
        if entries and all(type(v) is int and -depth - 1 <= v <= depth for v in entries):
            knobs.append(Knob(module=path, attribute=prefix + name, counts=meaning))
    return knobs
