"""Ways to spend a budget over axes, one a file, registered by name."""
