"""Questions about pictures, answered by the likeliest of a list of candidates.

For transformers' `BlipForQuestionAnswering`. An answer scores its log-likelihood under the decoder,
summed over its tokens and its end, not divided by their number: that is the model's probability of
saying just this. Accuracy is in percent; ties count against.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from vlprune.calls import Inputs
from vlprune.registry import TASKS
from vlprune.tasks._batches import check_repeatable, fields, first_of
from vlprune.tasks._examples import is_best, mean_value, started, token_losses
from vlprune.tasks._models import device_of

Batch = tuple[Tensor, Tensor, Tensor]
_ANSWERS = 64  # candidates that are decoded at a time


@TASKS.register("question_answering")
class QuestionAnswering:
    """Visual question answering by ranking candidates.

    Source:
        BLIP (Li et al., 2022, arXiv 2201.12086, section 5.3), which ranks the 128 candidates of the
        likeliest first tokens; here all are ranked.

    Args:
        loader: batches {"image": [B, C, H, W], "question": [B, T], "answer": [B]} or such tuples;
            an answer is an index into `answers`. Gone through many times.
        answers: token ids of all candidates [A, T]: a start, the words, the end, then padding. The
            start is replaced by the decoder's own.
        pad: id of padding, in questions and answers.

    Raises:
        TypeError: if the loader can be gone through only once.
        ValueError: if `answers` are no token ids of at least two candidates; by any use, if the
            loader is empty.
    """

    name = "question_answering"

    def __init__(self, loader: Iterable[Any], answers: Tensor, pad: int = 0):
        check_repeatable(loader, "loader")
        if answers.dim() != 2 or len(answers) < 2 or answers.is_floating_point():
            raise ValueError(
                "answers must be token ids [A, T] of two candidates or more; got "
                f"{answers.dtype} {list(answers.shape)}."
            )
        self._loader = loader
        self.answers = answers
        self.pad = pad

    def batches(self) -> Iterable[Batch]:
        """Yield (image, question, answer)."""
        for batch in self._loader:
            image, question, answer = fields(batch, "image", "question", "answer")
            yield image, question, answer

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return minus the log-likelihood of the right answers, the mean of the batch."""
        states, mask = self._ask(model, batch)
        right = self.answers.to(states.device)[batch[2].to(states.device)]
        return -self._likelihoods(model, states, mask, right).mean()

    def outputs(self, model: nn.Module, batch: Batch) -> tuple[Tensor]:
        """Return the log-likelihood of every candidate [B, A]."""
        states, mask = self._ask(model, batch)
        found = []
        for answers in torch.split(self.answers.to(states.device), _ANSWERS):
            count = len(answers)
            likelihoods = self._likelihoods(
                model,
                states.repeat_interleave(count, 0),  # [B * A, T, D], one question after the other
                mask.repeat_interleave(count, 0),
                answers.repeat(len(states), 1),
            )
            found.append(likelihoods.reshape(-1, count))
        return (torch.cat(found, dim=1),)

    def targets(self, batch: Batch) -> Tensor:
        """Return the right answers [B]."""
        return batch[2]

    def values(self, outputs: tuple[Tensor, ...], targets: Tensor) -> Tensor:
        """Return 100 where the right answer is the likeliest, else 0 [N]."""
        return 100 * is_best(outputs[0], targets.to(outputs[0].device)).double()

    def losses(self, model: nn.Module, outputs: tuple[Tensor, ...], targets: Tensor) -> Tensor:
        """Return minus the log-likelihood of every right answer [B]."""
        right = targets.to(outputs[0].device)[:, None]
        return -outputs[0].gather(1, right).squeeze(1)

    def logits(self, model: nn.Module, outputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Return the log-likelihoods of the candidates [B, A]: a softmax picks one of them."""
        return outputs

    def measure(self, model: nn.Module) -> float:
        """Return the accuracy in percent."""
        return mean_value(self, model)

    def example_inputs(self, model: nn.Module) -> Inputs:
        """Return one picture, its question and its answer, by the keywords of transformers."""
        image, question, answer = (x[:1] for x in first_of(self.batches(), type(self).__name__))
        ids = started(model, self.answers[answer.cpu()])
        return {
            "pixel_values": image,
            "input_ids": question,
            "attention_mask": (question != self.pad).long(),
            "decoder_input_ids": ids,
            "decoder_attention_mask": (ids != self.pad).long(),
            "labels": ids.masked_fill(ids == self.pad, -100),  # without, no output has the answer
        }

    def _ask(self, model: Any, batch: Batch) -> tuple[Tensor, Tensor]:
        """What the text encoder makes of questions that look at pictures [B, T, D]; their mask."""
        image, question = (x.to(device_of(model)) for x in batch[:2])
        mask = (question != self.pad).long()
        states = model.text_encoder(
            input_ids=question,
            attention_mask=mask,
            encoder_hidden_states=model.vision_model(pixel_values=image).last_hidden_state,
        ).last_hidden_state
        return states, mask

    def _likelihoods(self, model: Any, states: Tensor, mask: Tensor, answers: Tensor) -> Tensor:
        """Log-likelihoods [B] of answers [B, T], each after the states of its question."""
        ids = started(model, answers)
        decoded = model.text_decoder(
            input_ids=ids,
            attention_mask=(ids != self.pad).long(),
            encoder_hidden_states=states,
            encoder_attention_mask=mask,
            use_cache=False,
        )
        return -token_losses(decoded.logits[:, :-1], ids, self.pad).sum(1)
