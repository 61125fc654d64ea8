"""Hosts of the engine and of prompt readers: threads and processes, and the pipes to them."""
