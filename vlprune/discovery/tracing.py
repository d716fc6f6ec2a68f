"""A region run so that every feature's dependence on tensor rows is plain in its gradients.

Every linear layer's answer is a source, so that nothing further up is visited; norms multiply
without statistics, activations have no flat parts, and attention weighs without comparing: an
invariance (a key's bias under softmax) must not hide what follows a cut. What gradients say of it
is read in `probe.py`.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from vlprune.copies import drop_caches


@dataclasses.dataclass(slots=True)
class Use:
    """One call of a linear layer: the features it read, and when."""

    x: Tensor
    dim: int
    moment: int


@dataclasses.dataclass(slots=True)
class Source:
    """A tensor to take gradients of, and for which rows: dimension -> tensor names with dims.

    A source without rows is an input of the region; `place` says which argument, if it is one.
    """

    tensor: Tensor
    rows: dict[int, tuple[tuple[str, int], ...]]
    moment: int = 0
    place: int | str | None = None


class Trace(TorchFunctionMode):
    """Runs a region so that every feature's dependence on rows is plain in the gradients.

    Attributes:
        uses: path of a linear layer -> its calls, in order.
        sources: what gradients can be taken of, the region's inputs excepted.
        mixers: (moment, shape of the attention weights or queries) of every attention.
        norms: paths of modules that take statistics over the last dimension.
        called: paths of the modules that were called as modules.
        places: moment -> path of the module that an attention ran in.
        hints: attributes that count heads.
    """

    def __init__(self, region: nn.Module):
        super().__init__()
        self.uses: dict[str, list[Use]] = collections.defaultdict(list)
        self.sources: list[Source] = []
        self.mixers: list[tuple[int, tuple[int, ...]]] = []
        self.norms: set[str] = set()
        self.called: set[str] = set()
        self.hints: list[int] = []
        self.places: dict[int, str] = {}
        self._moment = 0
        self._inside: list[str] = [""]
        self._region = region
        self._names: dict[int, str] = {}
        self._cleanup: list[Callable[[], None]] = []
        tensors = [*region.named_parameters(), *region.named_buffers()]
        for name, tensor in tensors:
            self._names[id(tensor)] = name
            if tensor.is_floating_point():
                tensor.requires_grad_(True)
                dims: dict[int, tuple[tuple[str, int], ...]] = {
                    d: ((name, d),) for d in range(tensor.dim())
                }
                self.sources.append(Source(tensor, dims or {0: ()}))
        for module in region.modules():
            for attribute, value in vars(module).items():
                counts = "head" in attribute or "group" in attribute
                if counts and isinstance(value, int) and value > 1:
                    self.hints.append(value)

    def __enter__(self) -> Trace:
        for path, module in self._region.named_modules():
            enter = module.register_forward_pre_hook(lambda m, args, path=path: self._enter(path))
            leave = module.register_forward_hook(lambda *_: self._leave())
            self._cleanup += [enter.remove, leave.remove]
            if _is_norm(module):
                self._replace_forward(path, module)
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *failure: Any) -> None:
        super().__exit__(*failure)  # type: ignore[no-untyped-call]
        for undo in self._cleanup:
            undo()
        for module in self._region.modules():
            drop_caches(module)

    def _enter(self, path: str) -> None:
        self.called.add(path)
        self._inside.append(path)

    def _leave(self) -> None:
        self._inside.pop()

    def _mixer(self, shape: torch.Size) -> None:
        self.mixers.append((self._moment, tuple(shape)))
        self.places[self._moment] = self._inside[-1]

    def _replace_forward(self, path: str, module: Any) -> None:
        """Let a norm that is written out in Python multiply only; on a replica, for one run."""
        original = module.forward

        def forward(x: Tensor, *args: Any, **kwargs: Any) -> Any:
            if x.dim() and x.shape[-1] == module.weight.shape[-1]:
                self.norms.add(path)
                return _scaled(x, module.weight, getattr(module, "bias", None))
            return original(x, *args, **kwargs)

        module.forward = forward
        self._cleanup.append(lambda: module.__dict__.pop("forward", None) and None)

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        self._moment += 1
        name = getattr(func, "__name__", "")
        handler = _HANDLERS.get(name)
        if handler is not None:
            return handler(self, func, *args, **kwargs)
        return func(*args, **kwargs)

    def linear(self, func: Any, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """A linear layer: a consumer of its input, a source of its output."""
        return self._product(x, weight, bias, -1, F.linear(x, weight))

    def convolution(
        self,
        func: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        *args: Any,
        **kw: Any,
    ) -> Tensor:
        """A convolution over all channels is a linear layer; a depthwise one scales channels."""
        groups = kw.get("groups", args[3] if len(args) > 3 else 1)
        if groups != 1:
            result: Tensor = func(x, weight, bias, *args, **kw)
            return result
        return self._product(x, weight, bias, 1, func(x, weight, None, *args, **kw))

    def _product(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, dim: int, product: Tensor
    ) -> Tensor:
        name = self._names.get(id(weight))
        if name is None:  # a weight that was computed, or a part of one: its own gradients tell
            return product if bias is None else product + _along(bias, product, dim)
        path, _, attribute = name.rpartition(".")
        if attribute == "weight":
            self.uses[path].append(Use(x, dim % x.dim() - x.dim(), self._moment))
        out = product.detach().requires_grad_(True)
        names = [(name, 0)]
        if bias is not None and id(bias) in self._names:
            names.append((self._names[id(bias)], 0))
        self.sources.append(Source(out, {dim % out.dim(): tuple(names)}, self._moment))
        return out if bias is None else out + _along(bias, out, dim)

    def attention(
        self,
        func: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
        **_: Any,
    ) -> Tensor:
        """Weights every value by its score: no score is compared with another."""
        self._mixer(query.shape)
        if enable_gqa:
            repeats = query.shape[-3] // key.shape[-3]
            key, value = (t.repeat_interleave(repeats, -3) for t in (key, value))
        scores = query @ key.transpose(-1, -2)
        if attn_mask is not None:
            seen = attn_mask.double() if attn_mask.dtype is torch.bool else attn_mask
            scores = scores + seen
        return _visible(scores) @ value

    def unreadable_attention(self, func: Any, *args: Any, **kwargs: Any) -> Any:
        """An attention whose inside is closed to gradients of single rows; it is named as such."""
        query, heads = kwargs.get("query", args[:1] and args[0]), kwargs.get("num_heads", 2)
        self._mixer(torch.Size([query.shape[1], heads, query.shape[0], query.shape[-1]]))
        return func(*args, **kwargs)

    def softmax(self, func: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The scores themselves: what falls out of a softmax (a key's bias) stays visible."""
        if x.dim() > 2:
            self._mixer(x.shape)
        return _visible(x)

    def identity(self, func: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """An activation without its flat parts, where a gradient would be lost."""
        if not x.is_floating_point():
            return func(x, *args, **kwargs)  # type: ignore[no-any-return]
        return x * 1.0

    def layer_norm(
        self,
        func: Any,
        x: Tensor,
        shape: Any,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Tensor:
        """The norm without its statistics."""
        if weight is not None and id(weight) in self._names:
            self.norms.add(self._names[id(weight)].rpartition(".")[0])
        return _scaled(x, weight, bias)

    def rms_norm(
        self, func: Any, x: Tensor, shape: Any, weight: Tensor | None = None, *args: Any, **kw: Any
    ) -> Tensor:
        """The norm without its statistics."""
        return self.layer_norm(func, x, shape, weight)

    def batch_norm(
        self,
        func: Any,
        x: Tensor,
        mean: Tensor,
        var: Tensor,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Tensor:
        """The norm in eval mode, written out: its buffers get gradients too."""
        x = (x - _along(mean, x, 1)) / (_along(var, x, 1).abs() + 1e-5)
        x = x if weight is None else x * _along(weight, x, 1)
        return x if bias is None else x + _along(bias, x, 1)


_HANDLERS: dict[str, Callable[..., Any]] = {
    "linear": Trace.linear,
    "conv1d": Trace.convolution,
    "conv2d": Trace.convolution,
    "conv3d": Trace.convolution,
    "scaled_dot_product_attention": Trace.attention,
    "multi_head_attention_forward": Trace.unreadable_attention,
    "softmax": Trace.softmax,
    "layer_norm": Trace.layer_norm,
    "rms_norm": Trace.rms_norm,
    "batch_norm": Trace.batch_norm,
    **dict.fromkeys(
        [
            "relu",
            "relu_",
            "relu6",
            "gelu",
            "silu",
            "silu_",
            "sigmoid",
            "tanh",
            "erf",
            "hardswish",
            "hardsigmoid",
            "hardtanh",
            "leaky_relu",
            "elu",
            "mish",
            "softplus",
            "clamp",
        ],
        Trace.identity,
    ),
}


def _is_norm(module: nn.Module) -> bool:
    """Say whether `module` is a norm over the last dimension that Python code spells out."""
    weight = module._parameters.get("weight")
    name = type(module).__name__
    from_torch = type(module).__module__.startswith("torch.")
    return (
        "norm" in name.lower()
        and "group" not in name.lower()
        and not from_torch
        and not name.endswith("2d")
        and not isinstance(module, (nn.LayerNorm, nn.modules.batchnorm._BatchNorm, nn.GroupNorm))
        and weight is not None
        and weight.dim() == 1
    )


def _visible(scores: Tensor) -> Tensor:
    """Scores with what a mask hides (a very negative number) set to zero."""
    return torch.where(scores > -1e4, scores, torch.zeros_like(scores))


def _scaled(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    x = x * 1.0 if weight is None else x * weight
    return x if bias is None else x + bias


def _along(vector: Tensor, x: Tensor, dim: int) -> Tensor:
    """`vector` shaped to broadcast along `dim` of `x`."""
    if dim == -1:
        return vector
    return vector.reshape(-1, *[1] * (x.dim() - 1 - dim % x.dim()))
