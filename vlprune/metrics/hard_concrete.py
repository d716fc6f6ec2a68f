"""Hard-concrete masks under a Lagrangian: L0 regularisation to a budget, over all towers at once.

Every unit has a number log a. A mask is drawn for every step, stretched over [0, 1] and clamped, so
that it is 0 or 1 with some probability and has a gradient between:

    s = sigmoid((log u - log(1 - u) + log a) / T),  z = clamp(s (b - l) + l, 0, 1)
    P(z > 0) = sigmoid(log a - T log(-l / b)),      T = 2/3, l = -0.1, b = 1.1

log a follows the gradient of the loss through z and that of

    lambda1 (e - t) + lambda2 (e - t)^2

where e is the expected cost of the model (exact: `expected.py`), t the target, which rises from the
dense model's over `warm_up` steps, counted over the whole run; both lambdas ascend. One constraint
covers vision, text, fusion and decoder, so the loss says how much each of them loses
(modal-adaptive). Masks have an optimiser of their own. Cost: one draw and one expected cost a step.

Source: Louizos et al., ICLR 2018 (1712.01312); Wang et al., EMNLP 2020 (1910.04732) for the
Lagrangian; Wang et al., EfficientVLM, 2023 (2210.07795) for the modal-adaptive rule. Differences:
expected cost of the whole model instead of a sum over units; the result is cut.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from vlprune.anatomy import Anatomy
from vlprune.calls import Inputs
from vlprune.cost import absolute_budget, dense_cost, least_cost
from vlprune.errors import BudgetError
from vlprune.expected import ExpectedCost
from vlprune.gates import zeros_and_ones
from vlprune.metrics._base import DEFAULT_STRATEGIES
from vlprune.metrics._learned import LearnedMasks
from vlprune.plan import Scores
from vlprune.ranking import keep_within
from vlprune.registry import METRICS

TEMPERATURE, LEFT, RIGHT = 2 / 3, -0.1, 1.1
_SURE = 1e-6  # how near to 0 and 1 a draw may come
_MOST = math.log(1e2)  # of |log a|
_FIRST = 2.0  # log a at the start: nearly all stay


@METRICS.register("hard_concrete")
class HardConcrete(LearnedMasks):
    """Masks drawn from hard-concrete distributions that learn to meet a budget.

    Args:
        model: trained by its owner; see `LearnedMasks`.
        anatomy: of it.
        budget: what is to be left in the end, see `vlprune.plan`.
        steps: of the search.
        warm_up: steps in which the target falls from the dense model's cost to the budget; default:
            a third of all.
        lr: of log a and of the multipliers (AdamW). The paper's 0.01 wants thousands of steps.
        seed: of the draws.
        min_units: at least so many units stay on every axis.
        example_inputs: for the dissection.
        strategies: kinds of axes that may lose units.
    """

    def __init__(
        self,
        model: nn.Module,
        anatomy: Anatomy | None = None,
        *,
        budget: Mapping[str, float] | None = None,
        steps: int = 300,
        warm_up: int | None = None,
        lr: float = 0.1,
        seed: int = 0,
        min_units: int = 0,
        example_inputs: Inputs | None = None,
        strategies: tuple[str, ...] = DEFAULT_STRATEGIES,
    ):
        self.lr, self.seed, self.min_units = lr, seed, min_units
        self.warm_up = max(steps // 3, 1) if warm_up is None else warm_up
        self._expected: ExpectedCost | None = None
        super().__init__(
            model,
            anatomy,
            budget={"prunable_params": 0.5} if budget is None else budget,
            steps=steps,
            example_inputs=example_inputs,
            strategies=strategies,
        )

    def reset(self) -> None:
        """Begin again."""
        super().reset()
        assert self.budget is not None
        anatomy = self.anatomy
        self._expected = self._expected or ExpectedCost(anatomy)
        dense, least = dense_cost(anatomy), least_cost(anatomy)
        limits = absolute_budget(anatomy, self.budget)
        if "latency_ms" in limits:
            raise BudgetError(
                "hard_concrete must have a budget of params or macs, whose expected cost is exact; "
                f"got {self.budget}. Learn with macs, then vlprune.plan its scores by latency."
            )
        self._range = {key: (getattr(dense, key), getattr(least, key)) for key in limits}
        self._targets = {
            key: (now - limits[key]) / max(now - fewest, 1)
            for key, (now, fewest) in self._range.items()
        }
        self._random = torch.Generator().manual_seed(self.seed)
        noise = {
            axis.name: 0.01 * torch.randn(axis.units, generator=self._random)
            for axis in anatomy.axes
        }
        self.log_alpha = {name: (_FIRST + row).requires_grad_() for name, row in noise.items()}
        self.multipliers = torch.zeros(2, len(limits), requires_grad=True)
        groups: list[dict[str, Any]] = [
            {"params": list(self.log_alpha.values())},
            {"params": [self.multipliers], "maximize": True},
        ]
        self._optimiser = torch.optim.AdamW(groups, lr=self.lr, weight_decay=0.0)
        self._draw()

    def probabilities(self) -> dict[str, Tensor]:
        """Return the probability [units] that each unit stays, by axis, with a gradient."""
        shift = TEMPERATURE * math.log(-LEFT / RIGHT)
        return {name: torch.sigmoid(row - shift) for name, row in self.log_alpha.items()}

    def removed(self) -> dict[str, float]:
        """Return the expected share that is removed of all that can be, by resource."""
        with torch.no_grad():
            return {key: float(value) for key, value in self._removed().items()}

    def penalty(self) -> Tensor:
        """Return the Lagrangian at this step, a scalar: added by `step`, here to be logged."""
        reached = min(1.0, (self.steps_done + 1) / max(self.warm_up, 1))
        gaps = [value - reached * self._targets[key] for key, value in self._removed().items()]
        gap = torch.stack(gaps).float()
        return (self.multipliers[0] * gap + self.multipliers[1] * gap.square()).sum()

    def compute(self) -> Scores:
        """Return log a of every unit."""
        return self._scores({name: row.detach() for name, row in self.log_alpha.items()})

    @contextlib.contextmanager
    def deterministic(self) -> Iterator[None]:
        """Set every axis to as many ones as are expected, for its largest log a: to evaluate."""
        drawn = {name: gate.detach().clone() for name, gate in self.gates.values.items()}
        if not self.is_done:
            for name, row in self.probabilities().items():
                stay = row.detach()
                gone = round(len(stay) - float(stay.sum()))
                order = self.log_alpha[name].detach().argsort(stable=True).tolist()
                self._set(name, zeros_and_ones(order[gone:], stay))
        try:
            yield
        finally:
            for name, value in drawn.items():
                self._set(name, value)

    def state_dict(self) -> dict[str, Any]:
        """Return all that a search needs to go on bit-equal."""
        return {
            **super().state_dict(),
            "log_alpha": {name: row.detach().clone() for name, row in self.log_alpha.items()},
            "multipliers": self.multipliers.detach().clone(),
            "optimiser": self._optimiser.state_dict(),
            "noise": {name: row.clone() for name, row in self._noise.items()},
            "random": self._random.get_state(),
        }

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take it from there."""
        super().load_state_dict(state)
        for name, row in state["log_alpha"].items():
            self.log_alpha[name].copy_(row)
        self.multipliers.copy_(state["multipliers"])
        self._optimiser.load_state_dict(state["optimiser"])
        self._noise = {name: row.clone() for name, row in state["noise"].items()}
        self._random.set_state(state["random"].cpu())

    def _settings(self) -> dict[str, Any]:
        return {
            "steps": self.steps_done,
            "warm_up": self.warm_up,
            "lr": self.lr,
            "seed": self.seed,
            "budget": self.budget,
        }

    def _removed(self) -> dict[str, Tensor]:
        assert self._expected is not None
        cost = self._expected(self.probabilities(), self._range)
        return {
            key: (dense - cost[key]) / max(dense - least, 1)
            for key, (dense, least) in self._range.items()
        }

    def _take(self, gradients: dict[str, Tensor]) -> None:
        if self.is_done:
            return
        self._optimiser.zero_grad()
        masks = self._masks()
        names = [name for name in masks if name in gradients]
        torch.autograd.backward(
            [self.penalty(), *(masks[name] for name in names)],
            [None, *(gradients[name].cpu() for name in names)],
        )
        self._optimiser.step()
        with torch.no_grad():
            for row in self.log_alpha.values():
                row.clamp_(-_MOST, _MOST)

    def _move(self) -> None:
        if not self.is_done:
            self._draw()
            return
        for name, units in self._keep().items():
            self._set(name, zeros_and_ones(units, self.log_alpha[name]))

    def _keep(self) -> dict[str, tuple[int, ...]]:
        """The units of the largest log a that the budget allows, in one ranking."""
        scores = self.compute()
        assert self.budget is not None
        worth = np.concatenate([np.asarray(scores.values[a.name]) for a in self.anatomy.axes])
        return keep_within(scores, worth, self.min_units, self.budget)

    def _draw(self) -> None:
        """Draw the masks of the next step: the same in every process."""
        self._noise = {
            name: torch.rand(len(row), generator=self._random).clamp(_SURE, 1 - _SURE)
            for name, row in self.log_alpha.items()
        }
        for name, mask in self._masks().items():
            self._set(name, mask.detach())

    def _masks(self) -> dict[str, Tensor]:
        """The masks that were drawn, as functions of log a."""
        return {name: stretched(self.log_alpha[name], noise) for name, noise in self._noise.items()}


def stretched(log_alpha: Tensor, noise: Tensor) -> Tensor:
    """Return the hard-concrete mask in [0, 1] of numbers log a for uniform noise in (0, 1)."""
    s = torch.sigmoid((noise.log() - (1 - noise).log() + log_alpha) / TEMPERATURE)
    return (s * (RIGHT - LEFT) + LEFT).clamp(0, 1)
