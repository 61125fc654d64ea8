"""The journal of a process that may be killed at any moment: JSON lines, either whole or ignored."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any


class Journal:
    """Writes a journal, for one process at a time. An unfinished line of a killed process is skipped."""

    def __init__(self, path: Path):
        self._file = path.open("ab", buffering=0)
        self._file.write(b"\n")

    def write(self, **record: Any) -> None:
        self._file.write(json.dumps(record).encode() + b"\n")


class Tail:
    """Reads another process's journal. Each call of `read` returns the new whole lines."""

    def __init__(self, path: Path):
        self._path = path
        self._offset = 0

    def read(self) -> Iterator[dict[str, Any]]:
        if not self._path.exists():
            return
        with self._path.open("rb") as file:
            file.seek(self._offset)
            new = file.read()
        whole = new[: new.rfind(b"\n") + 1]
        self._offset += len(whole)
        for line in whole.splitlines():
            try:
                record = json.loads(line)
            except ValueError:  # its writer was killed while writing it
                continue
            yield record


def read(path: Path) -> Iterator[dict[str, Any]]:
    return Tail(path).read()
