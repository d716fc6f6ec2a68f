"""What a teacher gives for every batch, computed once: kept in memory or on disk while it fits.

A batch is known by its content, a teacher by its weights, so a cache can outlive a run and serve
any order of batches. What does not fit any more is computed again each time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from vlprune.ablation.store import content_of, key_of
from vlprune.calls import tensors_of

Answer = Mapping[str, Tensor]


class Teacher:
    """A frozen model's answers by batch.

    Args:
        model: put into eval mode.
        answer: what it gives for a batch, named tensors.
        folder: keeps answers on disk, under a key of the weights and `settings`; None: in memory.
        limit: bytes of answers that are kept.
        settings: JSON values that answers depend on besides.
    """

    def __init__(
        self,
        model: nn.Module,
        answer: Callable[[nn.Module, Any], Answer],
        *,
        folder: str | Path | None = None,
        limit: int = 2 * 2**30,
        settings: Mapping[str, Any] | None = None,
    ):
        self.model = model.eval()
        self.limit = limit
        self.bytes = 0
        self._answer = answer
        self._kept: dict[str, Answer] = {}
        self._folder: Path | None = None
        if folder is not None:
            self._folder = Path(folder) / key_of(model, [], dict(settings or {}))
            self._folder.mkdir(parents=True, exist_ok=True)
            self.bytes = sum(f.stat().st_size for f in self._folder.glob("*.safetensors"))

    @torch.no_grad()
    def __call__(self, batch: Any) -> Answer:
        """Return the answer to a batch, on the device of its first tensor."""
        name = content_of(batch)
        device = next(tensors_of(batch)).device
        known = self._load(name)
        if known is None:
            self.model.to(device)
            known = {key: t.detach() for key, t in self._answer(self.model, batch).items()}
            self._keep(name, known)
        return {key: t.to(device) for key, t in known.items()}

    def _load(self, name: str) -> Answer | None:
        if self._folder is None:
            return self._kept.get(name)
        path = self._folder / f"{name}.safetensors"
        return safetensors.torch.load_file(path) if path.exists() else None

    def _keep(self, name: str, answer: Answer) -> None:
        size = sum(t.numel() * t.element_size() for t in answer.values())
        if self.bytes + size > self.limit:
            return
        self.bytes += size
        held = {key: t.cpu().contiguous().clone() for key, t in answer.items()}
        if self._folder is None:
            self._kept[name] = held
            return
        path = self._folder / f"{name}.safetensors"
        scratch = path.with_name(f".{path.name}")
        safetensors.torch.save_file(held, scratch)
        scratch.replace(path)
