"""Moves data between host and device, and between the processes that share a model."""
