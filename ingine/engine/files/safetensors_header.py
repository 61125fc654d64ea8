"""Reads the header of a safetensors file, and checks it before anything of the stated sizes is allocated.

The format: https://github.com/huggingface/safetensors#format. Imports nothing heavy.
"""

import math
import os
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from ingine.engine.files.bounded_files import MAX_JSON_BYTES, open_regular, parse_json
from ingine.errors import ConfigError

_METADATA = "__metadata__"
_ITEM_BITS = {
    **dict.fromkeys(("F64", "I64", "U64", "C64"), 64),
    **dict.fromkeys(("F32", "I32", "U32"), 32),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 16),
    **dict.fromkeys(("BOOL", "I8", "U8", "F8_E4M3", "F8_E5M2", "F8_E8M0"), 8),
}
"""Bits of an item by type. The library checks other types, if they are read."""


class StoredTensor(NamedTuple):
    dtype: str
    """The name in the file, such as `BF16`."""
    shape: tuple[int, ...]
    begin: int
    """Offset in bytes from the beginning of the file."""
    end: int


def read_header(path: Path) -> dict[str, StoredTensor]:
    """Return the tensors by name. They are contiguous, do not overlap, and fill the file.

    Raises ConfigError that names the file and the tensor at fault.
    """
    with open_regular(path) as file:
        try:
            return _read(file, os.fstat(file.fileno()).st_size)
        except (OSError, ValueError) as error:
            raise damaged(path, error) from error


def damaged(path: Path, reason: object) -> ConfigError:
    return ConfigError(f"{path} is damaged or not a safetensors file: {reason}")


def _read(file: BinaryIO, file_bytes: int) -> dict[str, StoredTensor]:
    length = int.from_bytes(file.read(8), "little")
    if not 0 < length <= min(MAX_JSON_BYTES, file_bytes - 8):
        raise ValueError(f"a header of {length} bytes in a file of {file_bytes}")
    header, start = parse_json(file.read(length)), 8 + length
    if not isinstance(header, dict):
        raise ValueError(f"its header is a {type(header).__name__}")
    tensors = {name: _tensor(name, said, start) for name, said in header.items() if name != _METADATA}
    end = start
    for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].begin, item[1].end)):
        if tensor.begin != end:
            raise ValueError(f"the data of {name} begin at {tensor.begin}, those before end at {end}")
        end = tensor.end
        if end > file_bytes:
            raise ValueError(f"the data of {name} are cut off")
    if end != file_bytes:
        raise ValueError(f"its tensors end at {end}, the file at {file_bytes}")
    return tensors


def _tensor(name: str, said: Any, start: int) -> StoredTensor:
    """Check one entry. Raises ValueError that names the fault, also for a name that UTF-8 cannot encode."""
    name.encode()
    said = said if isinstance(said, dict) else {}
    offsets = said.get("data_offsets")
    if not _are_sizes(offsets) or len(offsets) != 2:
        raise ValueError(f"{name} has data_offsets {offsets!r:.100}")
    begin, end = offsets
    if begin > end:
        raise ValueError(f"the data of {name} end before they begin")
    dtype, shape = said.get("dtype"), said.get("shape")
    if not isinstance(dtype, str) or not _are_sizes(shape):
        raise ValueError(f"{name} has the dtype {dtype!r:.100} and the shape {shape!r:.100}")
    bits = _ITEM_BITS.get(dtype)
    if bits is not None and math.prod(shape) * bits != (end - begin) * 8:
        raise ValueError(f"{name} is {dtype} {shape!r:.100}, and has {end - begin} bytes")
    return StoredTensor(dtype, tuple(shape), start + begin, start + end)


def _are_sizes(value: Any) -> bool:
    """Return whether `value` is a short list of 64-bit sizes: other products might take too long."""
    return (
        isinstance(value, list)
        and len(value) <= 8
        and all(isinstance(size, int) and not isinstance(size, bool) and 0 <= size < 2**63 for size in value)
    )
