"""What the dependency graph cannot see: one model library or family a file, as rows of data."""
