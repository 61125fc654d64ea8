"""Reading files that anybody may have made: only regular files, no longer and no deeper than they may be.

A model comes from anywhere. Where its folder has a FIFO or a device in place of a file, reading that would
wait for ever; a file of many gigabytes, or JSON nested a million deep, would fill the memory. Imports nothing
heavy.
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
"""Each becomes an object of Python, which takes up to 200 bytes, where `{}` in the file has 2."""
MAX_JSON_DEPTH = 32


def open_regular(path: Path) -> BinaryIO:
    """Open a regular file, or a link to one, for reading. For anything else, ConfigError that names it."""
    try:
        # Asked before, since opening a device may do something, and after, since it may have been exchanged.
        # Without O_NONBLOCK a FIFO would wait for its writer.
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
    """The whole file. Raises ConfigError that names it if it has more than `max_bytes`."""
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > max_bytes:
            raise ConfigError(f"{path} cannot be read: it has {size} bytes, and {max_bytes} are the limit")
        try:
            return file.read(size)
        except OSError as error:
            raise ConfigError(f"{path} cannot be read: {error}") from error


def read_text(path: Path, max_bytes: int) -> str:
    """As `read_bytes`, decoded from UTF-8."""
    try:
        return read_bytes(path, max_bytes).decode("utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} cannot be read: {error}") from error


def read_json_object(path: Path, max_bytes: int = MAX_JSON_BYTES) -> dict[str, Any]:
    """Raises ConfigError that names the file for anything but a JSON object within the bounds."""
    try:
        content = parse_json(read_bytes(path, max_bytes))
    except ValueError as error:
        raise ConfigError(f"{path} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path} holds no JSON object")
    return content


def parse_json(raw: bytes) -> Any:
    """Raises ValueError for what is no JSON, or has more values or a greater depth than it may."""
    check_number_of_values(raw, MAX_JSON_VALUES)
    try:
        content = json.loads(raw.decode("utf-8"))
    except RecursionError:
        raise ValueError("it is nested too deep") from None
    _check_depth(content)
    return content


def check_number_of_values(raw: bytes, limit: int) -> None:
    """Raises ValueError for JSON that has more. Commas and brackets in strings count too: they are few."""
    if sum(map(raw.count, (b",", b"[", b"{"))) > limit:
        raise ValueError(f"it has more than {limit} values")


def _check_depth(content: Any) -> None:
    """Without recursion. What is deeper may be parsed, and then break whoever walks through it."""
    level = [[content]]
    for _ in range(MAX_JSON_DEPTH + 1):
        groups = (each.values() if isinstance(each, dict) else each for each in level)
        level = [child for group in groups for child in group if isinstance(child, dict | list)]
        if not level:
            return
    raise ValueError(f"it is nested deeper than {MAX_JSON_DEPTH}")
