"""Loading what stays until the end, cheaply."""

import atexit
import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def frozen_imports() -> Iterator[None]:
    """Without the collections that so many new objects would set off, and none looks through them later."""
    gc.disable()
    try:
        yield
        gc.freeze()
        atexit.register(gc.unfreeze)  # triton says on standard error what of it is not collected at exit
    finally:
        gc.enable()
