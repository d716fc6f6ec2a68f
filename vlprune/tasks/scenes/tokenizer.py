"""A word-level tokenizer for texts about scenes: a few dozen words, no file, nothing to download.

Ids: 0 pads, 1 starts, the words follow in order, and END is the largest, since open_clip pools a
text at the position of its largest id. By default the words are those of captions; questions and
statements need `words.scene_words()`.
"""

import difflib
import re
from collections.abc import Sequence

import torch
from torch import Tensor

from vlprune.tasks.scenes.captions import caption_words

CONTEXT_LENGTH = 32
PAD, START = 0, 1

_WORD = re.compile(r"[,?]|[^\s,?]+")


class Tokenizer:
    """Maps texts to token ids and back.

    Args:
        words: All that a text can hold; default: the words of captions.

    Example:
        >>> tokenizer = Tokenizer()
        >>> tokenizer.decode(tokenizer.tokenize("a bag top left, trousers right"))
        ['a bag top left, trousers right']
    """

    def __init__(self, words: Sequence[str] | None = None) -> None:
        self.words = caption_words() if words is None else tuple(words)
        self._id_of = {word: START + 1 + place for place, word in enumerate(self.words)}
        self.end = START + 1 + len(self.words)
        self.vocab_size = self.end + 1

    def tokenize(self, texts: str | Sequence[str], context_length: int = CONTEXT_LENGTH) -> Tensor:
        """Token ids `[texts, context_length]`, int64.

        Raises:
            ValueError: A word is unknown, or a text needs more than `context_length` tokens.
        """
        texts = [texts] if isinstance(texts, str) else texts
        tokens = torch.full((len(texts), context_length), PAD)
        for row, text in zip(tokens, texts, strict=True):
            ids = self._encode(text)
            if len(ids) > context_length:
                raise ValueError(
                    f"a text must need at most {context_length} tokens with its start and end; "
                    f"got {len(ids)} in {text!r}. Shorten it or raise context_length."
                )
            row[: len(ids)] = torch.tensor(ids)
        return tokens

    def decode(self, ids: Tensor) -> list[str]:
        """The texts of token ids `[texts, context]` or `[context]`; start, end and pads vanish."""
        return [self._text(row) for row in ids.reshape(-1, ids.shape[-1]).tolist()]

    def _encode(self, text: str) -> list[int]:
        words = _WORD.findall(text.lower())
        unknown = [word for word in dict.fromkeys(words) if word not in self._id_of]
        if unknown:
            raise ValueError(
                f"a text must hold known words only; got {', '.join(map(repr, unknown))} "
                f"in {text!r}. {' '.join(map(self._suggest, unknown))}"
            )
        return [START, *(self._id_of[word] for word in words), self.end]

    def _suggest(self, word: str) -> str:
        nearest = difflib.get_close_matches(word, self.words, cutoff=0.0)
        return f"Nearest to {word!r}: {', '.join(map(repr, nearest))}."

    def _text(self, ids: list[int]) -> str:
        words = [self.words[i - START - 1] for i in ids if START < i < self.end]
        return " ".join(words).replace(" ,", ",").replace(" ?", "?")
