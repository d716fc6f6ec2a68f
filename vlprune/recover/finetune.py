"""One training loop, for distillation, fine-tuning and retraining: on a CPU, a GPU, or by torchrun.

A loop of `accelerate`: processes share the batches, gradients are accumulated, states are saved and
a run that was stopped goes on bit-equal. The loss is any function of the model and a batch.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import itertools
import math
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

import torch
from torch import Tensor, nn

from vlprune.calls import map_tensors
from vlprune.pruner import Record, attach_record, record_of

if TYPE_CHECKING:
    from accelerate import Accelerator

Loss = Callable[[nn.Module, Any], Tensor]


class Masks(Protocol):
    """What is learnt beside the weights, such as `metrics.UPop` and `metrics.HardConcrete`."""

    def update(self) -> None:
        """Take in the gradients of a backward."""

    def step(self) -> None:
        """Move on by a step of the optimiser."""

    def state_dict(self) -> dict[str, Any]:
        """Return what `load_state_dict` takes."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from there."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Training:
    """How to train.

    Attributes:
        steps: of the optimiser (AdamW).
        lr: the highest learning rate.
        weight_decay: of matrices; biases and norms have none.
        warm_up: share of the steps in which the rate rises from 0.
        schedule: how it falls then: "cosine" or "linear" to 0, or not ("constant").
        clip: norm that gradients are clipped to.
        accumulate: batches a step, in every process.
        precision: "bf16" runs the forward in bfloat16 where that is exact enough (autocast).
        checkpointing: compute activations again in the backward instead of keeping them.
        seed: of the order that a shuffling loader takes, and of dropout.
    """

    steps: int = 500
    lr: float = 2e-5
    weight_decay: float = 3e-4
    warm_up: float = 0.1
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    clip: float = 1.0
    accumulate: int = 1
    precision: Literal["float32", "bf16"] = "float32"
    checkpointing: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        if self.steps < 1 or self.accumulate < 1:
            raise ValueError(
                f"steps and accumulate must be at least 1; got {self.steps} and {self.accumulate}."
            )

    def rate(self, step: int) -> float:
        """Return the share of `lr` in step number `step`, from 0."""
        rise = max(int(self.warm_up * self.steps), 1)
        if step < rise:
            return (step + 1) / rise
        done = (step - rise) / max(self.steps - rise, 1)
        falls = {"cosine": 0.5 * (1 + math.cos(math.pi * done)), "linear": 1 - done}
        return falls.get(self.schedule, 1.0)


def fit(
    model: nn.Module,
    loss: Loss,
    batches: Iterable[Any],
    training: Training = Training(),
    *,
    masks: Masks | None = None,
    folder: str | Path | None = None,
    save_every: int = 100,
    log: str | Path | None = None,
    progress: Callable[[int, float], None] | None = None,
) -> nn.Module:
    """Train `model` in place, and return it in eval mode.

    Args:
        model: parameters that require a gradient are trained. It stays on its device where there is
            one process on a CPU; else it goes to its process's GPU.
        loss: scalar of the model and a batch. Other models that it uses go to the same device.
        batches: gone through again and again; process r of n takes batches r, r + n, ...
        training: how.
        masks: attached to the model by the caller; saved with the states.
        folder: for states; a run that finds one there goes on from it, to the same bits. Deleted
            states make it begin again.
        save_every: steps between states.
        log: folder for tensorboard (the extra `tensorboard`).
        progress: called with (step, loss) after every step.

    Raises:
        ValueError: if there are no batches.
        ImportError: if a log is asked for without tensorboard.
    """
    accelerator = _accelerator(training, log)
    step = _Step(model, loss, training.precision)
    if training.checkpointing:
        _checkpoint_activations(model, on=True)
    optimiser = torch.optim.AdamW(_groups(model, training.weight_decay), lr=training.lr)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, training.rate)
    wrapped, optimiser = accelerator.prepare(step, optimiser)
    place = _Place()
    accelerator.register_for_checkpointing(schedule, place, *([] if masks is None else [masks]))
    states = None if folder is None else _States(Path(folder), accelerator)
    torch.manual_seed(training.seed + accelerator.process_index)
    if states is not None:
        states.load()
    feed = _endless(batches, training.seed)
    rank, world = accelerator.process_index, accelerator.num_processes
    mine = itertools.islice(feed, place.step * training.accumulate * world + rank, None, world)
    model.train()
    while place.step < training.steps:
        total = 0.0
        for _ in range(training.accumulate):
            with accelerator.accumulate(wrapped):
                batch = map_tensors(next(mine), lambda t: t.to(accelerator.device))
                value = wrapped(batch)
                accelerator.backward(value)
                if masks is not None:
                    masks.update()
                total += float(value.detach()) / training.accumulate
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(wrapped.parameters(), training.clip)
                optimiser.step()
                optimiser.zero_grad()
        schedule.step()
        if masks is not None:
            masks.step()
        place.step += 1
        if log is not None:
            rate = schedule.get_last_lr()[0]
            accelerator.log({"loss": total, "lr": rate}, step=place.step)
        if progress is not None:
            progress(place.step, total)
        if states is not None and (place.step % save_every == 0 or place.step == training.steps):
            states.save(place.step)
    for tracker in accelerator.trackers:  # and the process group stays its owner's
        tracker.finish()
    if training.checkpointing:
        _checkpoint_activations(model, on=False)
    if record_of(model) != Record():
        attach_record(model, dataclasses.replace(record_of(model), trained=True))
    return model.eval()


