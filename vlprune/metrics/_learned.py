"""What masks that are learnt in someone's training loop share: gates with a gradient, and steps.

    with masks:                       # or masks.attach() ... masks.detach()
        for batch in loader:
            loss(model, batch).backward()
            masks.update()            # after every backward
            optimizer.step(); optimizer.zero_grad()
            masks.step()              # after every step of the optimiser
    small = vlprune.prune(model, masks.plan())

The masks are no parameters of the model: its optimiser, its wrappers and its state do not know of
them. Between processes their gradients are averaged, so all ranks hold equal masks.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from vlprune.anatomy import Anatomy
from vlprune.calls import Inputs
from vlprune.contracts import Needs
from vlprune.cost import dense_cost, price
from vlprune.errors import UnsupportedModelError
from vlprune.gates import Gates
from vlprune.metrics._base import DEFAULT_STRATEGIES, AxisMetric
from vlprune.plan import Plan, make_plan
from vlprune.registry import METRICS


class LearnedMasks(AxisMetric):
    """Gates that change while the model is trained; subclasses say how.

    Args:
        model: the one whose `forward` is trained, not its data-parallel or compiled wrapper.
            Attach before `torch.compile`.
        anatomy: of it; made from it and `example_inputs` where it is not given.
        budget: what is to be left in the end, see `vlprune.plan`.
        steps: of the search. None: only gather, and never change a mask.
        example_inputs: for the dissection.
        strategies: kinds of axes that may lose units.

    Attributes:
        steps_done: how often `step` was called.
    """

    needs: ClassVar[Needs] = "steps"
    gates: Gates

    def __init__(
        self,
        model: nn.Module,
        anatomy: Anatomy | None = None,
        *,
        budget: Mapping[str, float] | None = None,
        steps: int | None = None,
        example_inputs: Inputs | None = None,
        strategies: tuple[str, ...] = DEFAULT_STRATEGIES,
    ):
        if steps is not None and steps < 1:
            raise ValueError(f"steps must be at least 1; got {steps} in {type(self).__name__}.")
        _refuse_compiled(model)
        self.budget = None if budget is None else dict(budget)
        self.steps = steps
        super().__init__(model, anatomy, example_inputs=example_inputs, strategies=strategies)

    # -- on and off --------------------------------------------------------------------------------

    def attach(self) -> Self:
        """Put the masks on the model; the same as entering the context."""
        return self.__enter__()

    def detach(self) -> None:
        """Take them off; the same as leaving the context. What was learnt stays here."""
        self.__exit__(None, None, None)

    def __enter__(self) -> Self:
        _refuse_compiled(self.model)
        super().__enter__()
        return self

    def _make_gates(self) -> Gates:
        gates = Gates(self.model, self.anatomy.axes)
        for name, ones in gates.values.items():
            gates.values[name] = ones.clone().requires_grad_()
        return gates

    # -- in the loop -------------------------------------------------------------------------------

    def reset(self) -> None:
        """Begin again."""
        super().reset()
        self.steps_done = 0
        self._waiting: dict[str, Tensor] = {}

    def update(self, measure: Any = None, *, scale: float = 1.0) -> None:
        """Take in the gradients of the last backward: call it once for each.

        Several losses or batches before one `step` are added up, as gradients of parameters are.

        Args:
            measure: not used.
            scale: what the loss was multiplied by (`GradScaler.get_scale()`); a batch whose
                gradients overflowed at a scale is left out, as the scaler leaves out its step.

        Raises:
            RuntimeError: if there was no backward since the last call.
            FloatingPointError: naming the axis whose gradient is NaN or infinite.
        """
        found = {name: gate.grad for name, gate in self.gates.values.items()}
        if all(gradient is None for gradient in found.values()):
            raise RuntimeError(
                f"{type(self).__name__}.update must follow loss.backward(); got no gradient of a "
                "mask. Attach before the forward, and run it without torch.no_grad."
            )
        gradients = {n: g.detach() / scale for n, g in found.items() if g is not None}
        for gate in self.gates.values.values():
            gate.grad = None
        bad = [name for name, g in gradients.items() if not bool(g.isfinite().all())]
        if bad and scale == 1.0:
            raise FloatingPointError(
                f"gradients of masks must be finite; got NaN or infinity at {bad[0]!r}. Look at "
                "the loss, or give scale= where it is scaled."
            )
        if bad:
            return
        self._count += 1
        for name, gradient in gradients.items():
            known = self._waiting.get(name)
            self._waiting[name] = gradient if known is None else known + gradient

    def step(self) -> None:
        """Move on by one step of the optimiser: decide, and set the masks."""
        gradients = _mean_over_ranks(self._waiting, self.gates.values)
        self._waiting = {}
        self._take(gradients)
        self.steps_done += 1
        if self.steps is not None and self.steps_done <= self.steps:
            self._move()

    @property
    def is_done(self) -> bool:
        """Whether all steps were made: masks are 0 or 1 then and stay so."""
        return self.steps is not None and self.steps_done >= self.steps

    def plan(self) -> Plan:
        """Return which units stay, within the budget.

        Raises:
            RuntimeError: if the search has not ended.
        """
        if not self.is_done:
            raise RuntimeError(
                f"plan must come after all {self.steps} steps of the search; {self.steps_done} "
                "were made. Call step() after every step of the optimiser."
            )
        keep = self._keep()
        return make_plan(
            self.anatomy,
            keep,
            asked=self.budget,
            dense=dense_cost(self.anatomy),
            planned=price(self.anatomy, keep),
            made_by={
                "metric": next((n for n, kind in METRICS.items() if kind is type(self)), "masks"),
                "settings": self._settings(),
                "strategies": list(self.anatomy.kinds),
                "allocation": "learned",
            },
        )

    @abstractmethod
    def _take(self, gradients: dict[str, Tensor]) -> None:
        """Take in the gradient [units] of every gate, the same on all ranks."""

    @abstractmethod
    def _move(self) -> None:
        """Decide on the masks after `steps_done` steps and set them."""

    @abstractmethod
    def _keep(self) -> dict[str, tuple[int, ...]]:
        """Which units stay in the end."""

    @torch.no_grad()
    def _set(self, name: str, value: Tensor) -> None:
        """Set a gate in place: compiled code and graphs hold on to the tensor."""
        self.gates.values[name].copy_(value)

    # -- to go on later ----------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return all that a search needs to go on bit-equal, taken after a `step`."""
        return {
            "steps_done": self.steps_done,
            "count": self._count,
            "gates": {name: gate.detach().clone() for name, gate in self.gates.values.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take it from there.

        Raises:
            ValueError: if it is of other axes.
        """
        if state["gates"].keys() != self.gates.values.keys():
            other = set(state["gates"]) ^ set(self.gates.values)
            raise ValueError(
                f"state must be of the same axes; they differ in {sorted(other)[:3]}. Make "
                f"{type(self).__name__} with the strategies that it was saved with."
            )
        self.steps_done, self._count, self._waiting = state["steps_done"], state["count"], {}
        for name, value in state["gates"].items():
            self._set(name, value)


def _mean_over_ranks(
    gradients: Mapping[str, Tensor], gates: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """The mean over processes, zeros where a process had none; one message for all."""
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    if not distributed or torch.distributed.get_world_size() == 1:
        return dict(gradients)
    rows = [gradients.get(name, torch.zeros_like(gate)) for name, gate in gates.items()]
    flat = torch.cat([row.detach() for row in rows])
    torch.distributed.all_reduce(flat)
    flat /= torch.distributed.get_world_size()
    return dict(zip(gates, torch.split(flat, [len(row) for row in rows]), strict=True))


def _refuse_compiled(model: nn.Module) -> None:
    compiled = [
        path or type(model).__name__
        for path, module in model.named_modules()
        if hasattr(module, "_orig_mod") or getattr(module, "_compiled_call_impl", None) is not None
    ]
    if compiled:
        raise UnsupportedModelError(
            f"masks must be attached before torch.compile, which does not see hooks that come "
            f"later; {compiled[0]} is compiled. Attach to the plain model, then compile it."
        )
