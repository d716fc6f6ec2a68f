"""Token sequences cut short where nothing comes after: text ends before its longest length.

Token ids end in a row of padding. Under a causal mask, or with padding masked, what blocks compute
there reaches no output; so blocks are given the first n tokens only, and what the last one answers
is filled up with zeros. Whether a model allows it is seen by comparing outputs of the first batch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from vlprune.ablation.replay import Recording
from vlprune.calls import map_tensors, tensors_of

_WORTH = 0.9  # of the tokens: what saves less is left


class Trimming:
    """Hooks on the blocks of every stack that shorten sequences while entered.

    Args:
        model: whose blocks.
        stacks: list to its blocks, in order.

    Attributes:
        lengths: stack to (tokens, tokens that stay); empty at first.
        allowed: stack to its tokens, where shortening was seen to change no output.
    """

    def __init__(self, model: nn.Module, stacks: Mapping[str, Sequence[str]]):
        self._model = model
        self._stacks = stacks
        self.lengths: dict[str, tuple[int, int]] = {}
        self.allowed: dict[str, int] = {}
        self._handles: list[RemovableHandle] = []

    def __enter__(self) -> Trimming:
        for stack, blocks in self._stacks.items():
            for block in blocks:
                module = self._model.get_submodule(block)
                hook = self._shorten(stack)
                self._handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
        for stack, blocks in self._stacks.items():
            last = self._model.get_submodule(blocks[-1])
            self._handles.append(last.register_forward_hook(self._fill(stack)))
        return self

    def __exit__(self, *failure: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def repeat(self, batch: Any) -> dict[str, tuple[int, int]]:
        """Return lengths for another batch, for stacks where it is known to be allowed."""
        return {
            stack: (tokens, few)
            for stack, allowed in self.allowed.items()
            for tokens, few in _lengths(batch)
            if tokens == allowed
        }

    def propose(self, batch: Any, recording: Recording) -> dict[str, tuple[int, int]]:
        """Return which stacks may be given fewer tokens in this batch: (tokens, how many)."""
        sizes = _lengths(batch)
        found: dict[str, tuple[int, int]] = {}
        for stack, blocks in self._stacks.items():
            answer = recording.answers.get((blocks[0], 0))
            first = next(tensors_of(answer), None)
            if first is None or first.dim() != 3:
                continue
            for tokens, few in sizes:
                ambiguous = tokens in (first.shape[0], first.shape[2])
                if first.shape[1] == tokens and not ambiguous:
                    found[stack] = (tokens, few)
        return found

    def _shorten(self, stack: str) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> Any:
            if stack not in self.lengths:
                return None
            tokens, few = self.lengths[stack]

            def short(tensor: Tensor) -> Tensor:
                for dim, size in enumerate(tensor.shape):
                    is_batch = dim == 0 and tensor.dim() > 2
                    if size == tokens and not is_batch:
                        tensor = tensor.narrow(dim, 0, few)
                return tensor

            return map_tensors(args, short), map_tensors(kwargs, short)

        return hook

    def _fill(self, stack: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> Any:
            if stack not in self.lengths:
                return None
            tokens, few = self.lengths[stack]

            def filled(tensor: Tensor) -> Tensor:
                is_sequence = tensor.dim() == 3 and tensor.shape[1] == few
                return F.pad(tensor, (0, 0, 0, tokens - few)) if is_sequence else tensor

            return map_tensors(output, filled)

        return hook


def _lengths(batch: Any) -> list[tuple[int, int]]:
    """Tokens, and how many up to the first that is padding in every row; where it saves some."""
    found = []
    for ids in tensors_of(batch):
        if not ids.is_floating_point() and ids.dim() == 2:
            tokens = ids.shape[1]
            changes = (ids != ids[:, -1:]).any(0).nonzero()
            few = int(changes[-1]) + 2 if len(changes) else 1
            if few <= _WORTH * tokens:
                found.append((tokens, few))
    return found
