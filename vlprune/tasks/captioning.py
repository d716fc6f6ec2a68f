"""Captions of pictures: the language-model loss, and how many greedy captions are the reference.

For transformers' `BlipForConditionalGeneration`. Greedy decoding says the reference exactly when,
after each of its beginnings, its next token is the likeliest; so one teacher-forced pass tells what
`generate` would, for all tokens at once and with a gradient.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal, get_args

from torch import Tensor, nn

from vlprune.calls import Inputs
from vlprune.registry import TASKS
from vlprune.tasks._batches import check_repeatable, fields, first_of
from vlprune.tasks._examples import is_best, mean_value, started, token_losses
from vlprune.tasks._models import device_of

Batch = tuple[Tensor, Tensor]
MeasureName = Literal["exact", "tokens"]


@TASKS.register("captioning")
class Captioning:
    """Captions, one for each picture.

    Args:
        loader: batches {"image": [B, C, H, W], "text": [B, T]} or such tuples, T the same in
            all. Gone through many times.
        measure_name: "exact", the share of pictures whose greedy caption is the reference; or
            "tokens", the share of a caption's tokens that are the likeliest after the right ones
            before. Both in percent; ties count against.
        pad: id of padding. The first token is replaced by the decoder's own start.

    Raises:
        TypeError: if the loader can be gone through only once.
        ValueError: if there is no such measure; by any use, if the loader is empty.
    """

    name = "captioning"

    def __init__(self, loader: Iterable[Any], measure_name: MeasureName = "exact", pad: int = 0):
        check_repeatable(loader, "loader")
        if measure_name not in get_args(MeasureName):
            raise ValueError(f"measure_name must be 'exact' or 'tokens'; got {measure_name!r}.")
        self._loader = loader
        self.measure_name = measure_name
        self.pad = pad

    def batches(self) -> Iterable[Batch]:
        """Yield (image, text)."""
        for batch in self._loader:
            image, text = fields(batch, "image", "text")
            yield image, text

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return minus the log-likelihood of a token, the mean over all tokens of the batch."""
        return self.losses(model, self.outputs(model, batch), self.targets(batch)).mean()

    def outputs(self, model: Any, batch: Batch) -> tuple[Tensor]:
        """Return the logits of every token but the first [B, T - 1, V]; those of pads are 0."""
        image, text = (x.to(device_of(model)) for x in batch)
        ids = started(model, text)
        is_pad = ids == self.pad
        logits = model(
            pixel_values=image, input_ids=ids, attention_mask=(~is_pad).long(), use_cache=False
        ).logits
        return (logits[:, :-1].masked_fill(is_pad[:, 1:, None], 0.0),)

    def targets(self, batch: Batch) -> Tensor:
        """Return the token ids [B, T]."""
        return batch[1]

    def values(self, outputs: tuple[Tensor, ...], targets: Tensor) -> Tensor:
        """Return 100 where a caption is exact, else 0; or the percentage of its tokens [N]."""
        ids = targets.to(outputs[0].device)[:, 1:]
        is_pad = ids == self.pad
        right = is_best(outputs[0], ids)
        if self.measure_name == "exact":
            return 100 * (right | is_pad).all(1).double()
        return 100 * (right & ~is_pad).sum(1).double() / (~is_pad).sum(1)

    def losses(self, model: nn.Module, outputs: tuple[Tensor, ...], targets: Tensor) -> Tensor:
        """Return minus the log-likelihood of every caption [B], by the mean length in the batch.

        So that their mean is that over all tokens, as transformers has it.
        """
        ids = targets.to(outputs[0].device)
        lengths = (ids[:, 1:] != self.pad).sum(1).to(outputs[0].dtype)
        return token_losses(outputs[0], ids, self.pad).sum(1) / lengths.mean()

    def logits(self, model: nn.Module, outputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Return predictions [B, V], place by place; where a caption has ended they are all 0."""
        return outputs[0].unbind(1)

    def measure(self, model: nn.Module) -> float:
        """Return the measure in percent."""
        return mean_value(self, model)

    def example_inputs(self, model: nn.Module) -> Inputs:
        """Return one picture and its caption, by the keywords of transformers."""
        image, text = (x[:1] for x in first_of(self.batches(), type(self).__name__))
        ids = started(model, text)
        mask = (ids != self.pad).long()
        return {
            "pixel_values": image,
            "input_ids": ids,
            "attention_mask": mask,
            "use_cache": False,  # nothing is generated
        }
