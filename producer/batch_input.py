"""The input file of a batch, read line by line."""

from collections.abc import Iterator
from pathlib import Path

from ingine.errors import ConfigError
from ingine.producer.batch_ids import IdSet
from ingine.producer.openai.batch_format import Line, parse_line


class InputFile:
    """The lines of a batch. Each call of `lines` reads them from the beginning."""

    def __init__(self, path: Path, *, model: str | None = None):
        """model: overrides the model that the lines name. Raises ConfigError if `path` is not a file."""
        if not path.is_file():
            raise ConfigError(f"{path} is not a file")
        self.path, self._model = path, model

    def lines(self) -> Iterator[Line]:
        """Parse all lines but blank ones. Raises ConfigError if the file cannot be read."""
        known_ids = IdSet()
        try:
            with self.path.open("rb") as file:
                for number, raw in enumerate(file, 1):
                    if raw.strip():
                        yield parse_line(number, raw, model=self._model, known_ids=known_ids)
        except OSError as error:
            raise ConfigError(f"cannot read {self.path}: {error.strerror}") from None
