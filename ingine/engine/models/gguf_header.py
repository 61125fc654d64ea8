"""Reads the header of a GGUF file within limits: its metadata, and the positions of its tensors.

No number in the file is trusted for an allocation: the data that it counts or measures must be in the file.
The format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import hashlib
import math
import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import gguf
import numpy as np

from ingine.engine.files.bounded_files import open_regular
from ingine.errors import ConfigError

MAX_HEADER_BYTES = 64 << 20
"""Four times the size of a vocabulary of 262,144 tokens with its merges."""
MAX_ELEMENTS = 4 << 20
"""Limit for the elements of all arrays of the metadata together: each becomes a Python object."""
MAX_KEYS, MAX_TENSORS = 4096, 1 << 16
MAX_NAME_BYTES = 1024
MAX_DIMENSIONS = 4
DEFAULT_ALIGNMENT = 32

_STRING, _ARRAY, _BOOL = 8, 9, 7
_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", _BOOL: "B", 10: "Q", 11: "q", 12: "d"}
"""The format for `struct` of each type of number."""


@dataclass(frozen=True)
class GGUFTensor:
    path: Path
    shape: tuple[int, ...]
    """The fastest-varying dimension first, as in the file."""
    tensor_type: gguf.GGMLQuantizationType
    begin: int
    """Offset in bytes from the beginning of the file."""
    num_bytes: int
    version: tuple[int, ...]
    """The `file_version` of the file."""

    @property
    def num_elements(self) -> int:
        return math.prod(self.shape)

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """[..., bytes of a row]"""
        block, block_bytes = gguf.GGML_QUANT_SIZES[self.tensor_type]
        return *self.shape[:0:-1], self.shape[0] // block * block_bytes

    def read(self) -> np.ndarray:
        """Read the tensor's bytes, [`stored_shape`] uint8. Raises ConfigError, OSError."""
        with self._opened() as file:
            file.seek(self.begin)
            content = file.read(self.num_bytes)
        if len(content) < self.num_bytes:
            raise OSError(f"{self.path} has become shorter")
        return np.frombuffer(content, np.uint8).reshape(self.stored_shape)

    def mapped(self) -> np.ndarray:
        """Map the tensor's bytes into memory, [`stored_shape`] uint8, read-only. A page is read when it is
        first used, and may be dropped when memory is scarce. Raises ConfigError.
        """
        with self._opened() as file:
            try:
                return np.memmap(file, np.uint8, "r", self.begin, self.stored_shape)
            except (
                OSError,
                ValueError,
            ) as error:  # a limit of the process, or a file system without mappings
                raise ConfigError(f"{self.path} cannot be mapped into memory: {error}") from error

    def _opened(self) -> BinaryIO:
        file = open_regular(self.path)
        if file_version(file) != self.version:
            file.close()
            raise ConfigError(f"{self.path} was exchanged or changed while it was read")
        return file


def file_version(file: BinaryIO) -> tuple[int, ...]:
    """Return numbers that change when the file is written, or when another file takes its name."""
    stat = os.fstat(file.fileno())
    return stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns


class GGUFHeader(NamedTuple):
    metadata: dict[str, Any]
    tensors: dict[str, GGUFTensor]
    """The tensors by name."""
    sha256: str
    """The digest of all bytes of the header."""


def read_gguf_header(path: Path) -> GGUFHeader:
    """Read the header of a GGUF file. Raises ConfigError that names the file and the fault."""
    with open_regular(path) as file:
        try:
            header = _Header(file, path)
            return GGUFHeader(header.metadata, header.tensors, header.digest.hexdigest())
        except (OSError, ValueError) as error:
            raise ConfigError(f"{path} is damaged or not a GGUF file: {error}") from error


