"""Questions about scenes, with one right answer each: what, how many, whether, where.

"what is top left?", "how many bags?", "is there a coat?", "where is the dress?". The four kinds
come equally often, and within a kind the answers that a scene offers do, so that knowing the
questions alone helps little. The i-th question is about the i-th scene and depends on (split, seed,
index) only.
"""

import random
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.data import Dataset

from vlprune.tasks.scenes.batching import Batch, batches_of
from vlprune.tasks.scenes.captions import CLASS_NAMES, PLACES, noun_phrase
from vlprune.tasks.scenes.data import Scene, Scenes
from vlprune.tasks.scenes.items import Split
from vlprune.tasks.scenes.tokenizer import Tokenizer
from vlprune.tasks.scenes.words import NUMBERS, be, plural, scene_words

ANSWERS = ("yes", "no", *NUMBERS[:5], "nothing", *CLASS_NAMES, *PLACES)
"""All answers; an answer's index is its place here."""

QUESTION_LENGTH, ANSWER_LENGTH = 8, 4
"""Tokens of the longest question and answer with their start and end."""

_NOTHING = 1 / (1 + len(CLASS_NAMES))  # as often as any class


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """A question and its answer, one of `ANSWERS`."""

    text: str
    answer: str


def draw_question(scene: Scene, draw: random.Random) -> Question:
    """One question about a scene."""
    found = None
    while found is None:  # where a scene has no class that is there once, another kind is drawn
        found = draw.choice(_KINDS)(scene, draw)
    return found


def _what(scene: Scene, draw: random.Random) -> Question:
    shown = {placed.place: placed.class_name for placed in scene.objects}
    if draw.random() < _NOTHING:
        place = draw.choice([place for place in PLACES if place not in shown])
    else:
        place = draw.choice(list(shown))
    return Question(text=f"what is {place}?", answer=shown.get(place, "nothing"))


def _how_many(scene: Scene, draw: random.Random) -> Question:
    counts = Counter(placed.class_name for placed in scene.objects)
    of_number: dict[int, list[str]] = {len(scene.objects): ["items"]}
    for class_name in CLASS_NAMES:
        of_number.setdefault(counts[class_name], []).append(plural(class_name))
    number = draw.choice(sorted(of_number))
    return Question(text=f"how many {draw.choice(of_number[number])}?", answer=NUMBERS[number])


def _whether(scene: Scene, draw: random.Random) -> Question:
    shown = {placed.class_name for placed in scene.objects}
    answer = draw.choice(("yes", "no"))
    name = draw.choice([name for name in CLASS_NAMES if (name in shown) == (answer == "yes")])
    return Question(text=f"{be(name)} there {noun_phrase(name)}?", answer=answer)


def _where(scene: Scene, draw: random.Random) -> Question | None:
    counts = Counter(placed.class_name for placed in scene.objects)
    alone = [placed for placed in scene.objects if counts[placed.class_name] == 1]
    if not alone:
        return None
    placed = draw.choice(alone)
    name = placed.class_name
    return Question(text=f"where {be(name)} the {name}?", answer=placed.place)


_KINDS: tuple[Callable[[Scene, random.Random], Question | None], ...] = (
    _what,
    _how_many,
    _whether,
    _where,
)


class Questions(Dataset[dict[str, Tensor]]):
    """A question about each of `count` scenes, fully determined by (split, count, seed).

    Args:
        split: Which items are used, "train" or "test".
        count: How many scenes and questions.
        seed: Which scenes, and which questions.
    """

    def __init__(self, split: Split = "train", count: int = 1000, seed: int = 0) -> None:
        self.scenes = Scenes(split, count, seed)
        self.tokenizer = Tokenizer(scene_words())

    def __len__(self) -> int:
        return len(self.scenes)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """Image `[3, 96, 96]`, question `[8]` and answer `[]`, an index into `ANSWERS`."""
        return {name: value[0] for name, value in self.batch([index]).items()}

    def question(self, index: int) -> Question:
        """The question about one scene."""
        index = range(len(self))[index]  # negative ones count from the end
        draw = random.Random(f"question {self.scenes.split} {self.scenes.seed} {index}")
        return draw_question(self.scenes.scene(index), draw)

    def batch(self, indices: Iterable[int]) -> dict[str, Tensor]:
        """Images `[B, 3, 96, 96]`, questions `[B, 8]` and answers `[B]`."""
        indices = list(indices)
        questions = [self.question(index) for index in indices]
        return {
            "image": self.scenes.batch(indices)[0],
            "question": self.tokenizer.tokenize([q.text for q in questions], QUESTION_LENGTH),
            "answer": torch.tensor([ANSWERS.index(q.answer) for q in questions]),
        }


def answer_tokens() -> Tensor:
    """Token ids of all answers `[A, 4]`."""
    return Tokenizer(scene_words()).tokenize(ANSWERS, ANSWER_LENGTH)


def question_loader(
    split: Split, count: int, seed: int, batch_size: int, *, stream: bool = False
) -> Sequence[Batch]:
    """Batches {"image", "question", "answer"} in order; the last may be smaller."""
    questions = Questions(split, count, seed)
    return batches_of(questions.batch, count, batch_size, stream=stream)
