"""Simulates a start after a reboot by dropping the files' pages from the page cache."""

import os
from collections.abc import Iterable
from pathlib import Path


def evict(paths: Iterable[Path]) -> int:
    """Drop all files at and under `paths` from the page cache. Returns their bytes. Linux only.

    Pages that another process has mapped stay, so no process may be running from these files.
    """
    os.sync()  # dirty pages would stay too
    return sum(_evict_file(file) for path in paths for file in _files(path))


def _files(path: Path) -> Iterable[Path]:
    if path.is_file():
        return [path]
    return (file for file in path.rglob("*") if file.is_file() and not file.is_symlink())


def _evict_file(file: Path) -> int:
    descriptor = os.open(file, os.O_RDONLY)
    try:
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        return os.fstat(descriptor).st_size
    finally:
        os.close(descriptor)
