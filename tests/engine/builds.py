"""The native kernels, compiled for this CPU and for older ones."""

from ctypes import CDLL
from functools import cache

from filelock import FileLock

from ingine.engine.kernels import native
from ingine.engine.kernels.native.compiler import build
from ingine.paths import cache_root


@cache
def library(march: str = "native") -> CDLL:
    """Compiled by one of the processes that test in parallel."""
    folder = cache_root() / "native"
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / f"{march}.tests.lock"):
        path = build(march)
    return native.load(path)
