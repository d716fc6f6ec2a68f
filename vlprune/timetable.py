"""How long the parts of one model take on one device, as data: measured milliseconds over units.

A table fits one structure, device, backend, batch and number of threads. Measuring one is
`profile.py`; what a plan takes by a table is arithmetic, in `latency.py`.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

_BUSY = 0.5  # under this share of work the rest, not the work, sets the time


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class LatencyRow:
    """What axes of equal shape take over the number of units that stay.

    Attributes:
        kind: of the axes: "head", "ffn", "layer", ...
        axes: names of the axes; all of them have these times.
        kept: numbers of units that were measured, rising. Where units are modules of their own
            (layers, sub-layers): (0, 1), one unit gone or there.
        ms: milliseconds [measured numbers] that one axis adds to what it takes with the fewest;
            never falling, the first is 0. Between measured numbers lie straight lines.
    """

    kind: str
    axes: tuple[str, ...]
    kept: tuple[int, ...]
    ms: tuple[float, ...]

    def __post_init__(self) -> None:
        rising = all(a < b for a, b in zip(self.kept, self.kept[1:], strict=False))
        growing = all(a <= b for a, b in zip(self.ms, self.ms[1:], strict=False))
        if not (self.kept and len(self.kept) == len(self.ms) and rising and growing):
            raise ValueError(
                "a latency row must hold rising numbers of units and as many times that never "
                f"fall; got {self.kept} and {self.ms} for {self.kind}. Measure it again with "
                "vlprune.profile."
            )

    def at(self, units: int) -> float:
        """Return the milliseconds that one axis adds with so many units."""
        return float(np.interp(units, self.kept, self.ms))


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class LatencyTable:
    """What the parts of one model take where it was measured.

    Attributes:
        fingerprint: of the anatomy that it fits, see `Anatomy.fingerprint`.
        model: name of its class.
        device: name of the processor or GPU.
        backend: "eager", "compile" (`torch.compile`) or "onnx" (ONNX Runtime).
        dtype: of the weights.
        batch: examples in a call.
        threads: of torch, or of ONNX Runtime, within one operation.
        torch: its version.
        dense_ms: milliseconds that the whole model takes for the inputs that were measured.
        rows: one per shape of axes.
        round_to: neurons that stay in multiples of this many run without extra time.
        busy: share of the time that is work of the device: on a GPU that of its kernels, else what
            a doubled batch adds. Near 0 the device is idle: a smaller model is hardly faster.
    """

    fingerprint: str
    model: str
    device: str
    backend: str
    dtype: str
    batch: int
    threads: int
    torch: str
    dense_ms: float
    rows: tuple[LatencyRow, ...]
    round_to: int = 1
    busy: float | None = None

    @property
    def by_axis(self) -> dict[str, LatencyRow]:
        """Axis name to its row."""
        return {name: row for row in self.rows for name in row.axes}

    @property
    def is_idle(self) -> bool:
        """Whether most of the time is spent on other things than the work of the device."""
        return self.busy is not None and self.busy < _BUSY

    @property
    def place(self) -> dict[str, Any]:
        """Where and how it was measured; two tables compare only where these are equal."""
        names = ("device", "backend", "dtype", "batch", "threads", "torch")
        return {name: getattr(self, name) for name in names}

    def __str__(self) -> str:
        place = ", ".join(f"{name} {value}" for name, value in self.place.items())
        lines = [f"latency of {self.model}: {self.dense_ms:.4g} ms ({place})"]
        for row in self.rows:
            cells = "  ".join(f"{k}: {ms:.3g}" for k, ms in zip(row.kept, row.ms, strict=True))
            lines.append(f"  {row.kind:<10} {len(row.axes):>3} axes  ms by units  {cells}")
        return "\n".join([*lines, *self.remarks])

    @property
    def remarks(self) -> tuple[str, ...]:
        """What is worth knowing before one plans by it, a sentence each."""
        found = []
        if self.round_to > 1:
            found.append(
                f"numbers of neurons that are no multiple of {self.round_to} take extra time: "
                f"plan with round_to={self.round_to}"
            )
        if self.is_idle:
            found.append(
                f"only {self.busy:.0%} of the time is work of the device: it is idle rather than "
                "compute-bound, and a smaller model gains little; use larger batches or a "
                "compiled backend"
            )
        return tuple(found)
