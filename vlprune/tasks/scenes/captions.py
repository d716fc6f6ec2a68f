"""The words of a scene: the ten classes, the nine places, and the grammar that joins them.

Text only. A caption names the objects in reading order, so two scenes have equal captions exactly
when they show the same classes in the same places.
"""

from collections.abc import Iterable

CLASS_NAMES = (
    "t-shirt",
    "trousers",
    "pullover",
    "dress",
    "coat",
    "sandal",
    "shirt",
    "sneaker",
    "bag",
    "ankle boot",
)
"""In the order of the labels of Fashion-MNIST."""

PLACES = (
    "top left",
    "top",
    "top right",
    "left",
    "center",
    "right",
    "bottom left",
    "bottom",
    "bottom right",
)
"""In reading order: cell `3 * row + col`."""


def noun_phrase(class_name: str) -> str:
    """The class with its article: "a bag", "an ankle boot", "trousers"."""
    if class_name == "trousers":
        return class_name
    return f"an {class_name}" if class_name[0] in "aeiou" else f"a {class_name}"


def caption(objects: Iterable[tuple[str, str]]) -> str:
    """The caption of (class, place) pairs that come in reading order."""
    return ", ".join(f"{noun_phrase(class_name)} {place}" for class_name, place in objects)


def caption_words() -> tuple[str, ...]:
    """Every word that a caption can hold, sorted; the comma counts as one."""
    phrases = [*map(noun_phrase, CLASS_NAMES), *PLACES]
    return tuple(sorted({",", *" ".join(phrases).split()}))
