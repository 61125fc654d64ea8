"""Reads untrusted files: only regular files, and only within limits on size and depth.

A model may come from anyone. If its folder had a FIFO or a device in place of a file, reading it would block
forever; a file of many gigabytes, or JSON nested a million levels deep, would fill the memory. Imports
nothing heavy.
"""

import json
import os
import stat
from pathlib import Path
from typing import Any, BinaryIO

from ingine.errors import ConfigError

MAX_JSON_BYTES = 16 << 20
"""An index of 100,000 tensors is 10 MiB."""
MAX_JSON_VALUES = 1_000_000
"""Each value becomes a Python object of up to 200 bytes, while `{}` takes 2 bytes in the file."""
MAX_JSON_DEPTH = 32


def open_regular(path: Path) -> BinaryIO:
    """Open a regular file, or a link to one, for reading. Raises ConfigError that names any other path."""
    try:
        # Check before opening, since opening a device may have an effect, and after, since the file may have
        # been replaced. Without O_NONBLOCK opening a FIFO would wait for its writer.
        if stat.S_ISREG(os.stat(path).st_mode):
            file = os.fdopen(os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK), "rb")
            if stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                return file
            file.close()
    except FileNotFoundError:
        link = f", a link to {os.readlink(path)}," if path.is_symlink() else ""
        raise ConfigError(f"{path}{link} does not exist") from None
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        raise ConfigError(f"{path} cannot be read: {error}") from error
    raise ConfigError(f"{path} cannot be read: it is no regular file")


def read_bytes(path: Path, max_bytes: int) -> bytes:
    """Read the whole file. Raises ConfigError that names it if it has more than `max_bytes`."""
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > max_bytes:
            raise ConfigError(f"{path} cannot be read: it has {size} bytes, and {max_bytes} are the limit")
        try:
            return file.read(size)
        except OSError as error:
            raise ConfigError(f"{path} cannot be read: {error}") from error


def read_text(path: Path, max_bytes: int) -> str:
    """Read the whole file as UTF-8. Raises ConfigError as `read_bytes` does, and for other encodings."""
    try:
        return read_bytes(path, max_bytes).decode("utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} cannot be read: {error}") from error


def read_json_object(path: Path, max_bytes: int = MAX_JSON_BYTES) -> dict[str, Any]:
    """Read a JSON object. Raises ConfigError that names the file for other content or beyond the limits."""
    try:
        content = parse_json(read_bytes(path, max_bytes))
    except ValueError as error:
        raise ConfigError(f"{path} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path} holds no JSON object")
    return content


def parse_json(raw: bytes) -> Any:
    """Parse JSON. Raises ValueError if it is invalid, has too many values or is nested too deep."""
    check_number_of_values(raw, MAX_JSON_VALUES)
    try:
        content = json.loads(raw.decode("utf-8"))
    except RecursionError:
        raise ValueError("it is nested too deep") from None
    _check_depth(content)
    return content


def check_number_of_values(raw: bytes, limit: int) -> None:
    """Raise ValueError for JSON with more than `limit` values. Commas and brackets in strings count too."""
    if sum(map(raw.count, (b",", b"[", b"{"))) > limit:
        raise ValueError(f"it has more than {limit} values")


def _check_depth(content: Any) -> None:
    """Raise ValueError for deep nesting, without recursion: deep JSON can be parsed, but breaks code that
    walks it recursively.
    """
    level = [[content]]
    for _ in range(MAX_JSON_DEPTH + 1):
        groups = (each.values() if isinstance(each, dict) else each for each in level)
        level = [child for group in groups for child in group if isinstance(child, dict | list)]
        if not level:
            return
    raise ValueError(f"it is nested deeper than {MAX_JSON_DEPTH}")
