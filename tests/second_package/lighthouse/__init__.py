"""A model library that knows nothing of vlprune, and one file beside it that does."""
