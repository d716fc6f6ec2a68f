"""The exceptions that are ours: what a user can cause and no built-in names well.

Each derives from the built-in that callers would catch anyway: `except ValueError` keeps working.
"""


class UnknownNameError(KeyError):
    """A name that no registry, anatomy or model holds; the message lists the nearest."""

    def __str__(self) -> str:
        return str(self.args[0])  # KeyError would quote it


class UnsupportedModelError(TypeError):
    """A model, or a part of one, in which nothing could be found that is known to be prunable."""


class TraceError(RuntimeError):
    """The dependency graph of a model could not be built, or not within its time limit."""


class BudgetError(ValueError):
    """A budget that no plan over the scored axes can meet; the message says what can be."""


class PlanError(ValueError):
    """A plan that does not fit the anatomy or the model that it is applied to."""


class LawError(RuntimeError):
    """Masked and cut model disagree: the cut model is not returned. Names the first module.

    Attributes:
        module: path of the first module whose outputs differ, or "" where only the model's do.
        relative_error: the largest absolute difference over the largest absolute value.
    """

    def __init__(self, message: str, *, module: str = "", relative_error: float = float("nan")):
        super().__init__(message)
        self.module = module
        self.relative_error = relative_error


class CheckpointError(ValueError):
    """A saved folder that is truncated, edited, foreign, or does not fit its model."""
