"""Forwards that stop on the way: run to a point, look, change a weight, go on.

With one such forward per batch, a layer is solved on all batches before any goes past it, so that
all layers are solved in turn in a single pass over the data. Each is a coroutine (`greenlet`) that
any function called inside of it, a hook of a module for instance, can stop.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import greenlet


class Stepper:
    """A function that is run in steps.

    Args:
        work: is stopped by `Stepper.stop` called inside of it.

    Attributes:
        result: what `work` returned, once it is done.
        done: whether it has.
        seen: for those who stop it: what they want to remember between stops.
    """

    def __init__(self, work: Callable[[], Any]):
        self.result: Any = None
        self.done = False
        self.seen: dict[Any, Any] = {}
        self._work = work
        self._greenlet = greenlet.greenlet(self._run)
        self._greenlet.stepper = self  # type: ignore[attr-defined]

    def step(self) -> Any:
        """Run to the next stop and return what was given to it; None when done."""
        if self.done:
            return None
        self._greenlet.parent = greenlet.getcurrent()
        return self._greenlet.switch()

    def close(self) -> None:
        """Give up: `work` is left by an exception where it stands."""
        if not self.done and self._greenlet:
            self._greenlet.throw(greenlet.GreenletExit)

    @staticmethod
    def current() -> Stepper | None:
        """Return the one that this is called in, None outside of any."""
        return getattr(greenlet.getcurrent(), "stepper", None)

    @staticmethod
    def stop(value: Any) -> None:
        """Stop the forward that this is called in until its next `step`, which `value` goes to."""
        parent = greenlet.getcurrent().parent
        if parent is not None:
            parent.switch(value)

    def _run(self) -> None:
        try:
            self.result = self._work()
        finally:
            self.done = True
