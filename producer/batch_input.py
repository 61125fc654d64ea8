"""The input of a batch, read line by line: a file, or standard input."""

import shutil
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from tempfile import TemporaryFile
from typing import BinaryIO

from ingine.errors import ConfigError
from ingine.producer.batch_ids import IdSet
from ingine.producer.compression import READ_ERRORS, is_compressed, open_file
from ingine.producer.openai.batch_format import Line, parse_line

STANDARD = Path("-")
"""Standard input or output."""


class InputFile:
    """The lines of a batch. Each call of `lines` reads them from the beginning."""

    def __init__(self, path: Path, *, model: str | None = None):
        """path: a file, compressed or not, or `-`: standard input is copied to a temporary file up to its
        end, because a batch reads its input twice. model: overrides the model that the lines name.

        Raises ConfigError if `path` is not a file, or compressed in a way that this Python cannot read.
        """
        if path != STANDARD and not path.is_file():
            raise ConfigError(f"{path} is not a file")
        is_compressed(path)
        self.path, self._model = path, model
        self._copy = _copy_of_standard_input() if path == STANDARD else None

    def lines(self) -> Iterator[Line]:
        """Parse all lines but blank ones. Raises ConfigError if the file cannot be read."""
        known_ids = IdSet()
        try:
            with self._open() as file:
                for number, raw in enumerate(file, 1):
                    if raw.strip():
                        yield parse_line(number, raw, model=self._model, known_ids=known_ids)
        except READ_ERRORS as error:
            why = getattr(error, "strerror", None) or error
            raise ConfigError(f"cannot read {self.path}: {why}") from None

    def _open(self) -> AbstractContextManager[BinaryIO]:
        if self._copy is None:
            return open_file(self.path)
        self._copy.seek(0)
        return nullcontext(self._copy)


def _copy_of_standard_input() -> BinaryIO:
    copy = TemporaryFile()  # noqa: SIM115  it has no name, so nothing is left of it after a kill
    try:
        shutil.copyfileobj(sys.stdin.buffer, copy)
    except OSError as error:
        raise ConfigError(f"cannot copy standard input to a temporary file: {error.strerror}") from None
    return copy
