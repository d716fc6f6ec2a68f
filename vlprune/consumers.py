"""What reads the units of a plan: linear layers, their features, and what outputs feel of them.

The attention's output projection reads heads, the second matrix of an FFN reads neurons. Repair
(`recover/repair.py`) solves them again; the metric `reconstruction` asks what that would not mend.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from vlprune.anatomy import Axis, Site, under
from vlprune.calls import first_tensor, tensors_of, with_first
from vlprune.moments import Linear
from vlprune.plan import PlanRow

Key: TypeAlias = tuple[str, int]  # module, number of the call in one forward
Forward: TypeAlias = Callable[[nn.Module, Any], tuple[Tensor, ...]]


@dataclasses.dataclass(slots=True, kw_only=True)
class Consumer:
    """A linear layer that reads units, and which of its features stay.

    Attributes:
        path: of the layer.
        module: the layer: its weight is [D, F], [F, D], or that of a 1 x 1 convolution.
        stays: which features stay [F].
        dim: of the weight, that of features.
        channels: of its input and answer, the dimension of features.
    """

    path: str
    module: nn.Module
    stays: Tensor
    dim: int
    channels: int

    @property
    def kept(self) -> Tensor:
        """Indices of the features that are left [K]."""
        return self.stays.nonzero().squeeze(1)

    @property
    def weight(self) -> Tensor:
        """The weights of the features that are left [D, K]."""
        whole: Tensor = self.module.weight  # type: ignore[assignment]
        return whole.detach().movedim(self.dim, -1).flatten(1)[:, self.kept]

    @property
    def bias(self) -> Tensor | None:
        """The bias [D], where there is one."""
        bias: Tensor | None = getattr(self.module, "bias", None)
        return None if bias is None else bias.detach()

    def rows(self, tensor: Tensor) -> Tensor:
        """Its input or answer as [n, features]."""
        return tensor.detach().movedim(self.channels, -1).flatten(0, -2)

    def take(self, found: Linear) -> None:
        """Write a solution into the layer."""
        whole: Tensor = self.module.weight.data  # type: ignore[assignment]
        columns = whole.movedim(self.dim, -1)
        columns[..., self.kept] = found.weight.to(whole.dtype).reshape(*columns.shape[:-1], -1)
        if self.bias is not None:
            self.bias.copy_(found.bias)


def parameter_of(model: nn.Module, name: str) -> nn.Parameter | None:
    """Return the parameter called `name`, None where the name is a buffer's."""
    owner, _, attribute = name.rpartition(".")
    found = model.get_submodule(owner)._parameters.get(attribute)
    return found


def forward_of(task: Any) -> Forward:
    """Return how a task runs a model on a batch: its outputs, else its loss alone."""
    if callable(getattr(task, "outputs", None)):
        return lambda model, batch: tuple(task.outputs(model, batch))
    return lambda model, batch: (task.loss(model, batch).reshape(1),)


def removed_modules(rows: Iterable[PlanRow]) -> tuple[str, ...]:
    """Return the paths of the layers and halves that a plan removes."""
    return tuple(
        row.axis.gate.modules[unit]
        for row in rows
        if row.axis.gate.kind in ("skip", "output")
        for unit in row.removed
    )


def consumers_of(
    model: nn.Module, rows: Iterable[PlanRow], gone: Iterable[str] = ()
) -> dict[str, Consumer]:
    """Return what reads the axes of a plan, by path, outside of the modules that are `gone`."""
    found: dict[str, Consumer] = {}
    gone = tuple(gone)
    for row in rows:
        for site in _reading_sites(row.axis):
            path = site.tensor.removesuffix(".weight")
            module = model.get_submodule(path)
            weight = getattr(module, "weight", None)
            if not isinstance(weight, Tensor) or not _is_matrix(weight):
                continue
            if any(under(path, other) for other in gone):
                continue
            stays = torch.ones(weight.shape[site.dim], dtype=torch.bool, device=weight.device)
            stays[site.indices(row.removed)] = False
            if path in found:
                found[path].stays &= stays
            else:
                found[path] = Consumer(
                    path=path,
                    module=module,
                    stays=stays,
                    dim=site.dim,
                    channels=row.axis.gate.dim,
                )
    return found


