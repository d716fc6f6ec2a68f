"""Importance metrics, one a file, registered by name; classes are found here by theirs."""

from vlprune.registry import METRICS

__getattr__ = METRICS.by_class_name
