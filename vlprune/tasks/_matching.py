"""Matching of images and texts by BLIP: its features, its matching head, ranking by that head.

For models with the parts of transformers' `BlipForImageTextRetrieval`: `vision_model`,
`text_encoder`, `vision_proj`, `text_proj`, `itm_head`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vlprune.calls import Inputs

_PAIRS = 2048  # that the head looks at at a time


def is_blip(model: Any) -> bool:
    """Say whether a model has BLIP's parts."""
    names = ("vision_model", "text_encoder", "vision_proj", "text_proj", "itm_head")
    return all(hasattr(model, name) for name in names)


def image_states(model: Any, image: Tensor) -> Tensor:
    """Return the tokens of images [B, T, D]."""
    states: Tensor = model.vision_model(pixel_values=image).last_hidden_state
    return states


def features(model: Any, states: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
    """Return features [B, E] of images, given their tokens, and of texts, not normalised."""
    alone = model.text_encoder(input_ids=text, attention_mask=_mask(model, text))
    return model.vision_proj(states[:, 0]), model.text_proj(alone.last_hidden_state[:, 0])


def match(model: Any, states: Tensor, text: Tensor) -> Tensor:
    """Return logits [B, 2], no and yes, of images, given their tokens, and texts [B, T]."""
    together = model.text_encoder(
        input_ids=text, attention_mask=_mask(model, text), encoder_hidden_states=states
    )
    logits: Tensor = model.itm_head(together.last_hidden_state[:, 0])
    return logits


def hard_negatives(similarity: Tensor, groups: Tensor) -> tuple[Tensor, Tensor]:
    """Return the most similar wrong text of every image, and wrong image of every text [B] each.

    BLIP draws them by their similarity (section 3.2); here the hardest is taken, so that a loss is
    the same every time. Captions of one group are equal; where all are, it is the first.
    """
    wrong = groups[:, None] != groups[None, :]
    chances = similarity.detach().masked_fill(~wrong, float("-inf"))
    return chances.argmax(1), chances.argmax(0)


def triples(model: Any, states: Tensor, text: Tensor, texts: Tensor, images: Tensor) -> Tensor:
    """Return logits [B, 3, 2] of pairs, of images with `texts`, and of texts with `images`."""
    logits = match(
        model, torch.cat([states, states, states[images]]), torch.cat([text, text[texts], text])
    )
    return logits.reshape(3, -1, 2).transpose(0, 1)


def losses(matches: Sequence[Tensor]) -> Tensor:
    """Return the mean cross-entropy [B] of a pair's and its two negatives' logits [B, 2]."""
    parts = [
        F.cross_entropy(
            logits, logits.new_full((len(logits),), is_pair, dtype=torch.long), reduction="none"
        )
        for logits, is_pair in zip(matches, (1, 0, 0), strict=True)
    ]
    return torch.stack(parts).mean(0)


def ranked_again(
    model: Any, states: Tensor, text: Tensor, similarity: Tensor, top: int
) -> tuple[Tensor, Tensor]:
    """Return similarities [N, N] of images to texts, and of texts to images, the first `top` anew.

    Those score the head's log-odds plus the similarity, all others minus infinity. BLIP adds the
    similarity to the logit of a match alone (its `evaluation` for retrieval).
    """
    return (
        _again(similarity, top, lambda i, j: match(model, states[i], text[j])),
        _again(similarity.T, top, lambda i, j: match(model, states[j], text[i])),
    )


def _again(similarity: Tensor, top: int, score: Any) -> Tensor:
    """Similarities [queries, answers] of which the first `top` of each row are scored anew."""
    top = min(top, similarity.shape[1])
    found = torch.full_like(similarity, float("-inf"))
    every = torch.arange(len(similarity), device=similarity.device)
    for rows in torch.split(every, _PAIRS // top or 1):
        values, columns = similarity[rows].topk(top, dim=1)
        logits = score(rows.repeat_interleave(top), columns.flatten()).to(similarity.dtype)
        odds = (logits[:, 1] - logits[:, 0]).reshape(-1, top)
        found[rows[:, None], columns] = odds + values
    return found


def example_inputs(model: Any, image: Tensor, text: Tensor) -> Inputs:
    """Return calls with and without the matching head."""
    inputs = {"pixel_values": image, "input_ids": text, "attention_mask": _mask(model, text)}
    return [{**inputs, "use_itm_head": True}, {**inputs, "use_itm_head": False}]


def _mask(model: Any, text: Tensor) -> Tensor:
    is_word: Tensor = text != model.config.text_config.pad_token_id
    return is_word.long()
