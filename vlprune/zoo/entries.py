"""One model of the zoo, as data: its name and how its family builds it."""

from __future__ import annotations

import dataclasses
from typing import Any


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """A model that can be built without weights or a download.

    Attributes:
        name: "library/architecture", unique.
        family: name of the family whose `build` takes `arguments` and whose `example_inputs` feeds
            the model.
        arguments: JSON values only, so that a saved model can be built again from them.
        group: what it belongs to: the module of a timm model, the kind of an open_clip config, the
            model type of a transformers class.
        transformer: whether it has transformer blocks at all; a pure ConvNet tower has none.
    """

    name: str
    family: str
    arguments: dict[str, Any]
    group: str
    transformer: bool = True
