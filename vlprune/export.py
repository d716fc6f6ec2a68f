"""Cut models as programs: a torch.export file, an ONNX file, and compiled; each run and compared.

A program holds one forward. The number of examples stays free where the exporter finds that it can.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import io
import logging
import os
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from vlprune.calls import Call, Inputs, calls_of, cast, map_tensors, quiet_eval, run, tensors_of
from vlprune.copies import clone, exact_clone
from vlprune.dissect import default_inputs
from vlprune.errors import LawError
from vlprune.law import relative_error_of_outputs

TOLERANCES = {"compile": 1e-6, "export": 1e-6, "onnx": 1e-4}
"""Largest relative errors. The first two run in float64, where only float32 that a model asks for
by name rounds; ONNX runs in the model's own dtype."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Exported:
    """A program and how far it is from its model.

    Attributes:
        path: of the file.
        relative_error: of its outputs on the example inputs.
        any_batch: whether it runs on another number of examples, too.
    """

    path: str
    relative_error: float
    any_batch: bool

    def __str__(self) -> str:
        batch = "any number of examples" if self.any_batch else "this number of examples only"
        return f"{self.path}: equal to {self.relative_error:.1e}, {batch}"


def files_of(model: nn.Module, path: str | os.PathLike[str]) -> list[tuple[Path, Inputs]]:
    """Return a file and example inputs for each forward of a model.

    The file of one forward is `path`; of several, the first is `NAME-0.SUFFIX`.
    """
    calls = calls_of(default_inputs(model, batch=2))
    path = Path(path)
    if len(calls) == 1:
        return [(path, _inputs_of(calls[0]))]
    names = (path.with_stem(f"{path.stem}-{i}") for i in range(len(calls)))
    return [(name, _inputs_of(call)) for name, call in zip(names, calls, strict=True)]


def _inputs_of(call: Call) -> Inputs:
    return dict(call.kwargs) if not call.args else call.args


def to_torch_export(
    model: nn.Module, path: str | os.PathLike[str], *, example_inputs: Inputs | None = None
) -> Exported:
    """Write what `torch.export.load` reads, and return how far it is from the model.

    Args:
        model: run in eval mode and left as it was.
        path: of the file, `.pt2` by custom.
        example_inputs: of one forward, with two examples at least; default: made by the family.

    Raises:
        ValueError: if there are several forwards.
        LawError: if the program, loaded again, answers differently.
    """
    path, call = Path(path), _one_call(model, example_inputs)
    model = _copy(model)
    torch.export.save(_program(model, call), path)
    loaded = torch.export.load(path).module()
    error = _error(model, call, lambda c: loaded(*c.args, **c.kwargs))
    return _checked(path, error, "export", _any_batch(loaded, call))


def to_onnx(
    model: nn.Module, path: str | os.PathLike[str], *, example_inputs: Inputs | None = None
) -> Exported:
    """Write an ONNX file, and return how far onnxruntime's answers are from the model's.

    Args:
        model: run in eval mode and left as it was.
        path: of the file.
        example_inputs: of one forward, with two examples at least; default: made by the family.

    Raises:
        ImportError: without the extra `vlprune[onnx]`.
        ValueError: if there are several forwards.
        LawError: if onnxruntime answers differently.
    """
    runtime = _onnxruntime()
    path, call = Path(path), _one_call(model, example_inputs)
    model = _copy(model)
    with _quiet(), torch.no_grad():
        torch.onnx.export(
            model,
            call.args,
            str(path),
            kwargs=dict(call.kwargs),
            dynamic_shapes=_free_batch(call),
            dynamo=True,
            external_data=False,
            verbose=False,
        )
    session = runtime.InferenceSession(str(path), providers=["CPUExecutionProvider"])

    def answer(c: Call) -> list[Tensor]:
        names = [entry.name for entry in session.get_inputs()]
        leaves = pytree.tree_leaves((c.args, dict(c.kwargs)))
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        feed = {n: t.numpy() for n, t in zip(names, tensors, strict=True)}
        return [torch.from_numpy(found) for found in session.run(None, feed)]

    error = _error(model, call, answer)
    return _checked(path, error, "onnx", _any_batch(answer, call))


