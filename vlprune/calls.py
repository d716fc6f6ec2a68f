"""How example inputs are written, and how a model is called with them.

`example_inputs` is a tuple of positional arguments, a dict of keyword arguments, one tensor, or a
list of such for a model with several forwards. Everything that calls a user's model goes through
`run`, and everything that reads its outputs through `tensors_of`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle

_RECORDED = ("hidden_states", "attentions", "router_logits")

Inputs: TypeAlias = (
    Tensor | tuple[Any, ...] | Mapping[str, Any] | list[tuple[Any, ...] | Mapping[str, Any]]
)


@dataclasses.dataclass(frozen=True, slots=True)
class Call:
    """One call of a model."""

    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def calls_of(example_inputs: Inputs) -> tuple[Call, ...]:
    """Return example inputs as calls.

    Raises:
        TypeError: if they are neither tensor, tuple, mapping, nor a list of these.
    """
    if isinstance(example_inputs, list):
        return tuple(call for entry in example_inputs for call in calls_of(entry))
    if isinstance(example_inputs, Call):
        return (example_inputs,)
    if isinstance(example_inputs, Tensor):
        return (Call((example_inputs,)),)
    if isinstance(example_inputs, tuple):
        return (Call(example_inputs),)
    if isinstance(example_inputs, Mapping):
        return (Call((), dict(example_inputs)),)
    raise TypeError(
        "example_inputs must be a tuple of positional arguments, a dict of keyword arguments, "
        f"a tensor, or a list of these; got {type(example_inputs).__name__}."
    )


def run(model: nn.Module, call: Call) -> Any:
    """Return what `model` answers to `call`; random draws on the way are the same every time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return model(*call.args, **call.kwargs)


def map_tensors(value: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """Return `value` with every tensor replaced, as `tensors_of` goes.

    Tuples, lists and dataclasses (outputs of transformers among them) keep their class; other
    mappings become plain dicts.
    """
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, Mapping):
        values = {key: map_tensors(entry, function) for key, entry in value.items()}
        return type(value)(**values) if dataclasses.is_dataclass(value) else values
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(map_tensors(entry, function) for entry in value))
    if isinstance(value, (tuple, list)):
        return type(value)(map_tensors(entry, function) for entry in value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        names = [field.name for field in dataclasses.fields(value)]
        changed = {name: map_tensors(getattr(value, name), function) for name in names}
        return dataclasses.replace(value, **changed)
    return value


def tensors_of(value: Any) -> Iterator[Tensor]:
    """Yield the tensors of an output: nested tuples, lists, mappings and dataclasses."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for entry in value.values():
            yield from tensors_of(entry)
    elif isinstance(value, (tuple, list)):
        for entry in value:
            yield from tensors_of(entry)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        for field in dataclasses.fields(value):
            yield from tensors_of(getattr(value, field.name))


def bytes_of(tensor: Tensor) -> memoryview:
    """Return the bytes of a tensor's values, in order, for hashing."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data if flat.numel() else memoryview(b"")


def first_tensor(output: Any) -> Tensor:
    """Return the first tensor of nested tuples."""
    while isinstance(output, tuple):
        output = output[0]
    assert isinstance(output, Tensor), type(output)
    return output


def with_first(output: Any, tensor: Tensor) -> Any:
    """Return nested tuples with their first tensor replaced."""
    return (with_first(output[0], tensor), *output[1:]) if isinstance(output, tuple) else tensor


def answers_of(output: Any) -> Iterator[Tensor]:
    """Yield the tensors of an output without what is recorded of every layer on the way."""
    if isinstance(output, Mapping):
        for key, value in output.items():
            recorded = key.endswith(_RECORDED) and isinstance(value, tuple)
            if not recorded:
                yield from tensors_of(value)
    else:
        yield from tensors_of(output)


def cast(call: Call, dtype: torch.dtype) -> Call:
    """Return `call` with its floating tensors in `dtype`."""
    replaced = map_tensors(call, lambda t: t.to(dtype) if t.is_floating_point() else t)
    assert isinstance(replaced, Call)
    return replaced


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Let no parameter of `model` require a gradient."""
    trained = [p for p in model.parameters() if p.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)


@contextmanager
def float64_default() -> Iterator[None]:
    """Let what a model makes on its way in the default dtype be float64, as its weights are."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


class WideFloats(TorchFunctionMode):
    """Let float32 that a model asks for by name be float64: a check then rounds nowhere."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is Tensor.float:
            return args[0].double()
        args = tuple(torch.float64 if entry is torch.float32 else entry for entry in args)
        named = {
            name: torch.float64 if value is torch.float32 else value
            for name, value in (kwargs or {}).items()
        }
        return func(*args, **named)


@contextmanager
def all_float64() -> Iterator[None]:
    """Let all that a model makes on its way be float64: by default, and where it names float32."""
    with float64_default(), WideFloats():
        yield


@contextmanager
def removing(handles: Iterable[RemovableHandle]) -> Iterator[None]:
    """Take hooks off again when the block ends."""
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def quiet_eval(model: nn.Module) -> Iterator[nn.Module]:
    """Put `model` into eval mode for a block, and every module back into its own mode after."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield model
    finally:
        for module, mode in modes:
            module.training = mode
