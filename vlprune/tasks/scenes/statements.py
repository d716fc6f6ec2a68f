"""Statements about two scenes side by side, true or false: "both pictures show a bag".

A statement's kind is drawn first, among those that the two scenes offer a true and a false
statement of, then its truth by a fair coin: no kind is true more often than false. False statements
are near misses: a class of the other picture, a place of another item, the number of another class.
The i-th statement is about scenes 2i (left) and 2i + 1 (right), and depends on (split, seed, index)
only.
"""

import random
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.data import Dataset

from vlprune.tasks.scenes.batching import Batch, batches_of
from vlprune.tasks.scenes.captions import CLASS_NAMES, noun_phrase
from vlprune.tasks.scenes.data import Scene, Scenes
from vlprune.tasks.scenes.items import Split
from vlprune.tasks.scenes.tokenizer import Tokenizer
from vlprune.tasks.scenes.words import counted, scene_words

STATEMENT_LENGTH = 11
"""Tokens of the longest statement with its start and end."""

Texts = tuple[list[str], list[str]]  # false ones, true ones


@dataclass(frozen=True, slots=True, kw_only=True)
class Statement:
    """A statement about two scenes, and whether it is true."""

    text: str
    is_true: bool


def draw_statement(left: Scene, right: Scene, draw: random.Random) -> Statement:
    """One statement about two scenes."""
    while True:
        texts = draw.choice(_KINDS)(left, right, draw)
        if all(texts):
            is_true = draw.random() < 0.5
            return Statement(text=draw.choice(texts[is_true]), is_true=is_true)


def _classes(scene: Scene) -> set[str]:
    return {placed.class_name for placed in scene.objects}


def _split(names: Iterable[str], is_true: Callable[[str], bool], text: str) -> Texts:
    """The classes put into a text "... {}", by whether that is true then."""
    found: Texts = ([], [])
    for name in sorted(names):
        found[is_true(name)].append(text.format(noun_phrase(name)))
    return found


def _both(left: Scene, right: Scene, draw: random.Random) -> Texts:
    one, other = _classes(left), _classes(right)
    return _split(one | other, (one & other).__contains__, "both pictures show {}")


def _neither(left: Scene, right: Scene, draw: random.Random) -> Texts:
    shown = _classes(left) | _classes(right)
    return _split(CLASS_NAMES, lambda name: name not in shown, "neither picture shows {}")


def _exactly_one(left: Scene, right: Scene, draw: random.Random) -> Texts:
    one, other = _classes(left), _classes(right)
    absent = draw.choice(sorted(set(CLASS_NAMES) - one - other))
    named = one | other | {absent}
    return _split(named, (one ^ other).__contains__, "exactly one picture shows {}")


def _side(left: Scene, right: Scene, draw: random.Random) -> Texts:
    side, shown = draw.choice((("left", _classes(left)), ("right", _classes(right))))
    named = _classes(left) | _classes(right)
    return _split(named, shown.__contains__, f"the {side} picture shows {{}}")


def _place(left: Scene, right: Scene, draw: random.Random) -> Texts:
    side, scene = draw.choice((("left", left), ("right", right)))
    return _placed(scene, (left, right), f"the {side} picture shows {{}} {{}}")


def _exactly_one_place(left: Scene, right: Scene, draw: random.Random) -> Texts:
    scene, other = draw.choice(((left, right), (right, left)))
    false, true = _placed(scene, (scene,), "exactly one picture shows {} {}")
    shared = _placed(other, (other,), "exactly one picture shows {} {}")[1]
    return [t for t in false if t not in shared], [t for t in true if t not in shared]


def _placed(scene: Scene, named: Iterable[Scene], text: str) -> Texts:
    """Classes and places of scenes, put together anew, by whether `scene` shows them so."""
    objects = [placed for one in named for placed in one.objects]
    shown = {(placed.class_name, placed.place) for placed in scene.objects}
    pairs = {(a.class_name, b.place) for a in objects for b in objects}
    found: Texts = ([], [])
    for name, place in sorted(pairs | shown):
        found[(name, place) in shown].append(text.format(noun_phrase(name), place))
    return found


def _more(left: Scene, right: Scene, draw: random.Random) -> Texts:
    difference = len(left.objects) - len(right.objects)
    found: Texts = ([], [])
    found[difference > 0].append("the left picture shows more items than the right")
    found[difference < 0].append("the right picture shows more items than the left")
    found[difference == 0].append("both pictures show equally many items")
    return found


def _in_all(left: Scene, right: Scene, draw: random.Random) -> Texts:
    """A class with its number, and with that of another: numbers tell nothing by themselves."""
    counts = Counter(placed.class_name for placed in (*left.objects, *right.objects))
    absent = draw.choice([name for name in CLASS_NAMES if name not in counts])
    name, other = draw.sample([*sorted(counts), absent], 2)
    if counts[name] == counts[other]:
        return [], []
    texts = [f"there {counted(counts[one], name)} in all" for one in (other, name)]
    return [texts[0]], [texts[1]]


_KINDS: tuple[Callable[[Scene, Scene, random.Random], Texts], ...] = (
    _both,
    _neither,
    _exactly_one,
    _side,
    _place,
    _exactly_one_place,
    _more,
    _in_all,
)


class Statements(Dataset[dict[str, Tensor]]):
    """A statement about each of `count` pairs of scenes, fully determined by (split, count, seed).

    Args:
        split: Which items are used, "train" or "test".
        count: How many pairs and statements.
        seed: Which scenes, and which statements.
    """

    def __init__(self, split: Split = "train", count: int = 1000, seed: int = 0) -> None:
        self.scenes = Scenes(split, 2 * count, seed)
        self.tokenizer = Tokenizer(scene_words())

    def __len__(self) -> int:
        return len(self.scenes) // 2

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """Image `[2, 3, 96, 96]`, text `[11]` and label `[]`."""
        return {name: value[0] for name, value in self.batch([index]).items()}

    def pair(self, index: int) -> tuple[Scene, Scene]:
        """The left and the right scene."""
        index = range(len(self))[index]  # negative ones count from the end
        return self.scenes.scene(2 * index), self.scenes.scene(2 * index + 1)

    def statement(self, index: int) -> Statement:
        """The statement about one pair."""
        index = range(len(self))[index]
        draw = random.Random(f"statement {self.scenes.split} {self.scenes.seed} {index}")
        return draw_statement(*self.pair(index), draw)

    def batch(self, indices: Iterable[int]) -> dict[str, Tensor]:
        """Images `[B, 2, 3, 96, 96]`, left and right; texts `[B, 11]`; labels `[B]`, 1 = true."""
        indices = [range(len(self))[index] for index in indices]
        statements = [self.statement(index) for index in indices]
        images, _ = self.scenes.batch([2 * i + side for i in indices for side in (0, 1)])
        return {
            "image": images.reshape(-1, 2, *images.shape[1:]),
            "text": self.tokenizer.tokenize([s.text for s in statements], STATEMENT_LENGTH),
            "label": torch.tensor([int(s.is_true) for s in statements]),
        }


def statement_loader(
    split: Split, count: int, seed: int, batch_size: int, *, stream: bool = False
) -> Sequence[Batch]:
    """Batches {"image", "text", "label"} in order; the last may be smaller."""
    statements = Statements(split, count, seed)
    return batches_of(statements.batch, count, batch_size, stream=stream)