def _reading_sites(axis: Axis) -> list[Site]:
    """Where the units of an axis lie in the weights of the layers that read them, one a layer."""
    gate = axis.gate
    weights = [site for site in axis.sites if site.tensor.endswith(".weight")]
    if gate.kind == "input":
        weights = [site for site in weights if site.tensor[: -len(".weight")] in gate.modules]
    elif gate.kind == "product":  # rows that are gated, columns that read what they answer
        rows = {site.dim for site in gate.sites}
        weights = [site for site in weights if site.dim not in rows]
    else:
        return []
    times = collections.Counter(site.tensor for site in weights)
    return [site for site in weights if times[site.tensor] == 1]


def _is_matrix(weight: Tensor) -> bool:
    return weight.dim() >= 2 and all(size == 1 for size in weight.shape[2:])


class Additions:
    """Zeros added to the answers of modules while entered, to ask for their gradients.

    Args:
        model: left as it was afterwards.
        paths: of the modules.

    Attributes:
        zeros: (path, number of the call) to what was added there since `clear`.
    """

    def __init__(self, model: nn.Module, paths: Iterable[str]):
        self.model = model
        self.zeros: dict[Key, Tensor] = {}
        self._paths = tuple(paths)
        self._calls: collections.Counter[str] = collections.Counter()
        self._handles: list[RemovableHandle] = []

    def __enter__(self) -> Additions:
        for path in self._paths:
            hook = functools.partial(self._add, path)
            self._handles.append(self.model.get_submodule(path).register_forward_hook(hook))
        return self

    def __exit__(self, *failure: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self.clear()

    def clear(self) -> None:
        """Forget one forward."""
        self.zeros = {}
        self._calls.clear()

    def _add(self, path: str, module: nn.Module, args: Any, output: Any) -> Any:
        if not torch.is_grad_enabled():
            return output
        answer = first_tensor(output)
        zeros = torch.zeros_like(answer, requires_grad=True)
        self.zeros[path, self._calls[path]] = zeros
        self._calls[path] += 1
        return with_first(output, answer + zeros)


def output_gradients(
    outputs: Iterable[Tensor], zeros: Mapping[Key, Tensor], probes: int = 2
) -> Iterator[dict[Key, Tensor]]:
    """Yield, for random directions of the outputs, what they feel of the answers of modules.

    The expectation of the squared gradient of an answer's row is by how much the outputs change,
    squared and summed, when a change of size 1 in a random direction is added to that row.

    Args:
        outputs: of a forward within `Additions`.
        zeros: of these.
        probes: how many directions.

    Yields:
        (path, number of the call) to a gradient of the answer's shape.
    """
    felt = [tensor for tensor in outputs if tensor.requires_grad]
    generator = torch.Generator().manual_seed(0)
    for _ in range(probes if felt and zeros else 0):
        gradients = torch.autograd.grad(
            felt,
            list(zeros.values()),
            [torch.randn(t.shape, generator=generator).to(t.device, t.dtype) for t in felt],
            retain_graph=True,
            materialize_grads=True,
        )
        yield dict(zip(zeros, gradients, strict=True))


def size_of(batch: Any) -> int:
    """Return how many examples a batch holds: the first dimension of its first tensor."""
    return int(next(tensors_of(batch)).shape[0])


def examples_of(x: Tensor, size: int) -> Tensor:
    """To which example of a batch of `size` every row of x [..., F] belongs [n]."""
    leading = x.shape[:-1]
    numbers = torch.arange(size, device=x.device)
    if leading[0] % size == 0:  # [B, ...] or [B * T, ...]
        return numbers.repeat_interleave(leading.numel() // size)
    if len(leading) > 1 and leading[1] == size:  # [T, B, ...]
        return numbers.repeat_interleave(leading[2:].numel()).repeat(leading[0])
    rows = torch.arange(leading.numel(), device=x.device)
    return rows * size // max(len(rows), 1)
