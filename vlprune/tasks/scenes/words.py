"""The words of questions and statements about scenes: numbers, plurals, "is" or "are".

Text only, beside `captions.py`, whose words they hold as well: a model that reads all of them has
one vocabulary.
"""

from vlprune.tasks.scenes.captions import CLASS_NAMES, caption_words

NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight")
"""As many as two scenes can hold; a number is its own index."""

_TEMPLATES = (
    "what where is are how many there ? the yes no nothing items in all left right picture shows "
    "both pictures show neither exactly one more than equally"
)


def plural(class_name: str) -> str:
    """Several of a class: "bags", "dresses", "ankle boots", "trousers"."""
    if class_name == "trousers":
        return class_name
    return class_name + ("es" if class_name.endswith("s") else "s")


def be(class_name: str) -> str:
    """The verb that one of a class takes: "is" or "are"."""
    return "are" if class_name == "trousers" else "is"


def counted(number: int, class_name: str) -> str:
    """So many of a class, with the verb before: "is one bag", "are three sandals"."""
    if number == 1:
        return f"{be(class_name)} one {class_name}"
    return f"are {NUMBERS[number]} {plural(class_name)}"


def scene_words() -> tuple[str, ...]:
    """Every word that a caption, a question, an answer or a statement can hold, sorted."""
    nouns = " ".join(map(plural, CLASS_NAMES)).split()
    return tuple(sorted({*caption_words(), *NUMBERS, *nouns, *_TEMPLATES.split()}))
