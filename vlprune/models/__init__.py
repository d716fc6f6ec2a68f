"""Architectures that no library here has, one a file; nothing is imported with the folder."""
