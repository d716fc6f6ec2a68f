"""Structures that can be removed, one a file, registered by name."""