class _Header:
    """Parses a header. Every method raises ValueError that says what is wrong."""

    def __init__(self, file: BinaryIO, path: Path):
        self._file, self._path = file, path
        self._version = file_version(file)
        self._file_bytes = os.fstat(file.fileno()).st_size
        self._position = self._num_elements = 0
        self.digest = hashlib.sha256()
        if self._take(4, "its first bytes") != b"GGUF":
            raise ValueError("it does not begin with GGUF")
        if (version := self._number("I", "its version")) not in (2, 3):
            raise ValueError(f"its version is {version} (2 and 3 can be read)")
        num_tensors = self._count("Q", MAX_TENSORS, "tensors")
        num_keys = self._count("Q", MAX_KEYS, "keys")
        self.metadata: dict[str, Any] = {}
        for _ in range(num_keys):
            key = self._name("a key")
            _refuse_twice(key, self.metadata)
            self.metadata[key] = self._value(self._number("I", key), key)
        described = {}
        for _ in range(num_tensors):
            name = self._name("the name of a tensor")
            _refuse_twice(name, described)
            described[name] = self._described(name)
        self.tensors = self._placed(described)

    def _take(self, size: int, what: str) -> bytes:
        if size > MAX_HEADER_BYTES - self._position:
            raise ValueError(f"{what} goes beyond the {MAX_HEADER_BYTES} bytes that a header may have")
        # Check first, since `read` allocates all that it is asked for.
        if size > self._file_bytes - self._position or len(taken := self._file.read(size)) < size:
            raise ValueError(f"it ends within {what}")
        self._position += size
        self.digest.update(taken)
        return taken

    def _number(self, kind: str, what: str) -> Any:
        return struct.unpack(f"<{kind}", self._take(struct.calcsize(f"<{kind}"), what))[0]

    def _count(self, kind: str, limit: int, what: str) -> int:
        if (count := self._number(kind, f"the number of {what}")) > limit:
            raise ValueError(f"it claims {count} {what}, and {limit} are the limit")
        return count

    def _name(self, what: str) -> str:
        return self._take(self._count("Q", MAX_NAME_BYTES, f"bytes of {what}"), what).decode("utf-8")

    def _value(self, kind: int, what: str) -> Any:
        if kind == _STRING:
            return self._take(self._number("Q", what), what).decode("utf-8")
        if kind == _BOOL:
            return _checked_bool(self._number(_NUMBERS[kind], what), what)
        if kind in _NUMBERS:
            return self._number(_NUMBERS[kind], what)
        if kind != _ARRAY:
            raise ValueError(f"{what} is of type {kind}, which there is not")
        return self._array(what)

    def _array(self, what: str) -> list:
        kind = self._number("I", what)
        count = self._count("Q", MAX_ELEMENTS - self._num_elements, f"elements of {what}")
        self._num_elements += count
        if kind == _STRING:
            return [self._value(_STRING, what) for _ in range(count)]
        if kind not in _NUMBERS:  # such as arrays of arrays, which no program writes
            raise ValueError(f"{what} is an array of type {kind}")
        form = f"<{count}{_NUMBERS[kind]}"
        values = list(struct.unpack(form, self._take(struct.calcsize(form), what)))
        return [_checked_bool(value, what) for value in values] if kind == _BOOL else values

    def _described(self, name: str) -> tuple[tuple[int, ...], gguf.GGMLQuantizationType, int, int]:
        """Read a tensor's shape, type, offset in the tensor data of the file, and number of bytes."""
        num_dimensions = self._count("I", MAX_DIMENSIONS, f"dimensions of {name}")
        shape = tuple(self._number("Q", name) for _ in range(num_dimensions))
        tensor_type = gguf.GGMLQuantizationType(self._number("I", name))
        offset = self._number("Q", name)
        if not shape:
            raise ValueError(f"{name} has no dimensions")
        if tensor_type not in gguf.GGML_QUANT_SIZES:
            raise ValueError(f"{name} is {tensor_type.name}, whose size is not known")
        block, block_bytes = gguf.GGML_QUANT_SIZES[tensor_type]
        if shape[0] % block:
            raise ValueError(f"{name} has rows of {shape[0]}, and {tensor_type.name} has blocks of {block}")
        return shape, tensor_type, offset, math.prod(shape) // block * block_bytes

    def _placed(self, described: dict[str, tuple]) -> dict[str, GGUFTensor]:
        """Return the tensors. Checks that each is completely in the file, and that no two overlap."""
        alignment = self.metadata.get("general.alignment", DEFAULT_ALIGNMENT)
        if not isinstance(alignment, int) or alignment <= 0 or alignment & (alignment - 1):
            raise ValueError(f"general.alignment is {alignment!r:.100}, and no power of two")
        start = -(-self._position // alignment) * alignment
        end, before = start, "the header"
        for name, (_, _, offset, num_bytes) in sorted(described.items(), key=lambda item: item[1][2:]):
            if offset % alignment:
                raise ValueError(f"{name} begins at {offset}, which is no multiple of {alignment}")
            if start + offset < end:
                raise ValueError(f"{name} begins within {before}")
            end, before = start + offset + num_bytes, name
            if end > self._file_bytes:
                raise ValueError(f"{name} ends at {end}, and the file at {self._file_bytes}")
        return {
            name: GGUFTensor(self._path, shape, tensor_type, start + offset, num_bytes, self._version)
            for name, (shape, tensor_type, offset, num_bytes) in described.items()
        }


def _checked_bool(value: int, what: str) -> bool:
    if value > 1:
        raise ValueError(f"{what} is {value}, and neither true nor false")
    return bool(value)


def _refuse_twice(name: str, known: dict[str, Any]) -> None:
    if name in known:
        raise ValueError(f"{name!r:.100} is there twice")
