"""Models that cannot be pruned as they are, and where numbers stop being finite, named."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from vlprune.calls import removing, tensors_of
from vlprune.errors import UnsupportedModelError

_QUANTISED = ("torch.ao.nn.quantized", "torch.ao.nn.intrinsic.quantized", "bitsandbytes.")


def check_plain(model: nn.Module) -> None:
    """Raise where a model is compiled, quantised or without a part of its weights.

    Raises:
        UnsupportedModelError: saying what to do first.
    """
    if hasattr(model, "_orig_mod"):
        raise UnsupportedModelError(
            "model must not be compiled yet; got what torch.compile returned. Prune its "
            "`_orig_mod`, then compile the result."
        )
    found = [
        path
        for path, module in model.named_modules()
        if type(module).__module__.startswith(_QUANTISED)
    ]
    if found:
        raise UnsupportedModelError(
            f"model must not be quantised yet; {found[0]!r} and {len(found) - 1} more are. Prune "
            "first, then quantise the result."
        )
    places = devices_of(model)
    if "meta" in places and len(places) > 1:
        raise UnsupportedModelError(
            f"model must have all of its weights, or none (device meta); {places['meta']!r} has "
            "none. Load the model whole, without offloading."
        )


def devices_of(model: nn.Module) -> dict[str, str]:
    """Return the devices that parameters are on, and the first parameter on each."""
    places: dict[str, str] = {}
    for name, tensor in model.named_parameters():
        places.setdefault(str(tensor.device), name)
    return places


def check_weights(model: nn.Module) -> None:
    """Raise where parameters hold NaN or infinities.

    Raises:
        ValueError: naming them.
    """
    found = [name for name, tensor in model.named_parameters() if not _is_finite(tensor)]
    if found:
        shown = ", ".join(map(repr, found[:5])) + (" ..." if len(found) > 5 else "")
        raise ValueError(
            f"weights must be finite; {len(found)} parameters hold NaN or infinities: {shown}. "
            "Load the model again."
        )


def where_not_finite(model: nn.Module, runs: Callable[[], Any]) -> str:
    """Return where the first NaN or infinity arises while `runs` runs the model, "" for nowhere.

    Args:
        model: to listen to.
        runs: runs it, on the batches in question.
    """
    found: list[str] = []

    def listen(path: str) -> Callable[..., None]:
        def hear(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            if not found and not _all_finite(output):
                given = _all_finite((args, kwargs)) and all(map(_is_finite, module.parameters()))
                arises = f"the output of {path!r}" if given else f"what {path!r} is given"
                found.append(arises)

        return hear

    handles = [
        module.register_forward_hook(listen(path or "the model"), with_kwargs=True)
        for path, module in model.named_modules()
    ]
    with removing(handles), torch.no_grad():
        runs()
    return found[0] if found else ""


def _all_finite(value: Any) -> bool:
    return all(map(_is_finite, tensors_of(value)))


def _is_finite(tensor: Tensor) -> bool:
    if tensor.is_meta or isinstance(tensor, FakeTensor) or not tensor.is_floating_point():
        return True
    return bool(torch.isfinite(tensor).all())
