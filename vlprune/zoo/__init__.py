"""The zoo: shrunken models of every architecture, built without weights, and what holds on each."""
