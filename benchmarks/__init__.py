"""Makes this folder a package, so that `python -m benchmarks.x` runs it and no installed `benchmarks`."""
