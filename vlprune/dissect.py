"""From a model to its anatomy: ask every strategy for its axes, count the cost.

The model is read, run on example inputs, and left as it was. Which structures exist is known by
`strategies/`, where they lie is found by `discover.py`, what classes cannot do by themselves is
declared in `families/`.
"""

from __future__ import annotations

import collections
import fnmatch
import functools
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from vlprune.anatomy import (
    Anatomy,
    Axis,
    Operation,
    Refusal,
    TensorShape,
    fingerprint_of,
    under,
)
from vlprune.calls import Call, Inputs, calls_of, map_tensors, quiet_eval, run, tensors_of
from vlprune.cost import countable_kernels
from vlprune.discovery.discover import Discovery, discover
from vlprune.errors import TraceError, UnsupportedModelError
from vlprune.faults import check_plain
from vlprune.layout import BlockLayout, Family, family_of, is_a
from vlprune.registry import FAMILIES, STRATEGIES
from vlprune.shapes import QuickShapes

TOWERS = ("vision", "text", "fusion", "decoder")

TOWERS_BY_NAME = (  # for models that no family declares
    *((f"*{word}*", "fusion") for word in ("cross", "fusion", "qformer", "multimodal", "joint")),
    *((f"*{word}*", "decoder") for word in ("decoder", "captioner")),
    *((f"*{word}*", "vision") for word in ("vision", "visual", "image", "patch", "pixel")),
    *((f"*{word}*", "text") for word in ("text", "language", "token", "bert", "caption", "word")),
)


class ModelView:
    """What a strategy may ask of a model: units, stacks, declared blocks, places, trials.

    Attributes:
        model: the model, only to be read.
        refusals: modules that a strategy left whole, with the reason.
        units_hold: whether units of all kinds can go together, None before it was tried.
    """

    def __init__(self, model: nn.Module, calls: Sequence[Call]):
        self.model = model
        self.calls = calls
        self.refusals: list[Refusal] = []
        self.units_hold: bool | None = None
        self._families: list[Family] = list(FAMILIES.values())
        self._owners = _owners(model)

    @functools.cached_property
    def discovery(self) -> Discovery:
        """Units and stacks, proven region by region, when first asked for."""
        rows = [row for family in self._families for row in family.attentions]
        found = discover(self.model, self.calls, _matches(self.model, rows), self.blocks)
        self.refusals += found.refusals
        return found

    @functools.cached_property
    def blocks(self) -> dict[str, BlockLayout]:
        """Module path to layout of every declared block."""
        return _matches(self.model, [row for family in self._families for row in family.blocks])

    @functools.cached_property
    def _towers(self) -> tuple[tuple[str, str], ...]:
        try:
            return family_of(self.model, FAMILIES)[1].towers
        except UnsupportedModelError:
            return ()

    def tower(self, path: str) -> str:
        """The tower that a module path lies in, by the family of the model's class."""
        for pattern, tower in (*self._towers, *TOWERS_BY_NAME):
            if fnmatch.fnmatchcase(path, pattern):
                return tower
        return "vision"

    def depth(self, path: str) -> int:
        """The index of the block that a module path lies in, 0 outside of any stack."""
        for stack in self.discovery.stacks:
            if under(path, stack.path) and path != stack.path:
                return int(path.removeprefix(stack.path + ".").partition(".")[0])
        return 0

    def tensor_names(self, name: str) -> tuple[str, ...]:
        """All names of the tensor called `name`, the first one first; tied ones have several."""
        tensor: Any = self.model
        for step in name.split("."):
            tensor = getattr(tensor, step, None)
        return self._owners.get(id(tensor), ())

    def refuse(self, module: str, reason: str, kind: str = "") -> None:
        """Note that `module` is left whole because of `reason`."""
        self.refusals.append(Refusal(module=module, reason=reason, kind=kind))


def dissect(model: nn.Module, example_inputs: Inputs | None = None) -> Anatomy:
    """Return all that can be removed from `model`.

    Args:
        model: any module; it is run in eval mode and left as it was. Meta and fake tensors work.
        example_inputs: a tuple of positional or dict of keyword arguments; a list of such for a
            model with several forwards. Default: made by the family of the model's class.

    Returns:
        The anatomy. Modules that are left whole are its `refusals`, each with a reason.

    Raises:
        UnsupportedModelError: if nothing prunable was found, no family can make inputs, or the
            model is compiled or quantised.
        TraceError: if the model cannot be traced on the example inputs.
    """
    check_plain(model)
    calls = calls_of(default_inputs(model) if example_inputs is None else example_inputs)
    view = ModelView(model, calls)
    axes = [axis for strategy in STRATEGIES.values() for axis in strategy(view)]
    if not axes:
        raise UnsupportedModelError(
            f"{type(model).__name__} must hold an attention, a feed-forward network or a stack of "
            "blocks that can be cut; found none."
            + "".join(f"\n  {r.module}: {r.reason}" for r in view.refusals)
        )
    order = {path: i for i, (path, _) in enumerate(model.named_modules())}
    axes.sort(key=lambda axis: (order.get(axis.path, -1), axis.name))
    return Anatomy(
        model=type(model).__name__,
        axes=tuple(axes),
        tensors=tensor_shapes(model),
        operations=_operations(model, calls, axes),
        refusals=tuple(view.refusals),
    )


