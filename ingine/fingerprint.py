"""A short name for a model's content: what decides which tokens it generates.

Workers that serve one queue compare it. So it has to be the same on every machine for the same model, and
cheap: only a few kilobytes of each tensor are read. Imports neither torch nor transformers.
"""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from ingine.errors import ConfigError
from ingine.model_files import read_json, weight_files

SAMPLE_BYTES = 4096
"""How much is read of each tensor, from its middle: a fine-tune changes every matrix that it trains."""

VOLATILE_KEYS = frozenset(
    {
        *("transformers_version", "_name_or_path", "name_or_path", "_commit_hash", "_from_model_config"),
        *("dtype", "torch_dtype", "use_cache", "_attn_implementation", "_attn_implementation_autoset"),
        *("tokenizer_file", "is_local", "local_files_only", "backend"),
    }
)
"""Keys of config files that say by whom, where or with which software they were written. The weights' own
types count, and what they are computed in is a setting of the engine."""

_MAX_HEADER_BYTES = 100_000_000
"""As in the safetensors library."""


def model_fingerprint(folder: Path) -> str:
    """16 hex digits that depend on the model's weights, config.json, generation_config.json and tokenizer.

    They do not depend on the folder's name, on how the weights are spread over files, or on `VOLATILE_KEYS`.
    Weights are sampled, not read whole: two models that differ in a few numbers of a matrix may have the same
    fingerprint. Raises ConfigError that names the file which is missing or damaged.
    """
    digest = hashlib.sha256()
    for name, content in _parts(Path(folder)):
        digest.update(f"{name}\0{len(content)}\0".encode())  # no two lists of parts give the same bytes
        digest.update(content)
    return digest.hexdigest()[:16]


def _parts(folder: Path) -> Iterator[tuple[str, bytes]]:
    yield "config.json", _stable_json(folder / "config.json")
    for name in ("generation_config.json", "tokenizer_config.json", "special_tokens_map.json"):
        if (folder / name).exists():
            yield name, _stable_json(folder / name)
    for path in _tokenizer_files(folder):
        yield path.name, _bytes_of(path)
    tensors = [tensor for file in weight_files(folder) for tensor in _tensors(file)]
    yield from sorted(tensors)


def _stable_json(path: Path) -> bytes:
    content = {key: value for key, value in read_json(path).items() if key not in VOLATILE_KEYS}
    return json.dumps(content, sort_keys=True).encode()


def _tokenizer_files(folder: Path) -> list[Path]:
    """tokenizer.json, or what transformers makes one from; and chat templates."""
    names = ["tokenizer.json"]
    if not (folder / "tokenizer.json").exists():
        names = ["tokenizer.model", "vocab.json", "merges.txt", "added_tokens.json"]
    files = [folder / name for name in names] + sorted(folder.glob("chat_template*"))
    return [path for path in files if path.is_file()]


def _bytes_of(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error}") from error


def _tensors(path: Path) -> Iterator[tuple[str, bytes]]:
    """(name, type, shape and sample) of each tensor in a safetensors file."""
    try:
        with path.open("rb") as file:
            header, start = _read_header(file)
            for name, tensor in header.items():
                if name == "__metadata__":
                    continue
                begin, end = tensor["data_offsets"]
                if begin > end:
                    raise ValueError(f"the data of {name} end before they begin")
                size = min(end - begin, SAMPLE_BYTES)
                file.seek(start + begin + (end - begin - size) // 2)
                sample = file.read(size)
                if len(sample) != size:
                    raise ValueError(f"the data of {name} is cut off")
                yield name, f"{tensor['dtype']} {tensor['shape']} ".encode() + sample
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise ConfigError(f"{path} is damaged or not a safetensors file: {error}") from error


def _read_header(file: BinaryIO) -> tuple[dict[str, Any], int]:
    """The JSON that a safetensors file begins with, after its length in 8 bytes; and where it ends."""
    length = int.from_bytes(file.read(8), "little")
    if not 0 < length <= _MAX_HEADER_BYTES:
        raise ValueError(f"a header of {length} bytes")
    return json.loads(file.read(length)), 8 + length
