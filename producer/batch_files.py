"""Row files: append-only JSON lines, of which a crash can tear only the last one."""

import errno
import fcntl
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

from ingine.errors import ConfigError, IngineError

FSYNC_EVERY_S = 1.0
_REPAIR_STEP = 1 << 16


def encode_row(row: dict[str, Any]) -> bytes:
    return json.dumps(row).encode() + b"\n"


class WriteFailed(IngineError):
    """A row could not be written: disk full, quota, or a file system that went away."""


def open_locked(path: Path, flags: int = 0) -> int:
    """Open a file to append to, and lock it. Returns its descriptor. Raises ConfigError."""
    try:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | flags, 0o666)
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {error.strerror}") from None
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if not os.path.samestat(os.fstat(fd), os.stat(path)):  # removed or replaced by the run that had it
            raise FileNotFoundError(path)
    except OSError:
        os.close(fd)
        raise ConfigError(f"{path} is being written by another run") from None
    return fd


class RowFile:
    """One result file of a batch, locked against a second run. Each row is in it either whole or not at all.

    Opening it removes a torn last line, as `kill -9` or a crash of the machine leaves one.
    Raises ConfigError if it cannot be opened, or if another run has locked it.
    """

    def __init__(self, path: Path):
        self.path = path
        self._fd = open_locked(path)
        self._size = self._cut_torn_line()
        self._synced_at = time.monotonic()

    def _cut_torn_line(self) -> int:
        """Truncate the file after its last newline. Returns its size."""
        size = os.fstat(self._fd).st_size
        end = size
        while end > 0:
            start = max(0, end - _REPAIR_STEP)
            newline = os.pread(self._fd, end - start, start).rfind(b"\n")
            if newline >= 0:
                end = start + newline + 1
                break
            end = start
        if end < size:
            os.ftruncate(self._fd, end)
        return end

    def rows(self) -> Iterator[dict[str, Any]]:
        """Iterate over all rows. Raises ConfigError at a line that is not a row."""
        with self.path.open("rb") as file:
            for number, raw in enumerate(file, 1):
                try:
                    row = json.loads(raw)
                    if not isinstance(row["id"], str) or "custom_id" not in row:
                        raise ValueError("not a row")
                except (ValueError, TypeError, KeyError, RecursionError):
                    raise ConfigError(f"{self.path}, line {number}: not a row of a batch file") from None
                yield row

    def write(self, row: dict[str, Any]) -> None:
        """Append one row. It survives the death of this process at once, a crash of the machine after at most
        FSYNC_EVERY_S.

        Raises WriteFailed; no part of the row is then in the file.
        """
        raw = encode_row(row)
        try:
            unwritten = memoryview(raw)
            while unwritten:
                unwritten = unwritten[os.write(self._fd, unwritten) :]
            self._size += len(raw)
            if time.monotonic() - self._synced_at > FSYNC_EVERY_S:
                os.fsync(self._fd)
                self._synced_at = time.monotonic()
        except OSError as error:
            os.ftruncate(self._fd, self._size)
            hint = (
                "free some space" if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG) else "mend that"
            )
            raise WriteFailed(
                f"cannot write {self.path}: {error.strerror}. All rows so far are whole: "
                f"{hint}, and run the same command again to go on"
            ) from None

    def clear(self) -> None:
        """Remove all rows: either all or none, if this process is killed meanwhile.

        They do not come back after a crash of the machine, when their lines may have rows in the output.
        """
        os.ftruncate(self._fd, 0)
        os.fsync(self._fd)
        self._size = 0

    def close(self) -> None:
        """Flush the file to the disk, and release the lock. Raises WriteFailed."""
        try:
            os.fsync(self._fd)
        except OSError as error:
            raise WriteFailed(f"cannot write {self.path}: {error.strerror}") from None
        finally:
            os.close(self._fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_) -> None:
        self.close()
