"""Units taken out one by one and measured: exact, cached, resumable, sharded."""
