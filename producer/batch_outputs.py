"""Where the rows of a batch go."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

from ingine.errors import ConfigError
from ingine.producer.batch_compressed import CompressedRowFile
from ingine.producer.batch_files import RowFile, WriteFailed, encode_row
from ingine.producer.batch_input import STANDARD
from ingine.producer.compression import SUFFIXES, is_compressed


class StandardOutput:
    """Rows on standard output. What an earlier run has written there is not known."""

    path = STANDARD

    def rows(self) -> Iterator[dict[str, Any]]:
        return iter(())

    def write(self, row: dict[str, Any]) -> None:
        """Write one row. Raises WriteFailed, after which a part of the row may have been written."""
        try:
            unwritten = memoryview(encode_row(row))
            while unwritten:
                unwritten = unwritten[os.write(sys.stdout.fileno(), unwritten) :]
        except OSError as error:
            raise WriteFailed(f"cannot write to standard output: {error.strerror}") from None

    def clear(self) -> None:
        raise ConfigError("error rows on standard output cannot be retried: name a file with --errors")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_) -> None:
        pass


def open_rows(path: Path) -> RowFile | StandardOutput:
    """Open a file of rows, or standard output for `-`. Raises ConfigError."""
    if path == STANDARD:
        return StandardOutput()
    return CompressedRowFile(path) if is_compressed(path) else RowFile(path)


def default_error_path(output_path: Path) -> Path:
    """The output path with `.errors` before its suffix; standard output's error rows go there, too."""
    if output_path == STANDARD:
        return STANDARD
    plain = output_path.with_suffix("") if output_path.suffix in SUFFIXES else output_path
    compression = output_path.name.removeprefix(plain.name)
    return plain.with_name(f"{plain.stem}.errors{plain.suffix}{compression}")
