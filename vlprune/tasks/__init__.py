"""Tasks: batches, a loss and a measure, one a file; `scenes/` is the data set that ships."""

from vlprune.registry import TASKS

__getattr__ = TASKS.by_class_name
