"""A package, so that `python -m benchmarks.x` is this one and not whichever else a machine has installed."""
