"""Classes that cut modules take on, made by rule and importable by name."""
