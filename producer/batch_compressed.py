"""A result file of a batch that is compressed once the batch is complete."""

import os
import shutil
from pathlib import Path
from typing import Any

from ingine.errors import ConfigError
from ingine.producer.batch_files import RowFile, WriteFailed, open_locked
from ingine.producer.compression import READ_ERRORS, open_file


class CompressedRowFile(RowFile):
    """Rows in a compressed file.

    A compressed file cannot be appended to row by row, nor mended after `kill -9`. So the rows of an
    incomplete batch are in a file beside it, PATH.partial, which is not compressed. If that has rows, it has
    all of them, whatever is in PATH; else PATH has them.
    """

    def __init__(self, path: Path):
        """Raises ConfigError like RowFile, and if PATH cannot be read."""
        self._compressed_path = path
        super().__init__(path.with_name(f"{path.name}.partial"))
        self._changed = self._size > 0
        try:
            if not self._changed and path.exists():
                self._decompress()
        except BaseException:
            self.close()
            raise

    def _decompress(self) -> None:
        """Replace the empty partial file by the rows of the compressed one, all at once."""
        new_path = self.path.with_name(f"{self.path.name}.new")
        new_fd = open_locked(new_path, os.O_TRUNC)
        try:
            with open_file(self._compressed_path) as source, new_path.open("wb") as target:
                shutil.copyfileobj(source, target)
                target.flush()
                os.fsync(target.fileno())
            new_path.rename(self.path)
        except READ_ERRORS as error:
            os.close(new_fd)
            new_path.unlink()
            self.path.unlink()
            why = getattr(error, "strerror", None) or error
            raise ConfigError(f"cannot decompress {self._compressed_path}: {why}") from None
        os.close(self._fd)
        self._fd = new_fd  # locked, and now the file of this name
        self._size = self._cut_torn_line()

    def write(self, row: dict[str, Any]) -> None:
        self._changed = True
        super().write(row)

    def clear(self) -> None:
        self._changed = True
        self._compressed_path.unlink(missing_ok=True)  # first: an empty partial file counts for nothing
        super().clear()

    def __exit__(self, error_type: type[BaseException] | None, *_) -> None:
        """Compress the rows, unless the batch was interrupted and there are new ones."""
        try:
            if error_type is None and (self._changed or not self._compressed_path.exists()):
                self._compress()
            if error_type is None or not self._changed:
                self.path.unlink()
        finally:
            self.close()

    def _compress(self) -> None:
        new_path = self._compressed_path.with_name(f"{self.path.name}.new{self._compressed_path.suffix}")
        try:
            with self.path.open("rb") as source, open_file(new_path, "wb") as target:
                shutil.copyfileobj(source, target)
            with new_path.open("rb") as written:
                os.fsync(written.fileno())
            new_path.rename(self._compressed_path)
        except OSError as error:
            new_path.unlink(missing_ok=True)
            raise WriteFailed(
                f"cannot write {self._compressed_path}: {error.strerror}. All rows are in {self.path}: "
                "free some space, and run the same command again to compress them"
            ) from None
