"""Getting accuracy back after a cut: repair in closed form, distillation from the uncut model."""
