"""Panics of libraries that are written in Rust, such as tokenizers and safetensors."""

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def panics_as_errors() -> Iterator[None]:
    """Raise RuntimeError for a panic: pyo3's PanicException is a BaseException, so `except Exception` lets it
    end whole threads and event loops. It has no importable class.
    """
    try:
        yield
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        raise RuntimeError(f"a library panicked: {error}") from error
