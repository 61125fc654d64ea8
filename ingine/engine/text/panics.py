"""Panics of libraries that are written in Rust, such as tokenizers and safetensors."""

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def panics_as_errors() -> Iterator[None]:
    """Raise RuntimeError for a panic: pyo3's PanicException is a BaseException, so `except Exception` lets it
    end whole threads and event loops. It has no importable class, and each library its own.

    What Python itself raises past `except Exception` (Ctrl-C above all) passes.
    """
    try:
        yield
    except (Exception, KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:
        raise RuntimeError(f"a library panicked: {error}") from error
