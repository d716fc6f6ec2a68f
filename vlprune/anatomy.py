"""What can be removed from a model, as data: axes of units, where they lie, and what they cost.

An Anatomy holds names and numbers, never modules. It prices any plan, prints, compares and goes to
JSON. Making one from a model is `dissect.py`; acting on one is `gates.py` and `pruner.py`.

Legend of dimension letters, here and everywhere: B batch, T tokens, D width, F hidden (FFN), H
heads, K kv groups, E head dim, U units, L layers.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from typing import Literal

from vlprune.errors import UnknownNameError
from vlprune.timetable import LatencyTable

GateKind = Literal["input", "product", "output", "skip", "router"]
Removal = Literal["slice", "delete", "bypass"]
KnobMeaning = Literal["units", "kept", "layers", "states"]
SwapMoment = Literal["gate", "cut", "empty", "bypass"]
Growth = Literal["all", "scores", "mixture"]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Site:
    """Where the units of an axis lie in one tensor.

    Unit u occupies indices `offset + u * block` up to `offset + (u + 1) * block` of dimension
    `dim`, and the same again `stride`, 2 * `stride`, ... further on, `repeats` times in all: a
    feature that all heads share lies once in every head. A fused qkv projection is three sites of
    one axis.
    """

    tensor: str
    dim: int
    offset: int = 0
    block: int = 1
    repeats: int = 1
    stride: int = 0

    def indices(self, units: tuple[int, ...]) -> list[int]:
        """Return the indices along `dim` that `units` occupy, unit by unit."""
        return [
            self.offset + r * self.stride + u * self.block + i
            for u in units
            for r in range(self.repeats)
            for i in range(self.block)
        ]

    @property
    def size(self) -> int:
        """How many indices one unit occupies."""
        return self.block * self.repeats


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Gate:
    """Where one number per unit multiplies so that 0 means removed.

    "input" multiplies the input features of a module, or of several that read the same: `block`
    features per unit, the whole row `repeats` times over, along `dim` (1 for convolutions); the
    modules in `norms` take their statistics over kept features only. "product" multiplies what
    linear modules answer, at the rows that `sites` name in their weights (an "input" gate with
    `sites` does so, too: what stands between may not keep a zero). "output" multiplies what
    a residual branch returns, and "skip" interpolates between a module's residual input (0) and its
    output (1): both have one module per unit. `argument` is the position of the residual input
    among the module's arguments (None: by keyword only), `keyword` its name there. "router" keeps
    experts out of the choice made in a module; `sites` name the rows of the router (intercepts.py).
    `within` names modules that multiply with the matrices of `sites` without calling their modules.
    """

    kind: GateKind
    modules: tuple[str, ...]
    block: int = 1
    repeats: int = 1
    argument: int | None = 0
    keyword: str = "hidden_states"
    dim: int = -1
    norms: tuple[str, ...] = ()
    sites: tuple[Site, ...] = ()
    within: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Knob:
    """An attribute that must follow a cut: "units" counts the kept ones, `per_unit` each.

    A list with an entry per unit loses those of the removed; "kept" is the row of those that stay,
    numbered as they were at first. "layers" names layers by number;
    "states" names hidden states, of which state s comes after s layers; both may count from the
    end. A dotted attribute ("config.num_hidden_layers") sets a private copy of what it goes
    through.
    """

    module: str
    attribute: str
    per_unit: int = 1
    counts: KnobMeaning = "units"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Swap:
    """A class that a module takes on, by its importable name "package.module:Class".

    "gate" for as long as gates are on, "cut" when a unit was removed, "empty" when no unit is left,
    "bypass" when the part was removed.
    """

    module: str
    to: str
    when: SwapMoment


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Axis:
    """A row of like units in one place, for instance the 12 heads of one attention.

    Attributes:
        name: "path:kind", unique in an anatomy; an axis of sub-layers adds which
            ("path:sublayer.attention").
        kind: name of the strategy that removes it: "head", "ffn", "layer", "expert", ...
        tower: "vision", "text", "fusion" or "decoder".
        depth: index of the layer in its stack (0 for an axis of layers).
        units: number of units.
        removal: "slice" cuts rows and columns, "delete" takes items out of a ModuleList,
            "bypass" takes a part out of a block.
        scopes: module paths, one row per unit, that vanish with the unit ("delete", "bypass");
            for "slice" one row: the modules whose weightless operations grow with the axis.
        grows: which of these operations do: "all", or of an attention only its "scores" (queries
            by keys) or its "mixture" (scores by values).
        swaps: classes to take on; for "bypass" one per unit, in order.
        lists: ModuleLists with one module per unit, which vanishes with it ("slice" only).
        least: the fewest units that may stay: 1 where a class cannot compute with none, for
            experts as many as a token is sent to.
    """

    name: str
    kind: str
    tower: str
    depth: int
    units: int
    removal: Removal
    gate: Gate
    sites: tuple[Site, ...] = ()
    knobs: tuple[Knob, ...] = ()
    swaps: tuple[Swap, ...] = ()
    scopes: tuple[tuple[str, ...], ...] = ()
    grows: Growth = "all"
    lists: tuple[str, ...] = ()
    least: int = 0

    @property
    def path(self) -> str:
        """The module path that the name starts with."""
        return self.name.rpartition(":")[0]

    def layer(self, unit: int) -> int:
        """The index in its stack of the layer that `unit` belongs to."""
        if self.removal == "slice":
            return self.depth
        return int(self.gate.modules[unit].removeprefix(self.path + ".").partition(".")[0])


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class TensorShape:
    """A parameter or buffer by its first name; tied names appear once."""

    name: str
    shape: tuple[int, ...]
    is_parameter: bool = True


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Operation:
    """Multiply-accumulates of one module.

    Proportional to the size of every weight in `tensors`, or, for what multiplies features with
    features, to the kept share of every axis in `axes`.
    """

    module: str
    macs: int
    tensors: tuple[str, ...] = ()
    axes: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Refusal:
    """A module that is left whole, and why; `kind` as of an axis, "" where it concerns all."""

    module: str
    reason: str
    kind: str = ""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Anatomy:
    """All that can be removed from a model, and the shapes to price any plan without it.

    `operations` counts one call on the example inputs that the model was dissected with. `latency`
    is there where plans shall be priced in milliseconds, too (`latency.with_latency`).
    """

    model: str
    axes: tuple[Axis, ...]
    tensors: tuple[TensorShape, ...]
    operations: tuple[Operation, ...] = ()
    refusals: tuple[Refusal, ...] = ()
    latency: LatencyTable | None = None

    def axis(self, name: str) -> Axis:
        """Return the axis with this name.

        Raises:
            UnknownNameError: if there is none.
        """
        for axis in self.axes:
            if axis.name == name:
                return axis
        raise UnknownNameError(
            f"axis {name!r} is not in this anatomy of {self.model}; it has {len(self.axes)} axes, "
            f"such as {', '.join(a.name for a in self.axes[:3])}."
        )

    def select(self, kinds: tuple[str, ...], towers: tuple[str, ...] = ()) -> Anatomy:
        """Return the same anatomy with only the axes of these kinds (and towers), to be scored."""
        axes = [a for a in self.axes if a.kind in kinds and (not towers or a.tower in towers)]
        return dataclasses.replace(self, axes=tuple(axes))

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds of axes it has, sorted."""
        return tuple(sorted({axis.kind for axis in self.axes}))

    @property
    def fingerprint(self) -> str:
        """A short hash of all parameter shapes: equal for two models of one structure.

        A plan carries it, so that a plan is never applied to a model of another structure. It does
        not depend on which axes were selected or on the example inputs.
        """
        return fingerprint_of(self.model, self.tensors)


@functools.lru_cache(maxsize=64)
def fingerprint_of(model: str, tensors: tuple[TensorShape, ...]) -> str:
    """Return the fingerprint of a class name and its parameter shapes.

    Buffers do not count: some models make or grow theirs when they run.
    """
    parameters = sorted((t for t in tensors if t.is_parameter), key=lambda t: t.name)
    rows = [model, [(t.name, t.shape) for t in parameters]]
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()[:16]


def under(path: str, scope: str) -> bool:
    """Say whether the dotted `path` is `scope` or lies inside of it."""
    return path == scope or path.startswith(scope + ".")
