"""Copies of modules: whole ones, float64 ones for checks, and ones that share all tensors."""

from __future__ import annotations

import copy

from torch import Tensor, nn

from vlprune.calls import tensors_of


def clone(model: nn.Module) -> nn.Module:
    """Return a deep copy of `model`."""
    return copy.deepcopy(model)


def exact_clone(model: nn.Module) -> nn.Module:
    """Return a float64 copy of `model`, for checks."""
    return use_exact_kernels(clone(model).double())


def use_exact_kernels(model: nn.Module) -> nn.Module:
    """Let a copy of a transformers model run its experts in Python: grouped ones lack float64."""
    for module in model.modules():
        config = getattr(module, "config", None)
        if getattr(config, "_experts_implementation", None) is not None:
            config._experts_implementation = "eager"  # type: ignore[union-attr]
    return model


def drop_caches(module: nn.Module) -> None:
    """Empty the dicts in which a module keeps tensors that it has computed from its weights."""
    for name, value in vars(module).items():
        own = name in ("_parameters", "_buffers")
        if not own and type(value) is dict and any(isinstance(t, Tensor) for t in value.values()):
            value.clear()


def shared_copy(module: nn.Module) -> nn.Module:
    """Return a copy of `module` whose tensors are the originals."""
    plain = (Tensor, dict, list, tuple)
    values = [v for inner in module.modules() for v in vars(inner).values() if type(v) in plain]
    tensors = [*module.parameters(), *module.buffers(), *tensors_of(values)]
    return copy.deepcopy(module, {id(t): t for t in tensors})
