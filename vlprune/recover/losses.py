"""Losses of distillation and fine-tuning, each a small module for anyone's loop.

S is the student, T the teacher; B examples, D features, C choices, L layers.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class InfoNCE(nn.Module):
    """Symmetric contrastive loss: every image belongs to its text among those of the batch.

    Mean over both ways of -log softmax(scale * images texts^T) at the diagonal.
    Source: van den Oord et al. (1807.03748); symmetric as in CLIP (2103.00020).
    """

    def forward(self, images: Tensor, texts: Tensor, scale: Tensor | float) -> Tensor:
        """Return the loss of features [B, D] of length 1 at a logit scale, a scalar."""
        logits = scale * images @ texts.T
        target = torch.arange(len(logits), device=logits.device)
        return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


class SoftCrossEntropy(nn.Module):
    """Cross entropy to the teacher's predictions: -softmax(T) . log softmax(S), mean over rows.

    On both similarity matrices of a batch it is the cross-modal loss of MoPE-CLIP (2403.07839).
    """

    def forward(self, student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
        """Return the mean over pairs of logits [B, C], a scalar."""
        rows = [
            -(t.softmax(-1) * s.log_softmax(-1)).sum(-1).mean()
            for s, t in zip(student, teacher, strict=True)
        ]
        return torch.stack(rows).mean()


class AffinityMimicking(nn.Module):
    """Soft cross entropy between similarity matrices at a scale of its own, both ways.

    Source: Wu et al., TinyCLIP, ICCV 2023 (2309.12314), section 3.1; scale as in its code.

    Args:
        scale: multiplies cosines before the softmax.
    """

    def __init__(self, scale: float = 50.0):
        super().__init__()
        self.scale = scale
        self.cross_entropy = SoftCrossEntropy()

    def forward(self, student: tuple[Tensor, Tensor], teacher: tuple[Tensor, Tensor]) -> Tensor:
        """Return the loss of (images, texts) [B, D] of length 1 each, a scalar."""
        s, t = (self.scale * images @ texts.T for images, texts in (student, teacher))
        loss: Tensor = self.cross_entropy((s, s.T), (t, t.T))
        return loss


class FeatureMSE(nn.Module):
    """Mean squared error, mean over pairs: of features, or of hidden states of paired layers."""

    def forward(self, student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
        """Return the mean over pairs of equal shapes, a scalar; 0 for none."""
        rows = [F.mse_loss(s, t) for s, t in zip(student, teacher, strict=True)]
        return torch.stack(rows).mean() if rows else torch.zeros(())


class AttentionMSE(nn.Module):
    """Mean squared error of attention scores before the softmax, heads that stay against theirs.

    Entries that a mask sets below -1e3 in either count as equal.
    Source: EfficientVLM (2210.07795), section 3; as in TinyBERT (1909.10351), eq. 7.
    """

    def forward(
        self,
        student: Sequence[Tensor],
        teacher: Sequence[Tensor],
        heads: Sequence[Sequence[int]] | None = None,
    ) -> Tensor:
        """Return the mean over pairs, a scalar; 0 for none.

        Args:
            student: scores [B, heads that stay, queries, keys] of each layer.
            teacher: scores [B, H, queries, keys] of the layer that it came from.
            heads: of each layer, the teacher's heads that stay, in order; None: all.
        """
        rows = []
        for number, (s, t) in enumerate(zip(student, teacher, strict=True)):
            t = t if heads is None else t[:, list(heads[number])]
            hidden = (s < -1e3) | (t < -1e3)
            rows.append(F.mse_loss(s.masked_fill(hidden, 0), t.masked_fill(hidden, 0)))
        return torch.stack(rows).mean() if rows else torch.zeros(())


class LogitKL(nn.Module):
    """KL divergence from the teacher's predictions at a temperature, times its square.

    Source: Hinton et al. (1503.02531), section 2.

    Args:
        temperature: divides logits.
    """

    def __init__(self, temperature: float = 1.0):
        super().__init__()
        if temperature <= 0:
            raise ValueError(f"temperature must be above 0; got {temperature}.")
        self.temperature = temperature

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Return the mean over rows of logits [B, ..., C], a scalar."""
        s = (student / self.temperature).log_softmax(-1).flatten(0, -2)
        t = (teacher / self.temperature).log_softmax(-1).flatten(0, -2)
        return F.kl_div(s, t, reduction="batchmean", log_target=True) * self.temperature**2
