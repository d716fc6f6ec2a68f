"""What a layer's answer is added to, found by numbers: the residual stream around every consumer.

In a dense forward, sampled rows of what every module is given and answers are compared: where a
later tensor is an earlier one plus the layer's answer (times a scale per feature), the earlier is
the stream before it. So no block's code is known by name, pre-norm and post-norm alike. A layer
that the plan removes is found the same way: the stream is followed through it.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Any, Literal, TypeAlias

import greenlet
import torch
from torch import Tensor, nn

from vlprune.calls import removing, tensors_of

Place: TypeAlias = tuple[
    str, str, int, int
]  # path, "in" or "out", number of the call, which tensor
_ROWS = 48  # rows of a tensor that stand for it
_CLOSE = 1e-4  # of the sampled tensor's size


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Stream:
    """Where the stream around one call of a consumer is seen.

    Attributes:
        before: the stream that the answer is added to; None where none was found.
        after: what the stream should be when the next layer that stays reads it; None: as the
            dense answer makes it.
        scale: what the answer is multiplied by before it is added [D]; None: nothing.
    """

    before: Place | None = None
    after: Place | None = None
    scale: Tensor | None = None


@dataclasses.dataclass(slots=True)
class _Seen:
    place: Place
    rows: Tensor  # [rows, D]
    width: tuple[int, ...]  # shape of the whole


def find_streams(
    model: nn.Module,
    forward: Callable[[], Any],
    consumers: Collection[str],
    removed: Collection[str] = (),
) -> dict[tuple[str, int], Stream]:
    """Return the stream around every call of every consumer (path, number of the call).

    Args:
        model: dense.
        forward: runs it on one batch.
        consumers: paths of modules.
        removed: paths of modules whose answer, or what they add to it, will be gone.
    """
    seen = _record(model, forward)
    found: dict[tuple[str, int], Stream] = {}
    for index, event in enumerate(seen):
        path, side, call, which = event.place
        if path in consumers and side == "out" and which == 0:
            found[path, call] = _stream_around(seen, index, frozenset(removed))
    return found


def _stream_around(seen: list[_Seen], index: int, removed: frozenset[str]) -> Stream:
    """The stream around the answer seen[index]."""
    answer = seen[index]
    alike = [i for i, event in enumerate(seen) if event.width == answer.width and i != index]
    block = _reach(answer.place[0])
    before = [i for i in reversed(alike) if i < index and _within(seen[i], block)]
    after = [i for i in alike if i > index and _within(seen[i], block)]
    for scaled in (False, True):
        for later in after:
            for earlier in before:
                scale = _sum_of(seen[later].rows, seen[earlier].rows, answer.rows, scaled)
                if scale is not None:
                    end = _followed(seen, later, removed)
                    return Stream(
                        before=seen[earlier].place,
                        after=None if end == later else seen[end].place,
                        scale=scale if scaled else None,
                    )
    return Stream()


def _followed(seen: list[_Seen], at: int, removed: frozenset[str]) -> int:
    """Where the stream seen[at] has got to behind removed modules that follow it at once."""
    stream = seen[at]
    for index in range(at, len(seen)):
        event = seen[index]
        path, side, call, _ = event.place
        if path not in removed or event.width != stream.width:
            continue
        if side == "in" and _same(event.rows, stream.rows):  # a layer: its answer is the stream
            for out in range(index + 1, len(seen)):
                if seen[out].place[:3] == (path, "out", call) and seen[out].width == event.width:
                    return _followed(seen, out, removed)
        if side == "out" and index > at:  # a half: its answer is added to the stream
            for later in range(index + 1, len(seen)):
                if seen[later].width == stream.width and any(
                    _sum_of(seen[later].rows, stream.rows, event.rows, scaled) is not None
                    for scaled in (False, True)
                ):
                    return _followed(seen, later, removed)
    return at


def _sum_of(later: Tensor, earlier: Tensor, answer: Tensor, scaled: bool) -> Tensor | None:
    """The scale [D] if `later` is `earlier` plus the scaled answer, else None."""
    change = later - earlier
    if not scaled:
        fits = _same(change, answer) and not _same(later, answer)
        return torch.ones_like(answer[0]) if fits else None
    size = (answer * answer).sum(0)
    scale = (change * answer).sum(0) / size.clamp_min(1e-30)
    if not bool((size > 0).all()) or float(scale.abs().min()) < 1e-6:
        return None
    return scale if _same(change, answer * scale) and not _same(later, answer) else None


def _same(one: Tensor, other: Tensor) -> bool:
    return bool((one - other).abs().max() <= _CLOSE * other.abs().max())


def _reach(path: str) -> str:
    """The outermost module with a number in its name: the block of a stack, else the whole."""
    steps = path.split(".")
    first = next((i for i, step in enumerate(steps) if step.isdigit()), -1)
    return ".".join(steps[: first + 1])


def _within(event: _Seen, block: str) -> bool:
    path = event.place[0]
    return not block or path == block or path.startswith(block + ".")


def _record(model: nn.Module, forward: Callable[[], Any]) -> list[_Seen]:
    """Sampled rows of all that modules are given and answer, in order."""
    seen: list[_Seen] = []

    def look(place: Place, tensor: Tensor) -> None:
        if tensor.is_floating_point() and tensor.dim() > 1 and tensor.numel():
            rows = tensor.detach().reshape(-1, tensor.shape[-1])
            step = max(len(rows) // _ROWS, 1)
            seen.append(_Seen(place, rows[::step][:_ROWS].float(), tuple(tensor.shape)))

    with watching(model, look), torch.no_grad():
        forward()
    return seen


@contextmanager
def watching(
    model: nn.Module, look: Callable[[Place, Tensor], None], paths: Collection[str] | None = None
) -> Iterator[None]:
    """Call `look` with every tensor that modules are given and answer, by place.

    Args:
        model: left as it was afterwards.
        look: may stop the forward; calls are counted in each of several forwards (`Stepper`).
        paths: the modules to look at; None: all.
    """
    calls: dict[tuple[Any, str], int] = collections.defaultdict(int)
    handles = []

    def tell(path: str, side: Literal["in", "out"], call: int, value: Any) -> None:
        for which, tensor in enumerate(tensors_of(value)):
            look((path, side, call, which), tensor)

    for path, module in model.named_modules():
        if path and (paths is None or path in paths):

            def enter(module: Any, args: Any, kwargs: Any, path: str = path) -> None:
                here = (greenlet.getcurrent(), path)
                calls[here] += 1
                tell(path, "in", calls[here] - 1, (args, kwargs))

            def leave(module: Any, args: Any, output: Any, path: str = path) -> None:
                tell(path, "out", calls[greenlet.getcurrent(), path] - 1, output)

            handles.append(module.register_forward_pre_hook(enter, with_kwargs=True))
            handles.append(module.register_forward_hook(leave))
    with removing(handles):
        yield