def default_inputs(model: nn.Module, batch: int = 1) -> Inputs:
    """Return example inputs made by the family of the model's class, on the model's device.

    Raises:
        UnsupportedModelError: if no family declares that class.
    """
    _, family = family_of(model, FAMILIES)
    if family.example_inputs is None:
        raise UnsupportedModelError(
            f"no example inputs are known for {type(model).__name__}; give example_inputs."
        )
    inputs = family.example_inputs(model, batch)
    device = next((p.device for p in model.parameters()), None)
    if device is None or device.type == "cpu":
        return inputs
    moved: Inputs = map_tensors(inputs, lambda tensor: tensor.to(device))
    return moved


def _matches(model: nn.Module, rows: Sequence[Any]) -> dict[str, Any]:
    found = {}
    for path, module in model.named_modules():
        fitting = [row for row in rows if is_a(module, row.cls)]
        if fitting:  # the most derived class wins
            names = [f"{c.__module__}.{c.__qualname__}" for c in type(module).__mro__]
            found[path] = min(fitting, key=lambda row: names.index(row.cls))
    return found


def _owners(model: nn.Module) -> dict[int, tuple[str, ...]]:
    """Tensor identity to all its names."""
    names: dict[int, list[str]] = collections.defaultdict(list)
    named: list[tuple[str, Tensor]] = [
        *model.named_parameters(remove_duplicate=False),
        *model.named_buffers(remove_duplicate=False),
    ]
    for name, tensor in named:
        names[id(tensor)].append(name)
    return {key: tuple(found) for key, found in names.items()}


def tensor_shapes(model: nn.Module) -> tuple[TensorShape, ...]:
    """Return name and shape of every parameter and buffer, tied ones once."""
    parameters = [(name, tensor, True) for name, tensor in model.named_parameters()]
    buffers = [(name, tensor, False) for name, tensor in model.named_buffers()]
    return tuple(
        TensorShape(name=name, shape=tuple(tensor.shape), is_parameter=is_parameter)
        for name, tensor, is_parameter in [*parameters, *buffers]
    )


def fingerprint_of_model(model: nn.Module) -> str:
    """Return what `Anatomy.fingerprint` would be, without a dissection."""
    return fingerprint_of(type(model).__name__, tensor_shapes(model))


def _operations(
    model: nn.Module, calls: Sequence[Call], axes: Sequence[Axis]
) -> tuple[Operation, ...]:
    """Run the model once and return its multiply-accumulates, by module and axes."""
    path = _ModulePath(model)
    recorder = _Recorder(model, axes, path)
    try:
        with quiet_eval(model), countable_kernels(), path, QuickShapes(), recorder:
            for call in calls:
                run(model, call)
    except Exception as error:
        raise TraceError(
            f"{type(model).__name__} must run on the example inputs; it raised "
            f"{type(error).__name__}: {error}."
        ) from error
    return tuple(
        Operation(module=module, macs=flops // 2, tensors=tensors, axes=names)
        for (module, tensors, names), flops in recorder.flops.items()
    )


class _ModulePath:
    """A context in which `current` is the path of the innermost running module."""

    def __init__(self, model: nn.Module):
        self._model = model
        self._stack = [""]
        self._handles: list[Any] = []

    @property
    def current(self) -> str:
        return self._stack[-1]

    def __enter__(self) -> _ModulePath:
        for path, module in self._model.named_modules():
            self._handles.append(module.register_forward_pre_hook(self._push(path)))
            self._handles.append(module.register_forward_hook(self._pop, always_call=True))
        return self

    def __exit__(self, *failure: object) -> None:
        for handle in self._handles:
            handle.remove()

    def _push(self, path: str) -> Any:
        return lambda module, args: self._stack.append(path)

    def _pop(self, *_: Any) -> None:
        self._stack.pop()


class _Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts FLOPs as `FlopCounterMode` does, by module and by the axes they grow with.

    An operation on a weight grows with its size; one without a weight (attention scores) with the
    slice axes whose scope it lies in: every other one there is scores, the next a mixture.
    """

    def __init__(self, model: nn.Module, axes: Sequence[Axis], path: _ModulePath):
        from torch.utils.flop_counter import flop_registry  # lazy: it imports triton

        self._formulas = flop_registry
        super().__init__()  # type: ignore[no-untyped-call]
        self.flops: dict[tuple[str, tuple[str, ...], tuple[str, ...]], int] = (
            collections.defaultdict(int)
        )
        self._path = path
        self._scoped = [a for a in axes if a.removal == "slice" and a.scopes]
        self._products: dict[str, int] = collections.defaultdict(int)
        self._weights = {
            parameter.untyped_storage()._cdata: name
            for name, parameter in model.named_parameters()
            if parameter.dim() > 1
        }

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func._overloadpacket not in self._formulas:
            with self:
                decomposed = func.decompose(*args, **kwargs)
            if decomposed is not NotImplemented:
                return decomposed
        out = func(*args, **kwargs)
        formula = self._formulas.get(func._overloadpacket)
        if formula is not None:
            flops = formula(*args, **kwargs, out_val=out)
            storages = [t.untyped_storage()._cdata for t in tensors_of(args)]
            tensors = tuple(dict.fromkeys(self._weights[s] for s in storages if s in self._weights))
            axes = () if tensors else self._axes_here()
            self.flops[self._path.current, tensors, axes] += int(flops)
        return out

    def _axes_here(self) -> tuple[str, ...]:
        here = self._path.current
        growths = ("all", ("scores", "mixture")[self._products[here] % 2])
        self._products[here] += 1
        return tuple(
            axis.name
            for axis in self._scoped
            if axis.grows in growths and any(under(here, s) for s in axis.scopes[0])
        )