class Repeated:
    """A task's batches as a loader: gone through again and again, in the task's order.

    Args:
        task: see `contracts.Task`.
    """

    def __init__(self, task: Any):
        self._task = task

    def __iter__(self) -> Iterator[Any]:
        yield from self._task.batches()


class _Step(nn.Module):
    """The loss as a module's forward: data-parallel wrappers see nothing else."""

    def __init__(self, model: nn.Module, loss: Loss, precision: str):
        super().__init__()
        self.model = model
        self.__dict__["_loss"] = loss  # a loss that is a module, with a teacher in it, is no part
        self._precision = precision

    def forward(self, batch: Any) -> Tensor:
        device = next(self.model.parameters()).device.type
        with torch.autocast(device, torch.bfloat16, enabled=self._precision == "bf16"):
            value: Tensor = self.__dict__["_loss"](self.model, batch)
            return value.float()


class _Place:
    """How far the training is."""

    def __init__(self) -> None:
        self.step = 0

    def state_dict(self) -> dict[str, int]:
        """Return it for a saved state."""
        return {"step": self.step}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Take it from one."""
        self.step = state["step"]


class _States:
    """Saved states in a folder: the latest stays, and takes its place in one rename."""

    def __init__(self, folder: Path, accelerator: Accelerator):
        self.folder = folder
        self._accelerator = accelerator

    def save(self, step: int) -> None:
        """Save one, then delete the others."""
        scratch, final = self.folder / f".step-{step}", self.folder / f"step-{step}"
        self._accelerator.save_state(str(scratch))
        self._accelerator.wait_for_everyone()
        if self._accelerator.is_main_process:
            shutil.rmtree(final, ignore_errors=True)
            scratch.rename(final)
            for other in self.folder.glob("*step-*"):
                if other != final:
                    shutil.rmtree(other, ignore_errors=True)
        self._accelerator.wait_for_everyone()

    def load(self) -> None:
        """Load the latest, if there is one."""
        found = sorted(self.folder.glob("step-*"), key=lambda path: int(path.name[5:]))
        if found:
            self._accelerator.load_state(str(found[-1]))


def _accelerator(training: Training, log: str | Path | None) -> Accelerator:
    from accelerate import Accelerator, DistributedDataParallelKwargs  # lazy: slow to import

    if log is not None and importlib.util.find_spec("tensorboard") is None:
        raise ImportError("log needs tensorboard: pip install 'vlprune[tensorboard]'.")
    accelerator = Accelerator(
        cpu=not torch.cuda.is_available(),
        gradient_accumulation_steps=training.accumulate,
        kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)],
        log_with=None if log is None else "tensorboard",
        project_dir=None if log is None else str(log),
    )
    if log is not None:
        accelerator.init_trackers("vlprune", config=dataclasses.asdict(training))
    return accelerator


def _groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Matrices with weight decay, vectors without."""
    trained = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in trained if p.dim() > 1], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.dim() <= 1], "weight_decay": 0.0},
    ]


def _endless(batches: Iterable[Any], seed: int) -> Iterator[Any]:
    """All batches again and again; a loader that shuffles draws its order from seed + epoch."""
    for epoch in itertools.count():
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed + epoch)
            once = iter(batches)
            first = list(itertools.islice(once, 1))  # a sampler draws when it is first asked
        if not first:
            raise ValueError("batches must not be empty; got none in fit.")
        yield from first
        yield from once


def _checkpoint_activations(model: Any, on: bool) -> None:
    """Switch it by whatever name the model's library has for it."""
    if hasattr(model, "set_grad_checkpointing"):  # open_clip, timm
        model.set_grad_checkpointing(on)
    elif hasattr(model, "gradient_checkpointing_enable"):  # transformers
        with contextlib.suppress(ValueError):  # a class that has it off for good
            (model.gradient_checkpointing_enable if on else model.gradient_checkpointing_disable)()
    else:
        raise ValueError(
            f"checkpointing must be offered by the model; {type(model).__name__} has neither "
            "set_grad_checkpointing nor gradient_checkpointing_enable."
        )
