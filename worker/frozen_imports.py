"""Import large modules without garbage collections."""

import atexit
import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def frozen_imports() -> Iterator[None]:
    """Disable garbage collection within the context, and exclude the objects created so far from all later
    collections. For imports of modules that stay loaded and create many objects."""
    gc.disable()
    try:
        yield
        gc.freeze()
        # Triton prints a warning at exit for each of its objects that is not collected.
        atexit.register(gc.unfreeze)
    finally:
        gc.enable()
