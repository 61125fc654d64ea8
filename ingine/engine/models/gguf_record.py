"""Records the digests of the headers of the GGUF files that a linked folder was made of.

config.json and the tokenizer were made from these headers. A file that replaces one of them may have another
header, which does not fit the rest of the folder.
"""

import json
from collections.abc import Sequence
from pathlib import Path

from ingine.engine.files.model_files import GGUF_RECORD, read_json
from ingine.errors import ConfigError

_KEY = "header_sha256"


def write_record(folder: Path, header_sha256: Sequence[str]) -> None:
    """Write the digests of the headers of all of a model's files, in order."""
    (folder / GGUF_RECORD).write_text(json.dumps({_KEY: list(header_sha256)}) + "\n", encoding="utf-8")


def check_record(folder: Path, paths: Sequence[Path], header_sha256: Sequence[str]) -> None:
    """Raise ConfigError unless `folder` was made of files with the same headers as `paths` have now. A folder
    without a record was not made by `link_gguf` and is not checked.
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
