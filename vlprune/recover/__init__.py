"""Getting accuracy back after a cut: distillation from the uncut model."""
