"""The engine: every removal measured on every batch, exactly, once, in bounded memory.

Batches outside, removals inside: the dense forward of a batch is recorded once and replayed for all
(`batch.py`). What was measured goes to a store at once (`store.py`); processes share the blocks by
cost. `sequential.py` stops early where a decision is clear.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from vlprune.ablation.batch import Ablations, Outputs
from vlprune.ablation.removals import Removal
from vlprune.ablation.store import Store, key_of
from vlprune.anatomy import Anatomy
from vlprune.calls import frozen, quiet_eval
from vlprune.measures import MEASURES, ExampleTask, Kept, TaskMeasure

T = TypeVar("T")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Effects:
    """What every removal costs, example by example.

    Attributes:
        dense: value of every example with all units [N].
        falls: removal to dense minus ablated value of the examples it was measured on [n]; high
            where it is missed. n < N where a sequential test stopped early.
        evaluations: (removal, batch) pairs that were run, here and now.
        possible: how many there are in all.
        bytes: peak memory of recorded answers, kept outputs excepted.
    """

    dense: Tensor
    falls: dict[Removal, Tensor]
    evaluations: int = 0
    possible: int = 0
    bytes: int = 0


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class State:
    """How far an ablation is.

    Attributes:
        done, total: (removal, batch) pairs.
        seconds_left: by the cost of what is left, at the rate so far.
        so_far: gives the effects as they are known now.
    """

    done: int
    total: int
    seconds_left: float
    so_far: Callable[[], Effects]


class Stopper(Protocol):
    """Says which removals need no more batches."""

    def decided(self, falls: Mapping[Removal, Tensor]) -> Collection[Removal]:
        """Return removals that are settled by the falls [n] of all that were measured."""


class Engine:
    """Measures removals on a model.

    Args:
        model: left as it was.
        task: an example task (`measures.ExampleTask`); its batches are gone through a few times.
        anatomy: of the model.
        removals: what is taken out, each on its own.
        measure: a name in `measures.MEASURES`.
        store: folder of the append-only store; None keeps nothing on disk.
        shard: (index, count): which share of the blocks this process measures. Under
            `torch.distributed` the ranks share, and each gets the effects of all.
        copies: removals of one axis that run side by side in one forward. "auto" fills the device:
            as many as make 4,096 tokens on a CPU, 65,536 elsewhere, within its free memory.
        memory: bytes that kept outputs may take; more of them are split into passes.
        stopper: asked after 1, 2, 4, ... batches which removals may stop.
        progress: called after every removal.
    """

    def __init__(
        self,
        model: nn.Module,
        task: Any,
        anatomy: Anatomy,
        removals: Sequence[Removal],
        *,
        measure: str = "task",
        store: str | Path | None = None,
        shard: tuple[int, int] = (0, 1),
        copies: int | Literal["auto"] = 1,
        memory: int = 2 * 2**30,
        stopper: Stopper | None = None,
        progress: Callable[[State], None] | None = None,
    ):
        if not 0 <= shard[0] < shard[1]:
            raise ValueError(f"shard must be (index, count) with index < count; got {shard}.")
        if stopper is not None and shard[1] > 1:
            raise ValueError("stopping early needs the falls of all units; give no shard.")
        self.model = model
        self.task: ExampleTask = task
        self.removals = list(dict.fromkeys(removals))
        self.measure = MEASURES[measure](task, model)
        self._memory = memory
        self._stopper = stopper
        self._progress = progress
        self._shard = shard if not _is_distributed() else (dist.get_rank(), dist.get_world_size())
        mixes = bool(getattr(task, "mixes_examples", False))
        self._ablations = Ablations(
            model,
            anatomy,
            self.removals,
            lambda batch: task.outputs(model, batch),
            mixes_examples=mixes,
        )
        self._copies = 1 if mixes else copies
        self._settings = {"measure": measure, "torch": torch.__version__, "format": 1}
        self._folder = store
        batches: Any = task.batches()
        self._targets = [task.targets(batch) for batch in batches]
        self._dense: dict[int, Kept] = {}
        self._stopped: dict[Removal, int] = {}  # removal -> batches it was measured on
        self._settled: dict[Removal, Tensor] = {}  # removal -> its falls then
        self._evaluations = self._done = 0
        self._spent = self._seconds = 0.0

    def run(self) -> Effects:
        """Measure what the store does not hold; return what is known of all removals then."""
        with quiet_eval(self.model), frozen(self.model), torch.no_grad(), self._ablations:
            self._begin()
            for part in self._passes():
                self._pass(part)
        self._exchange()
        return self._effects()

    def _begin(self) -> None:
        """Look at the first batch: how many removals side by side, and which store that is."""
        self._first = self._ablations.begin(next(iter(self.task.batches())))
        device = self._first[0].device
        if self._copies == "auto":
            self._ablations.copies = _filling(device, self._ablations.tokens, self._ablations.bytes)
        else:
            self._ablations.copies = self._copies
        key = ""
        if self._folder is not None:
            settings = {"copies": self._ablations.copies, "device": device.type, **self._settings}
            key = key_of(self.model, self.task.batches(), settings)
        self.store = Store(self._folder, key)

    def _passes(self) -> list[dict[str, list[Removal]]]:
        """The blocks that this process measures, in parts whose kept outputs fit the memory."""
        dense = self._first
        blocks = self._ablations.blocks
        self._costs = {block: max(self._ablations.cost(block), 1) for block in blocks}
        kept = self.measure.keep(tuple(torch.empty_like(t) for t in dense), dense, self._targets[0])
        size = sum(t.numel() * t.element_size() for t in kept if t is not None)
        most = max(int(self._memory / max(size * len(self._targets), 1)), 1)
        passes: list[dict[str, list[Removal]]] = [{}]
        for block in self._share():
            held = sum(map(len, passes[-1].values()))
            full = held and held + len(blocks[block]) > most
            if full and self._stopper is None:  # which compares all
                passes.append({})
            passes[-1][block] = blocks[block]
        mine = [removal for part in passes for members in part.values() for removal in members]
        self._total = len(mine) * len(self._targets)
        self._left = sum(self._costs[b] * len(m) for p in passes for b, m in p.items())
        self._left *= len(self._targets)
        self.expected_bytes = self._ablations.bytes + min(len(mine), most) * size * len(
            self._targets
        )
        return passes

    def _share(self) -> list[str]:
        """The blocks of this process: the dearest left goes to whoever has least, in turn."""
        index, count = self._shard
        work = {
            block: self._costs[block] * sum(r.name not in self.store.values for r in members)
            for block, members in self._ablations.blocks.items()
        }
        if count > 1 and not _is_distributed():  # others know nothing of what is done
            work = {b: self._costs[b] * len(m) for b, m in self._ablations.blocks.items()}
        if _is_distributed():
            agreed = [work]
            dist.broadcast_object_list(agreed)
            (work,) = agreed
        loads = [0] * count
        owners: dict[str, int] = {}
        for block in sorted(work, key=lambda b: -work[b]):
            owners[block] = loads.index(min(loads))
            loads[owners[block]] += work[block]
        return [block for block in self._ablations.blocks if owners[block] == index]

    def _pass(self, blocks: Mapping[str, Sequence[Removal]]) -> None:
        count = 0
        for number, batch in enumerate(self.task.batches()):
            dense = self._ablations.begin(batch)
            targets = self._targets[number]
            self._dense[number] = self._keep_dense(dense, targets)
            for block, members in blocks.items():
                active = [r for r in members if r not in self._stopped]
                known = {r for r in active if self._is_known(r, number)}
                self._spend(block, len(known) + len(members) - len(active), 0.0)
                begin = time.perf_counter()
                if len(known) < len(active):
                    for removal, outputs in self._ablations.of_block(block, active, known):
                        if removal not in known:
                            kept = self.measure.keep(outputs, dense, targets)
                            self.store.add_part(removal.name, number, kept)
                            self._evaluations += 1
                            now = time.perf_counter()
                            self._spend(block, 1, now - begin)
                            begin = now
            count = number + 1
            if self._stopper is not None and count & (count - 1) == 0:
                self._stop(self._stopper, count)
        for members in blocks.values():
            for removal in members:
                if removal.name not in self.store.values:
                    batches = self._stopped.get(removal, count)
                    values = self._values(removal, batches)
                    self.store.add_values(removal.name, batches, values)
        self.store.compact()

    def _is_known(self, removal: Removal, batch: int) -> bool:
        return removal.name in self.store.values or (removal.name, batch) in self.store.parts

    def _keep_dense(self, dense: Outputs, targets: Tensor) -> Kept:
        if isinstance(self.measure, TaskMeasure):  # it keeps what differs; of these all
            return tuple(t.cpu() for t in dense)
        return self.measure.keep(dense, dense, targets)

    def _values(self, removal: Removal, batches: int) -> Tensor:
        """Value of every example of the first batches without the units of a removal [n]."""
        kept = [self.store.parts[removal.name, number] for number in range(batches)]
        dense = [self._dense[number] for number in range(batches)]
        return self.measure.values(kept, dense, self._targets[:batches])

    def _dense_values(self, batches: int) -> Tensor:
        dense = [self._dense[number] for number in range(batches)]
        return self.measure.values(dense, dense, self._targets[:batches])

    def _stop(self, stopper: Stopper, batches: int) -> None:
        """Let the removals go that are settled after so many batches; all ranks agree."""
        falls: dict[Removal, Tensor] = {}
        before = self._dense_values(batches)
        for removal in self.removals:
            if removal in self._stopped:
                falls[removal] = self._settled[removal]
            elif all((removal.name, n) in self.store.parts for n in range(batches)):
                falls[removal] = before - self._values(removal, batches)
        for other in _gathered(falls):
            falls |= other
        for removal in stopper.decided(falls):
            if removal not in self._stopped:
                self._stopped[removal] = batches
                self._settled[removal] = falls[removal]

    def _spend(self, block: str, removals: int, seconds: float) -> None:
        """Count work that is done, and tell."""
        cost = self._costs[block] * removals
        self._left -= cost
        self._done += removals
        if seconds:
            self._spent += cost
            self._seconds += seconds
            if self._progress is not None:
                rate = self._seconds / self._spent
                left = rate * self._left
                self._progress(
                    State(
                        done=self._done,
                        total=self._total,
                        seconds_left=left,
                        so_far=self._effects,
                    )
                )

    def _exchange(self) -> None:
        """Give every rank what the others have measured."""
        if _is_distributed():
            for values in _gathered(dict(self.store.values)):
                self.store.values |= values
        else:
            self.store.read()

    def _effects(self) -> Effects:
        """What is known now, of removals that were measured on at least one batch."""
        falls: dict[Removal, Tensor] = {}
        before: dict[int, Tensor] = {}  # dense values of the first batches
        for removal in self.removals:
            batches, values = self.store.values.get(removal.name, (0, None))
            if values is None:
                while (removal.name, batches) in self.store.parts and batches in self._dense:
                    batches += 1
                values = self._values(removal, batches) if batches else None
            if values is not None:
                if batches not in before:
                    before[batches] = self._dense_values(batches)
                falls[removal] = before[batches] - values
        return Effects(
            dense=self._dense_values(len(self._dense)),
            falls=falls,
            evaluations=self._evaluations,
            possible=len(self.removals) * len(self._targets),
            bytes=self._ablations.bytes,
        )


def _filling(device: torch.device, tokens: int, held: int) -> int:
    """How many copies of a batch of so many tokens fill a device."""
    copies = (4_096 if device.type == "cpu" else 65_536) // max(tokens, 1)
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        copies = min(copies, free // (4 * max(held, 1)))
    return max(copies, 1)


def _is_distributed() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def _gathered(value: T) -> list[T]:
    """The value of every process."""
    if not _is_distributed():
        return [value]
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, value)
    return found
