"""The papers as programs: each reads from top to bottom, every step a public call."""
