"""Shared fixtures: dissected models, made once a session; one thread, for many small models."""

import functools
import os
import random
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
import zoo
from torch import nn

import vlprune
from vlprune.dissect import default_inputs

torch.set_num_threads(1)
with warnings.catch_warnings():  # triton warns about itself at its first import
    warnings.simplefilter("ignore")
    import torch.utils.flop_counter


@functools.cache
def dissected(name: str) -> tuple[nn.Module, vlprune.Anatomy]:
    """Return the tiny model called `name`, not to be changed, and its anatomy."""
    model = zoo.make(name)
    return model, vlprune.dissect(model)


@pytest.fixture(params=list(zoo.MAKERS))
def tiny(request: pytest.FixtureRequest) -> tuple[nn.Module, vlprune.Anatomy]:
    """Every tiny model with its anatomy."""
    return dissected(request.param)


@pytest.fixture
def clip() -> tuple[nn.Module, vlprune.Anatomy]:
    """The tiny open_clip model with its anatomy."""
    return dissected("open_clip")


def inputs_of(model: nn.Module) -> object:
    """Example inputs of two examples."""
    return default_inputs(model, batch=2)


def random_keep(
    anatomy: vlprune.Anatomy, seed: int, kinds: tuple[str, ...] = ()
) -> dict[str, tuple[int, ...]]:
    """An uneven plan: on every axis another number of units stays, the fewest and all included."""
    draw = random.Random(seed)
    keep = {}
    for axis in anatomy.axes:
        if not kinds or axis.kind in kinds:
            count = draw.randint(axis.least, axis.units)
            keep[axis.name] = tuple(sorted(draw.sample(range(axis.units), count)))
    return keep


def on_two_ranks(code: str, folder: Path) -> None:
    """Run a program under torchrun, given the folder and that of the tests as arguments."""
    script = folder / "ranks.py"
    script.write_text(code)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    command += ["--standalone", str(script), str(folder), str(Path(__file__).parent)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    subprocess.run(command, check=True, env=environment, timeout=300, capture_output=True)
