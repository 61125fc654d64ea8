"""Computes a short name for the content of a model that decides which tokens it generates.

Workers that serve one queue compare it. So it must be the same on every machine for the same model, and
cheap: only a few kilobytes of each tensor are read. Imports neither torch nor transformers.
"""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from ingine.engine.files.bounded_files import open_regular, read_bytes
from ingine.engine.files.model_files import (
    MAX_TOKENIZER_BYTES,
    gguf_parts,
    gguf_weights,
    read_json,
    weight_files,
)
from ingine.engine.files.safetensors_header import damaged, read_header

SAMPLE_BYTES = 4096
"""Bytes that are read from the middle of each tensor: a fine-tune changes every matrix that it trains."""

VOLATILE_KEYS = frozenset(
    {
        *("transformers_version", "_name_or_path", "name_or_path", "_commit_hash", "_from_model_config"),
        *("dtype", "torch_dtype", "use_cache", "_attn_implementation", "_attn_implementation_autoset"),
        *("tokenizer_file", "is_local", "local_files_only", "backend"),
    }
)
"""Keys of config files that say who wrote them, where, or with which software, and the dtype: the types of
the stored weights count, and the dtype of the computation is a setting of the engine."""


def model_fingerprint(folder: Path) -> str:
    """Return 16 hex digits of the model's weights, config.json, generation_config.json and tokenizer.

    They do not depend on the folder's name, on how weights are distributed over files, or on `VOLATILE_KEYS`.
    Weights are sampled: two models that differ in a few numbers of a matrix may have the same fingerprint.
    Raises ConfigError that names a missing or damaged file.
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
        yield path.name, read_bytes(path, MAX_TOKENIZER_BYTES)
    if (gguf_path := gguf_weights(folder)) is not None:
        tensors = _gguf_tensors(folder, gguf_parts(gguf_path))
    else:
        tensors = [tensor for file in weight_files(folder) for tensor in _tensors(file)]
    yield from sorted(tensors)


def _stable_json(path: Path) -> bytes:
    content = {key: value for key, value in read_json(path).items() if key not in VOLATILE_KEYS}
    return json.dumps(content, sort_keys=True).encode()


def _tokenizer_files(folder: Path) -> list[Path]:
    """Return tokenizer.json, or else the files that transformers makes it from; and the chat templates."""
    names = ["tokenizer.json"]
    if not (folder / "tokenizer.json").exists():
        names = ["tokenizer.model", "vocab.json", "merges.txt", "added_tokens.json"]
    files = [folder / name for name in names] + sorted(folder.glob("chat_template*"))
    return [path for path in files if path.is_file()]


def _tensors(path: Path) -> Iterator[tuple[str, bytes]]:
    """Yield (name; type, shape and sample) of each tensor in a safetensors file."""
    header = read_header(path)
    with open_regular(path) as file:
        for name, tensor in header.items():
            sample = _sample(path, file, name, tensor.begin, tensor.end - tensor.begin)
            yield name, f"{tensor.dtype} {list(tensor.shape)} ".encode() + sample


def _gguf_tensors(folder: Path, paths: list[Path]) -> Iterator[tuple[str, bytes]]:
    """Yield (name; type, shape and sample) of each tensor in GGUF files."""
    from ingine.engine.models.gguf_header import read_gguf_header
    from ingine.engine.models.gguf_record import check_record

    headers = [read_gguf_header(path) for path in paths]
    check_record(folder, paths, [header.sha256 for header in headers])
    for path, header in zip(paths, headers, strict=True):
        with open_regular(path) as file:
            for name, tensor in header.tensors.items():
                sample = _sample(path, file, name, tensor.begin, tensor.num_bytes)
                yield name, f"{tensor.tensor_type.name} {list(tensor.shape)} ".encode() + sample


def _sample(path: Path, file: BinaryIO, name: str, begin: int, num_bytes: int) -> bytes:
    """Read up to SAMPLE_BYTES from the middle of a tensor."""
    size = min(num_bytes, SAMPLE_BYTES)
    try:
        file.seek(begin + (num_bytes - size) // 2)
        sample = file.read(size)
    except OSError as error:
        raise damaged(path, error) from error
    if len(sample) != size:
        raise damaged(path, f"the data of {name} are cut off")
    return sample
