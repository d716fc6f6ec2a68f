"""What is taken out at once: one head, one layer, one group of neurons."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

from torch import Tensor, nn

from vlprune.anatomy import Anatomy, Axis, under


@dataclasses.dataclass(frozen=True, slots=True)
class Removal:
    """Units of one axis that are out together; of layers the first comes first."""

    axis: str
    units: tuple[int, ...]

    @property
    def name(self) -> str:
        """A key for stores: the axis and its units, runs of numbers shortened."""
        return f"{self.axis}/{_runs(self.units)}"

    def rest(self, axis: Axis) -> dict[str, tuple[int, ...]]:
        """Return what stays of its axis, as plans and gates take it."""
        gone = set(self.units)
        return {self.axis: tuple(unit for unit in range(axis.units) if unit not in gone)}


def groups_of(order: Tensor, num_groups: int) -> list[tuple[int, ...]]:
    """Return units, sorted from the least to the most important, cut into equal groups."""
    parts = order.tensor_split(min(num_groups, len(order)))
    return [tuple(part.tolist()) for part in parts]


def block_of(model: nn.Module, axis: Axis, unit: int) -> str:
    """Return the module that a removal happens in: the innermost block, or the axis's own module.

    A block is an item of a list, with a number for a name, that holds the axis (or is the unit).
    """
    place = axis.gate.modules[unit if axis.removal != "slice" else 0]
    inside = axis.path if axis.removal == "slice" else place
    modules = dict(model.named_modules())
    steps = inside.split(".")
    for size in range(len(steps), 0, -1):
        path, name = ".".join(steps[:size]), steps[size - 1]
        parent = modules[".".join(steps[: size - 1])]
        if name.isdigit() and isinstance(parent, (nn.ModuleList, nn.Sequential)):
            return path
    return inside


def by_block(
    model: nn.Module, anatomy: Anatomy, removals: Sequence[Removal]
) -> dict[str, list[Removal]]:
    """Return the removals of every block, blocks in the order of the model's modules."""
    axes = {axis.name: axis for axis in anatomy.axes}
    found: dict[str, list[Removal]] = {}
    for removal in removals:
        block = block_of(model, axes[removal.axis], removal.units[0])
        found.setdefault(block, []).append(removal)
    order = {path: i for i, (path, _) in enumerate(model.named_modules())}
    return dict(sorted(found.items(), key=lambda entry: order[entry[0]]))


def stack_of(block: str) -> str:
    """Return the list that a block is an item of; the block itself where it is in none."""
    owner, _, name = block.rpartition(".")
    return owner if name.isdigit() else block


def watched_modules(model: nn.Module, blocks: Sequence[str]) -> Iterator[str]:
    """Yield the modules whose answers are recorded: with weights, and not inside of a block."""
    for path, module in model.named_modules():
        inside = any(under(path, block) and path != block for block in blocks)
        if path and not inside and next(module.parameters(), None) is not None:
            yield path


def _runs(units: Sequence[int]) -> str:
    parts: list[list[int]] = []
    for unit in units:
        if parts and unit == parts[-1][1] + 1:
            parts[-1][1] = unit
        else:
            parts.append([unit, unit])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in parts)
