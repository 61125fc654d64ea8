"""Opens files that are compressed, by their suffix: `.gz` and `.zst`."""

import gzip
import zlib
from pathlib import Path
from typing import BinaryIO

from ingine.errors import ConfigError

try:
    from compression import zstd  # Python 3.14
except ImportError:
    zstd = None

SUFFIXES = (".gz", ".zst")
READ_ERRORS = (OSError, EOFError, zlib.error, *([zstd.ZstdError] if zstd else []))
"""What reading a damaged or truncated file raises."""


def is_compressed(path: Path) -> bool:
    """Return True for a name of a compressed file. Raises ConfigError if this Python lacks its format."""
    if path.suffix == ".zst" and zstd is None:
        raise ConfigError(
            f"{path}: zstd needs Python 3.14 or later. Use gzip (.gz), or a pipe: "
            "`zstd -dc IN.zst | ingine batch - -o OUT.jsonl`"
        )
    return path.suffix in SUFFIXES


def open_file(path: Path, mode: str = "rb") -> BinaryIO:
    """Open a file, compressed or not, in mode `rb` or `wb`. Raises ConfigError like `is_compressed`."""
    if not is_compressed(path):
        return path.open(mode)
    return (gzip if path.suffix == ".gz" else zstd).open(path, mode)
