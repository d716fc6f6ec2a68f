"""Gradients to unit numbers: which rows of which tensor feed each unit, by few backward passes.

With the subsets "bit b of the unit's number is 1" and "is 0", 2 * log2(units) backward passes spell
out, row by row, the number of the one unit that it feeds. Rows that feed all units are common and
stay; rows that feed some but not all say that the split is too fine.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from vlprune.anatomy import Site
from vlprune.discovery.tracing import Source, Use

COMMON, DEAD = -1, -2


def reached(sources: Sequence[Source], uses: Sequence[Use]) -> list[Source]:
    """The sources that any feature depends on."""
    tensors = [source.tensor for source in sources]
    gradients = torch.autograd.grad(
        [use.x for use in uses],
        tensors,
        [torch.ones_like(use.x) for use in uses],
        retain_graph=True,
        allow_unused=True,
    )
    return [s for s, gradient in zip(sources, gradients, strict=True) if gradient is not None]


RESIDUAL = "units stay: an input of the block has entries of its own for each"
GIVEN = "units stay: an input of the block has entries of its own for some of them together"

Codes = dict[tuple[int, int], Tensor]  # (source number, dim) -> unit of every row


class _Rows:
    """What the subsets so far say about the rows of one dimension of one source."""

    def __init__(self, size: int):
        self.code = torch.zeros(size, dtype=torch.long)
        self.single = torch.ones(size, dtype=torch.bool)
        self.everywhere = torch.ones(size, dtype=torch.bool)
        self.dead = torch.ones(size, dtype=torch.bool)
        self._bits = 0  # of the number of every row's unit that are known, highest first

    def add_bit(self, bit: int, one: Tensor, zero: Tensor) -> None:
        """Take in which rows the units with this bit reach, and those without it."""
        self._bits += 1
        self.code |= one.long() << bit
        self.single &= one ^ zero
        self.everywhere &= one & zero
        self.dead &= ~one & ~zero

    def add_unit(self, unit: int, reached: Tensor) -> None:
        """Take in which rows one unit alone reaches."""
        self.single &= (self.code == unit) == reached
        self.everywhere &= reached
        self.dead &= ~reached

    def is_in_order(self, units: int) -> bool:
        """Whether there may be the same number of rows for each unit, one unit after the other."""
        size = len(self.code)
        known = self.single & ~self.everywhere & ~self.dead
        place = torch.arange(size) * units // max(size, 1)
        mask = (1 << self._bits) - 1 << (units - 1).bit_length() - self._bits
        return size % units == 0 and torch.equal(self.code[known] & mask, place[known] & mask)

    @property
    def is_partial(self) -> bool:
        """Whether a row feeds some units, but neither one nor all."""
        return bool((~(self.single | self.everywhere | self.dead)).any())

    def units(self) -> Tensor:
        """The unit of every row; COMMON or DEAD where it has none."""
        code = torch.where(self.single & ~self.everywhere, self.code, COMMON)
        return torch.where(self.dead, DEAD, code)


def decode(
    uses: Sequence[Use], sources: Sequence[Source], units: int, heads: Collection[int]
) -> Codes | str:
    """The unit of every row of every source, or why this split is none."""
    generator = torch.Generator().manual_seed(units)
    noise = [torch.randn(u.x.shape, generator=generator, dtype=u.x.dtype) for u in uses]
    rows = {
        (number, dim): _Rows(size)
        for number, source in enumerate(sources)
        for dim, size in enumerate(source.tensor.shape)
        if not source.rows or dim in source.rows
    }
    numbers = torch.arange(units)
    features = uses[0].x.shape[uses[0].dim]
    for bit in reversed(range((units - 1).bit_length())):
        has_bit = (numbers >> bit & 1).bool()
        one = reaches(uses, sources, noise, has_bit)
        zero = reaches(uses, sources, noise, ~has_bit)
        for (number, dim), row in rows.items():
            row.add_bit(bit, one[number](dim), zero[number](dim))
        fault = _fault(sources, rows, units, features, heads)
        if fault:
            return fault
    for unit in {0, units // 2}:
        reached = reaches(uses, sources, noise, numbers == unit)
        for (number, dim), row in rows.items():
            row.add_unit(unit, reached[number](dim))
    codes = {key: row.units() for key, row in rows.items()}
    assert all(int(code.max()) < units for code in codes.values() if len(code)), units
    return _fault(sources, rows, units, features, heads) or codes


def _fault(
    sources: Sequence[Source],
    rows: Mapping[tuple[int, int], _Rows],
    units: int,
    features: int,
    heads: Collection[int],
) -> str:
    for (number, _), row in rows.items():
        source = sources[number]
        if source.rows and row.is_partial:
            name = next(iter(source.rows.values()))[0][0]
            return f"units stay: rows of {name} feed several of them, not all"
        alone = not source.rows and bool((row.single & ~row.everywhere & ~row.dead).any())
        is_per_unit = source.place is not None and units != features and row.is_in_order(units)
        if alone and not is_per_unit:
            return GIVEN if len(row.single) in heads else RESIDUAL
    return ""


def reaches(
    uses: Sequence[Use], sources: Sequence[Source], noise: Sequence[Tensor], subset: Tensor
) -> list[Callable[[int], Tensor]]:
    """For every source: dimension -> which of its rows the units of `subset` depend on."""
    seeds = [_masked(use, tensor, subset) for use, tensor in zip(uses, noise, strict=True)]
    gradients = torch.autograd.grad(
        [use.x for use in uses],
        [source.tensor for source in sources],
        seeds,
        retain_graph=True,
        allow_unused=True,
    )
    return [_nonzero_rows(s.tensor, g) for s, g in zip(sources, gradients, strict=True)]


def _masked(use: Use, noise: Tensor, subset: Tensor) -> Tensor:
    """The noise in the features of `subset`'s units, zero elsewhere."""
    size = noise.shape[use.dim]
    features = subset.repeat_interleave(size // len(subset)).to(noise.dtype)
    shape = [1] * noise.dim()
    shape[use.dim] = size
    return noise * features.reshape(shape)


def _nonzero_rows(tensor: Tensor, gradient: Tensor | None) -> Callable[[int], Tensor]:
    def rows(dim: int) -> Tensor:
        if gradient is None:
            return torch.zeros(tensor.shape[dim], dtype=torch.bool)
        others = [d for d in range(tensor.dim()) if d != dim]
        touched = gradient != 0
        return touched.any(tuple(others)) if others else touched

    return rows


def mixes_tokens(use: Use, sources: Sequence[Source], codes: Codes) -> bool:
    """Say whether one position of the features depends on several positions of a source."""
    dim = use.dim % use.x.dim()
    seed = torch.zeros_like(use.x)
    positions = seed.movedim(dim, -1).flatten(0, -2)
    positions[-1] = 1  # the last token: a causal one sees the others
    shape = [s for d, s in enumerate(use.x.shape) if d != dim]
    seed = positions.reshape(*shape, -1).movedim(-1, dim)
    held = [
        (n, d) for (n, d), code in codes.items() if sources[n].moment and bool((code >= 0).any())
    ]
    if not held:
        return False
    gradients = torch.autograd.grad(
        use.x, [sources[n].tensor for n, _ in held], seed, retain_graph=True, allow_unused=True
    )
    return any(
        gradient is not None
        and int((gradient.movedim(d, -1).flatten(0, -2) != 0).any(-1).sum()) > 1
        for (_, d), gradient in zip(held, gradients, strict=True)
    )


def sites_of(sources: Sequence[Source], codes: Codes, units: int) -> Iterator[Site]:
    """Where the units lie, as rows of equal blocks; rows of several calls are united."""
    united: dict[tuple[str, int], Tensor] = {}
    for (number, dim), code in codes.items():
        for key in sources[number].rows.get(dim, ()):
            known = united.get(key)
            united[key] = code if known is None else torch.where(code == DEAD, known, code)
    for (tensor, dim), code in united.items():
        for offset, size in _blocks(tensor, code.tolist(), units):
            yield Site(tensor=tensor, dim=dim, offset=offset, block=size)


def _blocks(tensor: str, code: list[int], units: int) -> Iterator[tuple[int, int]]:
    """(offset, rows per unit) of every row of blocks in the rows of one tensor."""
    start = 0
    while start < len(code):
        if code[start] < 0:
            start += 1
            continue
        found = _block_at(code, start, units)
        if found is None:
            raise NoOrderError(f"rows of {tensor} from {start} on are not {units} equal blocks")
        yield found
        start = found[0] + units * found[1]


def _block_at(code: list[int], start: int, units: int) -> tuple[int, int] | None:
    """Offset and size of the row of blocks whose first living row is `start`."""
    sizes = [len(code) // units // k for k in range(1, len(code) // units + 1)]
    run = next((i for i in range(start, len(code)) if code[i] != code[start]), len(code)) - start
    for size in dict.fromkeys([run, *sizes]):
        first = code[start] * size  # rows before the unit of the first living row
        for shift in range(size):  # dead rows of that unit before it
            offset = start - first - shift
            rows = code[max(offset, 0) : offset + units * size]
            if offset < 0 or len(rows) < units * size:
                continue
            if all(c in (i // size, DEAD) for i, c in enumerate(rows)):
                return offset, size
    return None


class NoOrderError(Exception):
    """The rows of the units follow no order that slices could express."""