def compile_error(model: nn.Module, example_inputs: Inputs | None = None) -> float:
    """Return the relative error between a model and itself compiled, both in float64.

    Raises:
        RuntimeError: if it cannot be compiled here, for instance without a C++ compiler.
    """
    inputs = default_inputs(model, batch=2) if example_inputs is None else example_inputs
    model = exact_clone(model)
    compiled: Any = torch.compile(model)
    errors = []
    try:
        with quiet_eval(model), torch.no_grad(), _quiet():
            for call in (cast(call, torch.float64) for call in calls_of(inputs)):
                errors.append(relative_error_of_outputs(run(model, call), run(compiled, call)))
    finally:
        torch._dynamo.reset()
    return max(errors)


def export_error(model: nn.Module, example_inputs: Inputs | None = None) -> float:
    """Return the relative error between a model and its exported programs, both in float64.

    There is one program a forward; each is saved and loaded once.
    """
    inputs = default_inputs(model, batch=2) if example_inputs is None else example_inputs
    model = _copy(exact_clone(model))
    return max(_exported(model, cast(call, torch.float64)) for call in calls_of(inputs))


def _exported(model: nn.Module, call: Call) -> float:
    file = io.BytesIO()
    torch.export.save(_program(model, call), file)
    file.seek(0)
    loaded = torch.export.load(file).module()
    return _error(model, call, lambda c: loaded(*c.args, **c.kwargs))


def _one_call(model: nn.Module, example_inputs: Inputs | None) -> Call:
    inputs = default_inputs(model, batch=2) if example_inputs is None else example_inputs
    calls = calls_of(inputs)
    if len(calls) != 1:
        raise ValueError(
            f"example_inputs must be of one forward, which is what a program holds; got "
            f"{len(calls)}. Export a module for each, with a forward of its own."
        )
    return calls[0]


def _copy(model: nn.Module) -> nn.Module:
    """A copy in eval mode that no gradient is asked of."""
    return clone(model).eval().requires_grad_(False)


def _program(model: nn.Module, call: Call) -> Any:
    with torch.no_grad(), _quiet():
        return torch.export.export(
            model, call.args, dict(call.kwargs), dynamic_shapes=_free_batch(call), strict=False
        )


def _free_batch(call: Call) -> Any:
    """Let the first dimension of every tensor be any, where the exporter finds that it can."""
    auto = torch.export.Dim.AUTO

    def free(value: Any) -> Any:
        return {0: auto} if isinstance(value, Tensor) and value.dim() else None

    args, kwargs = pytree.tree_map(free, (tuple(call.args), dict(call.kwargs)))
    return args if not kwargs else kwargs if not args else (*args, *kwargs.values())


def _error(model: nn.Module, call: Call, answer: Callable[[Call], Any]) -> float:
    with torch.no_grad(), quiet_eval(model):
        expected = list(tensors_of(run(model, call)))
        return relative_error_of_outputs(expected, list(tensors_of(answer(call))))


def _any_batch(answer: Callable[..., Any], call: Call) -> bool:
    """Say whether a program runs on one example more."""

    def more(t: Tensor) -> Tensor:
        return torch.cat([t, t[:1]]) if t.dim() else t

    bigger: Call = map_tensors(call, more)
    try:
        with torch.no_grad():
            if isinstance(answer, nn.Module):
                answer(*bigger.args, **bigger.kwargs)
            else:
                answer(bigger)
    except Exception:  # whatever a runtime says of a size that it was not made for
        return False
    return True


def _checked(path: Path, error: float, kind: str, any_batch: bool) -> Exported:
    tolerance = TOLERANCES["onnx"]  # files hold the model's own dtype
    if not error <= tolerance:
        path.unlink(missing_ok=True)
        raise LawError(
            f"what was exported ({kind}) must answer as the model does, to {tolerance:g}; got a "
            f"relative error of {error:.3g}. The file was removed.",
            relative_error=error,
        )
    return Exported(path=str(path), relative_error=error, any_batch=any_batch)


def _onnxruntime() -> Any:
    try:
        importlib.import_module("onnxscript")  # lazy: an extra
        return importlib.import_module("onnxruntime")
    except ImportError as error:
        raise ImportError(
            f"ONNX must have its packages; {error.name!r} is missing. Run `pip install "
            "'vlprune[onnx]'`."
        ) from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Let exporters say nothing: what they did is checked, and what they cannot do raises."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
