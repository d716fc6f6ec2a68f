"""Gates: one number per unit, live on a model, where 0 means removed. Reversible, differentiable.

One mechanism serves masks (values 0 or 1), importance (the gradient at 1), ablation (set to 0 and
measure), learnable masks (a parameter) and statistics (a tap on what flows through). Leaving the
context gives the model back bit for bit. For good, units are removed by `pruner.py`.
"""

from __future__ import annotations

import collections
import functools
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from vlprune.anatomy import Axis
from vlprune.calls import first_tensor, tensors_of, with_first
from vlprune.errors import PlanError
from vlprune.intercepts import ProductMode, RouterMode, while_running
from vlprune.layout import resolve

Tap = Callable[[Axis, int | None, Tensor, Tensor | None], None]


def zeros_and_ones(units: Sequence[int], like: Tensor) -> Tensor:
    """Return 1 for these units and 0 for all others, [units] as `like`, in its type."""
    value = torch.zeros_like(like, requires_grad=False)
    value[list(units)] = 1
    return value


class Gates:
    """Gates on axes of a model, on while the context is entered.

    Args:
        model: the model that the axes were found in.
        axes: each gets one gate per unit.
        per_sample: make a fresh gate of ones for every example in every forward, so that one
            backward gives every example its own gate gradient (`sample_gradients`).
        tap: called with (axis, unit, input, output) for what flows through a gate, before it is
            multiplied. For "input" and "product" gates unit is None, the input [..., units,
            features] as the gate sees it, the output None; for "router" gates likewise, the input
            being 1 for every expert chosen; else residual input and output of the unit's module.

    Attributes:
        values: axis name to its gate [units], ones at first, float32. Assign 0 and 1, a tensor
            with a gradient, or a parameter; or gates [variants, units] for a batch that holds as
            many copies of its examples, one copy after the other. Moves to the device and dtype
            of what it multiplies.
    """

    def __init__(
        self,
        model: nn.Module,
        axes: Sequence[Axis],
        *,
        per_sample: bool = False,
        tap: Tap | None = None,
    ):
        self.model = model
        self.axes = tuple(axes)
        self.values: dict[str, Tensor] = {}
        self._per_sample = per_sample
        self._tap = tap
        self._samples: dict[tuple[str, int | None], list[Tensor]] = collections.defaultdict(list)
        self._handles: list[RemovableHandle] = []
        self._classes: list[tuple[nn.Module, type]] = []
        for axis in self.axes:
            module = model.get_submodule(axis.gate.modules[0])
            holder = next(itertools.chain(module.parameters(), model.parameters()))
            self.values[axis.name] = torch.ones(axis.units, device=holder.device)
        self._ones = dict(self.values)

    def __enter__(self) -> Gates:
        norms: dict[str, list[Axis]] = collections.defaultdict(list)
        for axis in self.axes:
            self._attach(axis)
            for path in axis.gate.norms:
                norms[path].append(axis)
        for path, axes in norms.items():
            self._attach_norm(axes, self.model.get_submodule(path))
        return self

    def __exit__(self, *failure: object) -> None:
        for handle in self._handles:
            handle.remove()
        for module, cls in reversed(self._classes):
            module.__class__ = cls
        self._handles.clear()
        self._classes.clear()
        self._samples.clear()

    def keep(self, kept: Mapping[str, tuple[int, ...]]) -> None:
        """Set the gates of every axis named in `kept` to 1 for its units and 0 for the others.

        Raises:
            PlanError: if an axis has no gate here.
        """
        for name, units in kept.items():
            if name not in self.values:
                raise PlanError(
                    f"axis {name!r} must have a gate here; there are none of that "
                    "name. Make the plan again with vlprune.plan."
                )
            value = zeros_and_ones(units, self._ones[name])
            if len(units) == len(value):
                self._ones[name] = value
            self.values[name] = value

    def sample_gradients(self) -> list[tuple[str, int | None, Tensor]]:
        """Return (axis, unit, gradient [examples, units]) of the last backward, and forget it.

        `unit` is None where the gradient covers all units of the axis, else the one unit that it
        belongs to (gradient [examples, 1]). A module that ran twice on the same examples has its
        gradients added up.
        """
        found = []
        for (name, unit), gates in self._samples.items():
            by_size: dict[int, Tensor] = {}
            for gate in gates:
                if gate.grad is not None:
                    size = gate.shape[0]
                    by_size[size] = by_size[size] + gate.grad if size in by_size else gate.grad
            found += [(name, unit, gradient) for gradient in by_size.values()]
        self._samples.clear()
        return found

    def _attach(self, axis: Axis) -> None:
        for swap in axis.swaps:
            if swap.when == "gate":
                self._swap(self.model.get_submodule(swap.module), resolve(swap.to))
        if axis.gate.kind == "router":
            self._attach_router(axis)
            return
        if axis.gate.kind == "input":
            for path in axis.gate.modules:
                consumer = self.model.get_submodule(path)
                self._handles.append(consumer.register_forward_pre_hook(self._input_hook(axis)))
        for name in dict.fromkeys(site.tensor for site in axis.gate.sites):
            path, _, weight = name.rpartition(".")
            hook = self._product_hook(axis, name)
            for user in axis.gate.within:
                module = self.model.get_submodule(path)
                mode = ProductMode(getattr(module, weight), functools.partial(hook, module, None))
                self._handles += while_running(self.model.get_submodule(user), mode)
            if not axis.gate.within:
                self._handles.append(_hook_product(self.model.get_submodule(path), weight, hook))
        if axis.gate.kind in ("input", "product"):
            return
        for unit, path in enumerate(axis.gate.modules):
            module = self.model.get_submodule(path)
            hook = self._branch_hook(axis, unit)
            # first of all hooks: those that record what a layer answers must see it gated
            handle = module.register_forward_hook(hook, with_kwargs=True, prepend=True)
            self._handles.append(handle)

    def _swap(self, module: nn.Module, cls: type) -> None:
        if not isinstance(module, cls):
            self._classes.append((module, type(module)))
            module.__class__ = cls

    def _input_hook(self, axis: Axis) -> Callable[[nn.Module, tuple[Any, ...]], tuple[Any, ...]]:
        def multiply(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
            x = args[0]  # [B, ..., repeats * U * block]
            if self._tap:
                by_unit = x.movedim(axis.gate.dim, -1)
                sizes = (axis.gate.repeats, axis.units, axis.gate.block)
                by_unit = by_unit.reshape(*by_unit.shape[:-1], *sizes).transpose(-3, -2)
                self._tap(axis, None, by_unit.flatten(-2), None)
            if self._is_open(axis):
                return args
            return (x * self._feature_gate(axis, x, axis.gate.block), *args[1:])

        return multiply

    def _feature_gate(self, axis: Axis, x: Tensor, block: int) -> Tensor:
        """The gate of every feature of `x`, shaped to broadcast."""
        gate = self._gate(axis, None, x).repeat_interleave(block, dim=-1)
        gate = gate.repeat(*[1] * (gate.dim() - 1), axis.gate.repeats)
        return _broadcast(gate, x, axis.gate.dim)

    def _product_hook(self, axis: Axis, weight: str) -> Callable[[Any, Any, Tensor], Tensor]:
        sites = [site for site in axis.gate.sites if site.tensor == weight]
        rows = [[i for site in sites for i in site.indices((u,))] for u in range(axis.units)]
        index = torch.tensor([row for unit in rows for row in unit])  # [U * features of a unit]
        size = len(rows[0])

        def multiply(module: nn.Module, args: Any, out: Tensor) -> Tensor:
            places = index.to(out.device)
            if self._tap and axis.gate.kind == "product":
                by_unit = out[..., places].reshape(*out.shape[:-1], axis.units, size)
                self._tap(axis, None, by_unit, None)
            if self._is_open(axis):
                return out
            gate = self._gate(axis, None, out).repeat_interleave(size, dim=-1)
            if axis.gate.kind != "product":
                gate = gate.detach()  # the gradient is that of the gate on the input
            whole = gate.new_ones(*gate.shape[:-1], out.shape[-1])
            return out * _broadcast(whole.index_copy(-1, places, gate), out, -1)

        return multiply

    def _attach_norm(self, axes: Sequence[Axis], norm: nn.Module) -> None:
        """Let `norm` take its statistics over features that all `axes` keep.

        Over N features of which K stay: input scaled by sqrt(N / K) where it stays, 0 elsewhere,
        has their statistics; the answer is scaled back. A norm that subtracts the mean gets centred
        input. So no formula of the norm's own is needed, its epsilon included.
        """
        scale: list[Tensor] = []

        def narrow(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
            scale.clear()
            x = args[0]
            gate: Tensor | None = None
            for axis in axes:
                once = axis.units * axis.gate.repeats
                if not self._is_open(axis) and x.shape[-1] % once == 0:
                    features = self._feature_gate(axis, x, x.shape[-1] // once)
                    gate = features if gate is None else gate * features
            if gate is None:
                return args
            kept = gate.sum(-1, keepdim=True).clamp_min(1)
            if subtracts_mean:
                x = x - (x * gate).sum(-1, keepdim=True) / kept
            scale.append((kept / x.shape[-1]).sqrt())
            return (x * gate / scale[0], *args[1:])

        def restore(module: Any, args: Any, output: Tensor) -> Tensor:
            if not scale:
                return output
            bias = getattr(module, "bias", None)
            return output * scale[0] if bias is None else (output - bias) * scale[0] + bias

        subtracts_mean = _subtracts_mean(norm)
        self._handles.append(norm.register_forward_pre_hook(narrow))
        self._handles.append(norm.register_forward_hook(restore))

    def _attach_router(self, axis: Axis) -> None:
        """Run every module of the gate in a mode that changes what its router answers."""
        examples: list[int] = []

        def gate_of(logits: Tensor) -> Tensor | None:
            if self._is_open(axis):
                return None
            if not self._per_sample:
                return self._gate(axis, None, logits)
            tokens = math.prod(logits.shape[:-1])
            batch = examples[-1] if tokens % examples[-1] == 0 else tokens
            gate = self._gate(axis, None, logits.new_empty(batch, 0))
            return gate.repeat_interleave(tokens // batch, 0).reshape(logits.shape)

        tap = None
        if self._tap is not None:
            tap = functools.partial(_tapped, self._tap, axis)
        first = axis.gate.modules[0]
        owners = {site.tensor.rpartition(".")[0] for site in axis.gate.sites}
        for path in axis.gate.modules:  # several where tied modules are routed alike
            mode = RouterMode(axis.units, gate_of, tap)

            def count(module: Any, args: Any, kwargs: Any) -> None:
                examples[:] = [next(tensors_of((args, kwargs))).shape[0]]

            def step(change: int, mode: RouterMode = mode) -> Callable[..., None]:
                def moved(*_: Any) -> None:
                    mode.inside += change

                return moved

            for owner in owners:
                module = self.model.get_submodule(path + owner.removeprefix(first))
                self._handles.append(module.register_forward_pre_hook(step(1)))
                self._handles.append(module.register_forward_hook(step(-1)))
            holder = self.model.get_submodule(path)
            self._handles.append(holder.register_forward_pre_hook(count, with_kwargs=True))
            self._handles += while_running(holder, mode)

    def _branch_hook(self, axis: Axis, unit: int) -> Callable[..., Any]:
        def interpolate(module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
            out = first_tensor(output)
            residual = _residual(axis, args, kwargs)
            if self._tap:
                self._tap(axis, unit, residual, out)
            if self._is_open(axis):
                return output
            gate = self._gate(axis, unit, out)
            if gate.dim() == 1:
                gate = gate.reshape(-1, *[1] * (out.dim() - 1))  # [B] -> [B, 1, ...]
            if axis.gate.kind == "output":
                out = out * gate
            else:  # exact at both ends: the input at 0, the output at 1
                out = torch.lerp(residual.to(out.dtype), out, gate)
            return with_first(output, out)

        return interpolate

    def _is_open(self, axis: Axis) -> bool:
        """Say whether the gate is still the ones that it began with: then nothing is multiplied."""
        value = self.values[axis.name]
        if self._per_sample or value is not self._ones[axis.name] or value.requires_grad:
            return False
        # an inference tensor does not count its changes
        return not value.is_inference() and value._version == 0

    def _gate(self, axis: Axis, unit: int | None, x: Tensor) -> Tensor:
        """[units] or a scalar; per sample [examples, units] or [examples]."""
        if self._per_sample:
            shape = (x.shape[0], axis.units if unit is None else 1)
            fresh = torch.ones(shape, dtype=torch.float32, device=x.device, requires_grad=True)
            self._samples[axis.name, unit].append(fresh)
            value = fresh if unit is None else fresh[:, 0]
        else:
            value = self.values[axis.name]
            value = value if unit is None else value[..., unit]
            if self.values[axis.name].dim() == 2:  # a row per variant, each with many examples
                value = value.repeat_interleave(x.shape[0] // len(value), 0)
        return value.to(device=x.device, dtype=x.dtype)


def _tapped(tap: Tap, axis: Axis, chosen: Tensor) -> None:
    tap(axis, None, chosen, None)


def _hook_product(
    module: Any, weight: str, hook: Callable[[Any, Any, Tensor], Tensor]
) -> RemovableHandle:
    """Let `hook` change what the matrix `weight` of `module` answers, biases included.

    A module that multiplies by several offers `register_product_hook(weight, hook)` for this.
    """
    offered = getattr(module, "register_product_hook", None)
    handle: RemovableHandle = (
        module.register_forward_hook(hook) if offered is None else offered(weight, hook)
    )
    return handle


def _broadcast(gate: Tensor, x: Tensor, dim: int) -> Tensor:
    """[features] or [examples, features] shaped to broadcast along `dim` of `x`."""
    shape = [1] * x.dim()
    shape[dim] = gate.shape[-1]
    if gate.dim() == 2:  # one row an example
        shape[0] = gate.shape[0]
    return gate.reshape(shape)


def _subtracts_mean(norm: nn.Module) -> bool:
    """Say whether a constant added to all features makes no difference to `norm`."""
    if isinstance(norm, nn.LayerNorm):
        return True
    weight: Any = norm.weight
    x = torch.linspace(-1, 1, weight.numel(), device=weight.device, dtype=weight.dtype)
    with torch.no_grad():
        moved = (norm(x + 3) - norm(x)).abs().max()
    return bool(moved < 1e-3)


def _residual(axis: Axis, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    if axis.gate.argument is not None and len(args) > axis.gate.argument:
        found = args[axis.gate.argument]
    else:
        found = kwargs.get(axis.gate.keyword, next(iter(kwargs.values())))
    assert isinstance(found, Tensor), f"{axis.name}: no residual input at {axis.gate}"
    return found
