"""What a linked folder was made of: the headers of its GGUF files, which say all that config.json and the
tokenizer do. A file that takes the place of one of them may have another.
"""

import json
from collections.abc import Sequence
from pathlib import Path

from ingine.engine.files.model_files import GGUF_RECORD, read_json
from ingine.errors import ConfigError

_KEY = "header_sha256"


def write_record(folder: Path, header_sha256: Sequence[str]) -> None:
    """Of all of a model's files, in order."""
    (folder / GGUF_RECORD).write_text(json.dumps({_KEY: list(header_sha256)}) + "\n", encoding="utf-8")


def check_record(folder: Path, paths: Sequence[Path], header_sha256: Sequence[str]) -> None:
    """Raises ConfigError unless `folder` was made of files with the headers that `paths` have now. A folder
    without a record is somebody else's, and can be anything.
    """
    if not (folder / GGUF_RECORD).exists():
        return
    recorded = read_json(folder / GGUF_RECORD).get(_KEY)
    if not isinstance(recorded, list) or len(recorded) != len(paths):
        raise ConfigError(f"{folder / GGUF_RECORD} is damaged: ingine pull makes the folder of a GGUF file")
    for path, then, now in zip(paths, recorded, header_sha256, strict=True):
        if then != now:
            raise ConfigError(
                f"{path.resolve()} is another file than {folder} was made of: name the file instead of the "
                "folder, or the folder that ingine pull prints for it now"
            )
