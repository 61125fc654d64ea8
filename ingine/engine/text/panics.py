"""Turns panics of libraries written in Rust, such as tokenizers and safetensors, into Python errors."""

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def panics_as_errors() -> Iterator[None]:
    """Raise RuntimeError instead of a panic inside the block.

    pyo3's PanicException is a BaseException, so `except Exception` lets it end whole threads and event loops.
    Its class cannot be imported, and each library has its own. The exceptions of Python that `except
    Exception` does not catch, such as KeyboardInterrupt, pass unchanged.
    """
    try:
        yield
    except (Exception, KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:
        raise RuntimeError(f"a library panicked: {error}") from error
