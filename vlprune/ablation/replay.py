"""Forwards in which whatever a removed unit cannot change is handed out instead of computed.

A dense forward is recorded, module call by module call. When a unit is out, calls that ended
before its module began keep their answers (the prefix), and so do calls that do not depend on it at
all (another tower). Which calls depend on a block is seen by disturbing what the block answers. No
model is known here by name: all there is are calls of modules, their order and their answers.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from vlprune.calls import map_tensors, tensors_of

Key: TypeAlias = tuple[str, int]  # module path, number of the call in one forward


@dataclasses.dataclass(frozen=True, slots=True)
class Handed:
    """An answer to hand out, and how many calls of which modules are left out by that."""

    answer: Any
    inside: Mapping[str, int]


@dataclasses.dataclass(slots=True)
class Recording:
    """Answers of module calls in one forward, and when each call began and ended.

    `inputs` holds the first argument of calls of those modules that it was asked for; `inside` how
    often which other modules were called in each call.
    """

    answers: dict[Key, Any] = dataclasses.field(default_factory=dict)
    inputs: dict[Key, Tensor] = dataclasses.field(default_factory=dict)
    begins: dict[Key, int] = dataclasses.field(default_factory=dict)
    ends: dict[Key, int] = dataclasses.field(default_factory=dict)
    inside: dict[Key, dict[str, int]] = dataclasses.field(default_factory=dict)

    @property
    def bytes(self) -> int:
        """Memory that the answers hold on to; a tensor that many calls handed on counts once."""
        sizes = {
            (t.untyped_storage()._cdata): t.untyped_storage().nbytes()
            for answer in self.answers.values()
            for t in tensors_of(answer)
        }
        return sum(sizes.values())

    def hand(self, keys: Iterable[Key]) -> dict[Key, Handed]:
        """Return what to hand out for these calls."""
        return {key: Handed(self.answers[key], self.inside.get(key, {})) for key in keys}

    def enclosing(self, key: Key) -> set[Key]:
        """Calls inside of which `key` ran."""
        begin, end = self.begins[key], self.ends[key]
        return {k for k in self.begins if self.begins[k] < begin and self.ends[k] > end}


class Replayer:
    """Takes the place of every module's forward while entered; computes as they do by default.

    Args:
        model: left as it was.
    """

    def __init__(self, model: nn.Module):
        self.model = model
        self.copies = 1
        self._visits: dict[str, int] = collections.defaultdict(int)
        self._clock = 0
        self._watched: Collection[str] = ()
        self._recording: Recording | None = None
        self._handed: Mapping[Key, Handed] = {}
        self._instead: Mapping[Key, Callable[[], Any]] = {}
        self._mutated: set[Key] = set()
        self._repeats: dict[Key, tuple[bool, ...]] = {}
        self._patched: list[nn.Module] = []
        self._inputs_of: Collection[str] = ()
        self._disturbed: str | None = None
        self._versions: dict[Key, tuple[int, ...]] = {}
        self._open: list[Key] = []

    def __enter__(self) -> Replayer:
        for path, module in self.model.named_modules():
            if path and "forward" not in vars(module):
                module.forward = self._forward_of(path, module)
                self._patched.append(module)
        return self

    def __exit__(self, *failure: object) -> None:
        for module in self._patched:
            del module.forward
        self._patched.clear()

    def run(
        self,
        forward: Callable[[], Any],
        handed: Mapping[Key, Handed] | None = None,
        *,
        instead: Mapping[Key, Callable[[], Any]] | None = None,
        copies: int = 1,
    ) -> Any:
        """Return what `forward` gives, with the calls of `handed` answered by what is there.

        Args:
            forward: runs the model, on inputs that are repeated `copies` times.
            handed: call to its answer.
            instead: call to what is computed in its place.
            copies: answers are repeated so often along their first dimension, see `learn_copies`.
        """
        with self._mode(handed=handed, instead=instead, copies=copies):
            return forward()

    def record(
        self,
        forward: Callable[[], Any],
        watched: Collection[str],
        handed: Mapping[Key, Handed] | None = None,
        *,
        inputs_of: Collection[str] = (),
    ) -> tuple[Any, Recording]:
        """Do the same and record the calls of the modules in `watched`.

        An answer that something changed in place afterwards is copied, and a copy handed out.
        """
        while True:
            recording = Recording()
            with self._mode(watched, recording, handed, inputs_of=inputs_of):
                answer = forward()
                versions = self._versions
            changed = {key for key, was in versions.items() if was != _version(recording, key)}
            if changed <= self._mutated:
                return answer, recording
            self._mutated |= changed

    def disturb(
        self, forward: Callable[[], Any], block: str, watched: Collection[str]
    ) -> Recording:
        """Run `forward` with noise added to what `block` answers; return what was recorded then."""
        recording = Recording()
        with self._mode(watched, recording):
            self._disturbed = block
            forward()
        return recording

    def learn_copies(self, one: Recording, two: Recording) -> bool:
        """Learn from recordings of a batch and the same twice over which answers repeat.

        Returns:
            Whether every answer has either the same shape in both or twice the first dimension.
        """
        repeats: dict[Key, tuple[bool, ...]] = {}
        if one.answers.keys() != two.answers.keys():
            return False
        for key, answer in one.answers.items():
            ones, twos = list(tensors_of(answer)), list(tensors_of(two.answers[key]))
            if len(ones) != len(twos):
                return False
            pairs = list(zip(ones, twos, strict=True))
            if not all(doubles(a, b) or a.shape == b.shape for a, b in pairs):
                return False
            repeats[key] = tuple(doubles(a, b) for a, b in pairs)
        self._repeats.update(repeats)
        return True

    @contextmanager
    def _mode(
        self,
        watched: Collection[str] = (),
        recording: Recording | None = None,
        handed: Mapping[Key, Handed] | None = None,
        instead: Mapping[Key, Callable[[], Any]] | None = None,
        copies: int = 1,
        inputs_of: Collection[str] = (),
    ) -> Iterator[None]:
        self._visits.clear()
        self._clock = 0
        self._versions = {}
        self._open = []
        self._watched, self._recording = frozenset(watched), recording
        self._inputs_of = frozenset(inputs_of)
        self._handed, self._instead, self.copies = handed or {}, instead or {}, copies
        try:
            yield
        finally:
            self._watched, self._recording, self._disturbed = (), None, None
            self._handed, self._instead, self.copies = {}, {}, 1

    def _forward_of(self, path: str, module: nn.Module) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            key = (path, self._visits[path])
            self._visits[path] += 1
            if key in self._instead:
                return self._instead[key]()
            if key in self._handed:
                handed = self._handed[key]
                for inner, calls in handed.inside.items():
                    self._visits[inner] += calls
                return self._copy(key, handed.answer)
            if self._recording is None or path not in self._watched:
                return type(module).forward(module, *args, **kwargs)
            for outer in self._open:
                counts = self._recording.inside.setdefault(outer, {})
                counts[path] = counts.get(path, 0) + 1
            self._open.append(key)
            self._recording.begins[key] = self._tick()
            if path in self._inputs_of and args:
                self._recording.inputs[key] = args[0]
            answer = type(module).forward(module, *args, **kwargs)
            self._recording.ends[key] = self._tick()
            self._open.pop()
            kept = map_tensors(answer, torch.clone) if key in self._mutated else answer
            self._recording.answers[key] = kept
            self._versions[key] = tuple(t._version for t in tensors_of(kept))
            return map_tensors(answer, _with_noise) if path == self._disturbed else answer

        return forward

    def _tick(self) -> int:
        self._clock += 1
        return self._clock

    def _copy(self, key: Key, answer: Any) -> Any:
        """What is handed out: the answer itself, a clone, or repeated for every copy."""
        if self.copies == 1:
            return map_tensors(answer, torch.clone) if key in self._mutated else answer
        flags = iter(self._repeats[key])

        def repeated(tensor: Tensor) -> Tensor:
            if not next(flags):
                return tensor.clone() if key in self._mutated else tensor
            return torch.cat([tensor] * self.copies)

        return map_tensors(answer, repeated)


def _version(recording: Recording, key: Key) -> tuple[int, ...]:
    return tuple(t._version for t in tensors_of(recording.answers[key]))


def doubles(one: Tensor, two: Tensor) -> bool:
    """Say whether `two` is as long as twice `one`, and of its shape otherwise."""
    return bool(one.dim()) and two.shape == (2 * one.shape[0], *one.shape[1:])


def equal_answers(one: Any, other: Any) -> bool:
    """Say whether two answers hold the same tensors, bit for bit."""
    ones, others = list(tensors_of(one)), list(tensors_of(other))
    return len(ones) == len(others) and all(
        a.shape == b.shape and torch.equal(a, b) for a, b in zip(ones, others, strict=True)
    )


def _with_noise(tensor: Tensor) -> Tensor:
    if not tensor.is_floating_point():
        return tensor
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(tensor.shape, generator=generator).to(tensor.device, tensor.dtype)
    return tensor + noise * tensor.std(correction=0).clamp_min(1e-3)
