"""One batch of an ablation: the dense forward is recorded, every removal replayed on top of it."""

from __future__ import annotations

import collections
import contextlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vlprune.ablation.removals import Removal, by_block, stack_of, watched_modules
from vlprune.ablation.replay import Handed, Key, Recording, Replayer, doubles, equal_answers
from vlprune.ablation.trimming import Trimming
from vlprune.anatomy import Anatomy, Axis, under
from vlprune.calls import map_tensors, tensors_of
from vlprune.gates import Gates
from vlprune.law import relative_error

Outputs = tuple[Tensor, ...]
_TRIMMED = 1e-5  # relative: what other shapes of the same products may round
Forward = Callable[[Any], Outputs]  # a batch to tensors [B, ...]


class Ablations:
    """Removals measured batch by batch on a model whose gates and replays are on while entered.

    Args:
        model: in eval mode; left as it was.
        anatomy: its axes; those of `removals` at least.
        removals: what is taken out, each on its own.
        forward: what a batch gives, tensors [B, ...]: a task's `outputs` on this model.
        copies: how many removals of one axis run side by side in one forward.
        mixes_examples: outputs choose among the examples of a batch. Noise may choose as the dense
            model does where a removal does not, so that nothing after a block is handed out.
    """

    def __init__(
        self,
        model: nn.Module,
        anatomy: Anatomy,
        removals: Sequence[Removal],
        forward: Forward,
        *,
        copies: int = 1,
        mixes_examples: bool = False,
    ):
        self.model = model
        self.copies = copies
        self._mixes_examples = mixes_examples
        self.blocks = by_block(model, anatomy, removals)
        self._axes = {axis.name: axis for axis in anatomy.axes}
        used = dict.fromkeys(removal.axis for removal in removals)
        self._gates = Gates(model, [self._axes[name] for name in used])
        self._replayer = Replayer(model)
        self._forward = forward
        self._outer = list(watched_modules(model, list(self.blocks)))
        self._macs = _macs_by_module(anatomy, self._outer)
        self._inner = {block: _inside(model, block) for block in self.blocks}
        stacks: dict[str, list[str]] = {}
        for block in self.blocks:
            stacks.setdefault(stack_of(block), list(_items(model, block)))
        self.trimming = Trimming(model, stacks)
        self._affected: dict[str, set[Key]] = {}  # stack -> calls that depend on its first block
        self._calls: set[Key] = set()
        self._learnt: dict[str, bool] = {}  # block -> whether its answers repeat with the batch
        self.bytes = 0

    def __enter__(self) -> Ablations:
        self.trimming.__enter__()  # first: gates see what blocks are given then
        self._gates.__enter__()
        self._replayer.__enter__()
        return self

    def __exit__(self, *failure: object) -> None:
        self._replayer.__exit__(*failure)
        self._gates.__exit__(*failure)
        self.trimming.__exit__(*failure)

    def begin(self, batch: Any) -> Outputs:
        """Record the dense forward of a batch; return what it gives."""
        self._batch = batch
        self.trimming.lengths = self.trimming.repeat(batch)
        self._record_dense()
        if not self.trimming.lengths:
            self._trim()
        self.bytes = max(self.bytes, self._record.bytes)
        if self._calls != self._record.answers.keys():  # other calls than those of the last batch
            self._calls = set(self._record.answers)
            self._affected.clear()
            self._learnt.clear()
        return self._dense

    def _record_dense(self) -> None:
        self._dense: Outputs
        self._dense, self._record = self._replayer.record(
            lambda: self._forward(self._batch), self._outer
        )

    def _trim(self) -> None:
        """Leave out tokens after the end of all texts, where outputs stay what they are."""
        proposed = self.trimming.propose(self._batch, self._record)
        if not proposed:
            return
        dense, record = self._dense, self._record
        self.trimming.lengths = proposed
        with contextlib.suppress(Exception):  # a model may count its tokens
            self._record_dense()
            if all(
                relative_error(a, b) <= _TRIMMED for a, b in zip(dense, self._dense, strict=True)
            ):
                self.trimming.allowed = {stack: n for stack, (n, _) in proposed.items()}
                return
        self.trimming.lengths = {}
        self._dense, self._record = dense, record

    def of_block(
        self, block: str, wanted: Sequence[Removal], known: Collection[Removal] = ()
    ) -> Iterator[tuple[Removal, Outputs]]:
        """Yield what the batch of the last `begin` gives without each of the wanted units.

        Removals of one axis run side by side in packs of the order of `wanted`; a pack that is
        `known` as a whole is left out, so that packs do not depend on what was done before.
        """
        calls = [key for key in self._record.answers if key[0] == block]
        if not calls:  # nothing of this batch passes it
            yield from ((removal, self._dense) for removal in wanted if removal not in known)
            return
        axes = {self._axes[removal.axis].name: self._axes[removal.axis] for removal in wanted}
        recorded = self._handed(block, calls)
        consumers = [path for axis in axes.values() for path in axis.gate.modules]
        inner = self._record_inside(block, calls, consumers)
        self.bytes = max(self.bytes, self._record.bytes + inner.bytes)
        for axis in axes.values():
            members = [removal for removal in wanted if removal.axis == axis.name]
            copies = min(len(members), self._copies(axis, block))
            handed = recorded | self._before_gate(axis, members[0], block, inner)
            for pack in self._packs(members, copies):
                if not all(removal in known for removal in pack):
                    yield from self._run(axis, pack, handed, self._instead(axis, inner, len(pack)))

    @property
    def tokens(self) -> int:
        """Rows that the widest blocks of the last batch compute: examples by tokens."""
        sizes = [
            tensor.shape[0] * (tensor.shape[1] if tensor.dim() == 3 else 1)
            for (path, _), answer in self._record.answers.items()
            if path in self.blocks
            for tensor in tensors_of(answer)
        ]
        return max(sizes, default=1)

    def cost(self, block: str) -> int:
        """Multiply-accumulates of what runs when a unit of `block` is out, on the example inputs.

        Of the block itself all is counted, though its units share a part.
        """
        calls = [key for key in self._record.answers if key[0] == block]
        if not calls:
            return 0
        handed = self._handed(block, calls)
        running = {path for path, visit in self._record.answers if (path, visit) not in handed}
        return sum(macs for path, macs in self._macs.items() if path in running)

    def _run(
        self,
        axis: Axis,
        pack: Sequence[Removal],
        handed: Mapping[Key, Handed],
        instead: Mapping[Key, Callable[[], Any]],
    ) -> list[tuple[Removal, Outputs]]:
        copies = len(pack)
        value = torch.ones(copies, axis.units)
        for row, removal in zip(value, pack, strict=True):
            row[list(removal.units)] = 0
        ones = self._gates.values[axis.name]
        self._gates.values[axis.name] = (value if copies > 1 else value[0]).to(ones.device)
        batch = self._batch if copies == 1 else self._repeated(copies)
        try:
            outputs = self._replayer.run(
                lambda: self._forward(batch), handed, instead=instead, copies=copies
            )
        finally:
            self._gates.values[axis.name] = ones
        parts = [output.chunk(copies) for output in outputs]
        return [(removal, tuple(p[i] for p in parts)) for i, removal in enumerate(pack)]

    def _handed(self, block: str, calls: Sequence[Key]) -> dict[Key, Handed]:
        """The calls outside of the block that keep their answers when it changes."""
        stack = stack_of(block)
        if stack not in self._affected:
            self._affected[stack] = self._dependent(stack)
        begin = min(self._record.begins[key] for key in calls)
        running = {key for key in self._affected[stack] if self._record.ends[key] > begin}
        running |= self._around(calls)
        return self._record.hand(key for key in self._record.answers if key not in running)

    def _around(self, calls: Sequence[Key]) -> set[Key]:
        """The calls, and those that they run inside of."""
        return {key for call in calls for key in (call, *self._record.enclosing(call))}

    def _dependent(self, stack: str) -> set[Key]:
        """Calls whose answers change with what the first block of a stack answers."""
        if self._mixes_examples:
            return set(self._record.answers)
        blocks = [block for block in self.blocks if stack_of(block) == stack]
        begins = {key[0]: begin for key, begin in reversed(self._record.begins.items())}
        first = min((b for b in blocks if b in begins), key=lambda block: begins[block])
        try:
            other = self._replayer.disturb(lambda: self._forward(self._batch), first, self._outer)
        except Exception:  # noise took the model where it does not go; nothing is known then
            return set(self._record.answers)
        return {
            key
            for key, answer in self._record.answers.items()
            if key not in other.answers or not equal_answers(answer, other.answers[key])
        }

    def _record_inside(
        self, block: str, calls: Sequence[Key], inputs_of: Sequence[str]
    ) -> Recording:
        """The answers of all modules inside of the block, all outside of it handed out."""
        running = self._around(calls)
        handed = self._record.hand(key for key in self._record.answers if key not in running)
        outputs, inner = self._replayer.record(
            lambda: self._forward(self._batch), self._inner[block], handed, inputs_of=inputs_of
        )
        assert equal_answers(outputs, self._dense), f"{block} does not answer the same twice"
        return inner

    def _before_gate(
        self, axis: Axis, removal: Removal, block: str, inner: Recording
    ) -> dict[Key, Handed]:
        """The calls inside of the block that end before the gate has a say."""
        if axis.gate.kind in ("skip", "output"):  # the gate changes what the module has answered
            own = axis.gate.modules[removal.units[0]]
            recording = self._record if own == block else inner
            handed = recording.hand(key for key in recording.answers if key[0] == own)
            places = [own]
        else:
            handed = {}
            sites = [site.tensor.rpartition(".")[0] for site in axis.gate.sites]
            places = [*axis.gate.norms, *axis.gate.within, *sites]
            places += axis.gate.modules if axis.gate.kind == "input" else ()
        begins = [begin for key, begin in inner.begins.items() if key[0] in places]
        begin = min(begins, default=0)
        return handed | inner.hand(key for key, end in inner.ends.items() if end < begin)

    def _instead(self, axis: Axis, inner: Recording, copies: int) -> dict[Key, Callable[[], Any]]:
        """A module whose answer is its consumer's: the consumer alone is called in its place."""
        gate = axis.gate
        if gate.kind != "input" or len(gate.modules) > 1 or gate.norms or gate.sites:
            return {}
        (consumer,) = gate.modules
        calls = [key for key in inner.answers if key[0] in (consumer, axis.path)]
        if len(calls) != 2 or {path for path, _ in calls} != {consumer, axis.path}:
            return {}
        whole, part = inner.answers[axis.path, 0], inner.answers[consumer, 0]
        tensors = list(tensors_of(whole))
        x = inner.inputs.get((consumer, 0))
        if (
            x is None
            or not isinstance(part, Tensor)
            or not tensors
            or not equal_answers(tensors[0], part)
        ):
            return {}
        if copies > 1 and (len(tensors) > 1 or x.shape[0] != part.shape[0]):
            return {}
        module = self.model.get_submodule(consumer)

        def answer() -> Any:
            made = iter([module(torch.cat([x] * copies) if copies > 1 else x), *tensors[1:]])
            return map_tensors(whole, lambda _: next(made))

        return {(axis.path, 0): answer}

    def _copies(self, axis: Axis, block: str) -> int:
        """How many removals of an axis can run side by side."""
        if self.copies == 1 or axis.gate.kind == "router":
            return 1
        if self._is_confusing(2):
            return 1
        if block not in self._learnt:
            self._learnt[block] = self._learn(block)
        copies = self.copies - 1 if self._is_confusing(self.copies) else self.copies
        return copies if self._learnt[block] else 1

    def _packs(self, members: Sequence[Removal], copies: int) -> Iterator[Sequence[Removal]]:
        """The members, so many side by side; those that are left over one by one if need be."""
        for start in range(0, len(members), copies):
            pack = members[start : start + copies]
            if self._is_confusing(len(pack)):
                yield from ([removal] for removal in pack)
            else:
                yield pack

    def _is_confusing(self, copies: int) -> bool:
        """Say whether there would be as many examples as tokens: which is which is not told."""
        tokens = {tokens for tokens, _ in self.trimming.lengths.values()}
        return copies * self._dense[0].shape[0] in tokens

    def _learn(self, block: str) -> bool:
        """Run the batch twice over and see that it answers as often; once per block."""
        watched = [*self._outer, *self._inner[block]]
        twice = self._repeated(2)
        one = self._replayer.record(lambda: self._forward(self._batch), watched)
        two = self._replayer.record(lambda: self._forward(twice), watched)
        pairs = list(zip(one[0], two[0], strict=True))
        fits = all(
            b.shape == (2 * a.shape[0], *a.shape[1:])
            and torch.allclose(torch.cat([a, a]), b, rtol=1e-3, atol=1e-5)
            for a, b in pairs
        )
        if not (fits and self._replayer.learn_copies(one[1], two[1])):
            return False
        own = [key for key in one[1].answers if key[0] == block]
        return all(  # a block may see texts that all examples share, and not the examples
            doubles(next(tensors_of(one[1].answers[key])), next(tensors_of(two[1].answers[key])))
            for key in own
        )

    def _repeated(self, copies: int) -> Any:
        """The batch with its tensors repeated along their first dimension."""
        size = self._dense[0].shape[0]
        return map_tensors(
            self._batch,
            lambda t: torch.cat([t] * copies) if t.dim() and t.shape[0] == size else t,
        )


def _items(model: nn.Module, block: str) -> Iterator[str]:
    """The blocks of the list that a block is in."""
    stack = stack_of(block)
    if stack == block:
        yield block
        return
    for name, _ in model.get_submodule(stack).named_children():
        yield f"{stack}.{name}" if stack else name


def _macs_by_module(anatomy: Anatomy, watched: Sequence[str]) -> dict[str, int]:
    """Multiply-accumulates by the innermost watched module that they happen in."""
    known = set(watched)
    found: dict[str, int] = collections.defaultdict(int)
    for operation in anatomy.operations:
        path = operation.module
        while path and path not in known:
            path = path.rpartition(".")[0]
        found[path] += operation.macs
    return found


def _inside(model: nn.Module, block: str) -> list[str]:
    return [path for path, _ in model.named_modules() if under(path, block) and path != block]
