"""How long models take here: by the backend that runs them, side by side, in milliseconds.

A clock takes models and example inputs and returns their times. The models take turns, so that what
else the machine does falls on all alike: ratios within one call are meant, not single numbers.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol, get_args

import torch
from torch import Tensor, nn

from vlprune.calls import Call, Inputs, calls_of, map_tensors, quiet_eval, tensors_of
from vlprune.errors import UnsupportedModelError

Backend = Literal["eager", "compile", "onnx"]
BACKENDS: tuple[str, ...] = get_args(Backend)
_TURN_SECONDS = 0.1  # the least that is timed at once
_RECOMPILES = 64  # many widths of one class, compiled one after the other

Run = Callable[[], object]


class Clock(Protocol):
    """Says how long each model takes for the example inputs, in milliseconds [models]."""

    def __call__(self, models: Sequence[nn.Module], example_inputs: Inputs) -> list[float]: ...


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class DeviceClock:
    """Times models on the device that they are on.

    By medians the first model is the yardstick: its time is the median of all rounds, that of
    another is the median of its ratios to the first, round by round, times this.

    Attributes:
        backend: "eager", "compile" (`torch.compile`) or "onnx" (ONNX Runtime).
        rounds: turns that every model takes.
        timer: "wall", or "cpu" for the time that this process was given: on a machine that does
            other things, with one thread, what wall time would be without these.
        take: "median", or "least" of the rounds: where others slow a machine down for seconds at a
            time, the moments when they did not.
    """

    backend: Backend = "eager"
    rounds: int = 7
    timer: Literal["wall", "cpu"] = "wall"
    take: Literal["median", "least"] = "median"

    def __post_init__(self) -> None:
        if self.backend not in BACKENDS:
            raise ValueError(f"backend must be {', '.join(BACKENDS)}; got {self.backend!r}.")
        if self.rounds < 1:
            raise ValueError(f"rounds must be at least 1; got {self.rounds}.")

    def __call__(self, models: Sequence[nn.Module], example_inputs: Inputs) -> list[float]:
        """Return the milliseconds of every model for `example_inputs`."""
        device = device_of(models[0])
        with contextlib.ExitStack() as stack:
            for model in models:
                stack.enter_context(quiet_eval(model))
            stack.enter_context(torch.inference_mode())
            runs = list(stack.enter_context(_runs(models, calls_of(example_inputs), self.backend)))
            seconds = self._turns(runs, device)
        if self.take == "least":
            return [1e3 * min(turns) for turns in zip(*seconds, strict=True)]
        first = statistics.median(row[0] for row in seconds)
        return [
            1e3 * first * statistics.median(row[place] / row[0] for row in seconds)
            for place in range(len(runs))
        ]

    def _turns(self, runs: Sequence[Run], device: torch.device) -> list[list[float]]:
        """Seconds of every run, round by round."""
        for run in runs:
            run()
        once = min(self._seconds(run, 1, device) for run in runs)
        often = max(math.ceil(_TURN_SECONDS / max(once, 1e-6)), 1)
        return [[self._seconds(run, often, device) for run in runs] for _ in range(self.rounds)]

    def _seconds(self, run: Run, often: int, device: torch.device) -> float:
        now = time.process_time if self.timer == "cpu" else time.perf_counter
        _wait(device)
        begin = now()
        for _ in range(often):
            run()
        _wait(device)
        return (now() - begin) / often


def device_of(model: nn.Module) -> torch.device:
    """Return the device of the first parameter."""
    return next((p.device for p in model.parameters()), torch.device("cpu"))


def device_name(device: torch.device) -> str:
    """Return what the processor or GPU calls itself."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type != "cpu":
        return str(device)
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return f"{line.partition(':')[2].strip()} ({os.cpu_count()} cores)"
    return f"{platform.processor() or platform.machine()} ({os.cpu_count()} cores)"


def batch_of(example_inputs: Inputs) -> int:
    """Return the length of the first dimension of the first tensor."""
    sizes = [t.shape[0] for t in tensors_of(calls_of(example_inputs)) if t.dim()]
    return sizes[0] if sizes else 1


def resized(example_inputs: Inputs, batch: int) -> Inputs:
    """Return the same inputs with so many examples, repeated where there are fewer."""
    now = batch_of(example_inputs)

    def resize(tensor: Tensor) -> Tensor:
        if not tensor.dim() or tensor.shape[0] != now:
            return tensor
        return torch.cat([tensor] * -(-batch // now))[:batch].contiguous()

    found: Inputs = map_tensors(example_inputs, resize)
    return found


def kernel_share(model: nn.Module, example_inputs: Inputs) -> float:
    """Return the share of the wall time in which a GPU runs kernels of `model`."""
    calls, device = calls_of(example_inputs), device_of(model)
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with quiet_eval(model), torch.inference_mode():
        for _ in range(3):
            _call_all(model, calls)
        wall = DeviceClock(rounds=3)([model], example_inputs)[0]
        with torch.profiler.profile(activities=activities) as trace:
            _call_all(model, calls)
            _wait(device)
    kernels = sum(float(event.self_device_time_total) for event in trace.key_averages())
    return min(kernels / (1e3 * wall), 1.0)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _call_all(model: Any, calls: Sequence[Call]) -> None:
    for call in calls:
        model(*call.args, **call.kwargs)


@contextlib.contextmanager
def _runs(
    models: Sequence[nn.Module], calls: Sequence[Call], backend: Backend
) -> Iterator[Iterator[Run]]:
    """Yield what runs each model on all calls."""
    if backend == "eager":
        yield (_bound(model, calls) for model in models)
    elif backend == "compile":
        import torch._dynamo  # lazy: slow to import

        torch._dynamo.reset()
        with torch._dynamo.config.patch(recompile_limit=_RECOMPILES):
            yield (_bound(torch.compile(model, dynamic=False), calls) for model in models)
    else:
        with tempfile.TemporaryDirectory() as folder:
            yield (_onnx(model, calls, Path(folder)) for model in models)


def _bound(model: Any, calls: Sequence[Call]) -> Run:
    return lambda: _call_all(model, calls)


def _onnx(model: nn.Module, calls: Sequence[Call], folder: Path) -> Run:
    """Export a model and return what runs it under ONNX Runtime."""
    try:
        import onnxruntime  # lazy: optional
        import onnxscript  # noqa: F401  # torch's exporter needs it and says so less clearly
    except ImportError as error:
        raise UnsupportedModelError(
            f"backend 'onnx' must have its packages; {error.name} is not installed. "
            "pip install 'vlprune[onnx]'."
        ) from error
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = torch.get_num_threads(), 1
    options.log_severity_level = 3
    providers = ["CPUExecutionProvider"]
    if device_of(model).type == "cuda":
        providers = ["CUDAExecutionProvider", *providers]
    sessions: list[tuple[Any, dict[str, Any]]] = []
    for call in calls:
        path = folder / "model.onnx"
        with torch.inference_mode(False), torch.no_grad():
            program = torch.onnx.export(
                model, call.args, kwargs=dict(call.kwargs), dynamo=True, verbose=False
            )
        assert program is not None
        program.save(path, external_data=True)
        session = onnxruntime.InferenceSession(path, options, providers=providers)
        arrays = [tensor.cpu().numpy() for tensor in tensors_of(call)]
        names = [entry.name for entry in session.get_inputs()]
        sessions.append((session, dict(zip(names, arrays, strict=True))))

    def run_all() -> None:
        for session, feed in sessions:
            session.run(None, feed)

    return run_all
