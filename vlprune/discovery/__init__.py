"""What can be taken out of a model: found by probing gradients, proven by trial."""
