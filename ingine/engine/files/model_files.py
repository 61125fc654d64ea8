"""Names and limits of the files that a model is made of. Imports nothing heavy."""

import re
from pathlib import Path
from typing import Any

from ingine.engine.files.bounded_files import (
    MAX_JSON_BYTES,
    check_number_of_values,
    read_bytes,
    read_json_object,
)
from ingine.errors import ConfigError

WEIGHTS, WEIGHTS_INDEX = "model.safetensors", "model.safetensors.index.json"
GGUF_STEM = "model"
"""Stem of the names of GGUF files that are the weights of a folder."""
GGUF_RECORD = "gguf.json"
"""File in a folder of links to GGUF files that records their headers (`models/gguf_record.py`)."""
_SHARD = re.compile(r"[^/\\\0]{1,200}\.safetensors")
_GGUF_PART = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf")

MAX_TOKENIZER_BYTES = 64 << 20
"""Limit for each file of a tokenizer. The largest known files have half of it."""
MAX_TOKENIZER_VALUES = 8_000_000
"""Limit for a tokenizer's JSON: a vocabulary of 262,144 tokens with its merges has 2,000,000."""
MAX_TEMPLATE_BYTES = 1 << 20
_MAX_BYTES = {"config.json": 1 << 20, "generation_config.json": 1 << 20}


def read_json(path: Path) -> dict[str, Any]:
    """Read one of a model's JSON files. Raises ConfigError if it is missing or not a JSON object."""
    return read_json_object(path, _MAX_BYTES.get(path.name, MAX_JSON_BYTES))


def read_tokenizer_bytes(path: Path) -> bytes:
    """Read one of a tokenizer's files, for a library to parse. Raises ConfigError."""
    content = read_bytes(path, MAX_TOKENIZER_BYTES)
    if path.suffix == ".json":
        try:
            check_number_of_values(content, MAX_TOKENIZER_VALUES)
        except ValueError as error:
            raise ConfigError(f"{path} cannot be read: {error}") from None
    return content


def weight_files(folder: Path) -> list[Path]:
    """Return the safetensors files with the model's weights, sorted by name. Raises ConfigError."""
    if (folder / WEIGHTS).exists() or not (folder / WEIGHTS_INDEX).exists():  # in transformers' order
        files = [folder / WEIGHTS]
    else:
        weight_map = read_json(folder / WEIGHTS_INDEX).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise ConfigError(f"{folder / WEIGHTS_INDEX} has no weight_map")
        for name in weight_map.values():
            if not isinstance(name, str) or not _SHARD.fullmatch(
                name
            ):  # the name must not lead out of the folder
                raise ConfigError(
                    f"{folder / WEIGHTS_INDEX}: weight_map names {name!r:.100}, no *.safetensors in it"
                )
        files = [folder / name for name in sorted(set(weight_map.values()))]
    for file in files:
        if not file.exists():
            raise ConfigError(f"{file} does not exist: {_instead(folder)}")
    return files


def _instead(folder: Path) -> str:
    if any(folder.glob("*.safetensors")):
        return "not all of the model's safetensors are here"
    pickled = sorted(path.name for path in folder.glob("pytorch_model*.bin"))
    model, file = (folder, pickled[0]) if pickled else ("MODEL", "a pytorch_model.bin")
    return (
        f"there are no safetensors here. Other formats, as {file}, are not loaded, since they may hold code. "
        'This converts them: python -c "from transformers import AutoModelForCausalLM, AutoTokenizer; '
        f"[each.from_pretrained('{model}').save_pretrained('NEW_FOLDER') "
        'for each in (AutoModelForCausalLM, AutoTokenizer)]"'
    )


def gguf_weights(folder: Path) -> Path | None:
    """Return the GGUF file, or the first of several, with the weights of `folder`; None if it has none.

    If there are safetensors too, the result is None: config.json and the tokenizer belong to these, and a
    GGUF file beside them may be of any model.
    """
    if (folder / WEIGHTS_INDEX).exists() or any(folder.glob("*.safetensors")):
        return None
    if (path := folder / f"{GGUF_STEM}.gguf").is_file() or path.is_symlink():
        return path
    return next(iter(sorted(folder.glob(f"{GGUF_STEM}-00001-of-?????.gguf"))), None)


def gguf_links(folder: Path, path: Path) -> list[Path]:
    """Return the paths of the files of `gguf_parts(path)` as the weights of `folder`."""
    parts = gguf_parts(path)
    if not (name := _GGUF_PART.fullmatch(path.name)):
        return [folder / f"{GGUF_STEM}.gguf"]
    return [folder / f"{GGUF_STEM}{part.name.removeprefix(name[1])}" for part in parts]


def gguf_parts(path: Path) -> list[Path]:
    """Return all files, in order, of the GGUF model that `path` is part of, by llama.cpp's naming scheme.

    Raises ConfigError that names the first missing file.
    """
    if not (name := _GGUF_PART.fullmatch(path.name)):
        return [path]
    stem, count = name[1], int(name[3])
    if not 1 <= int(name[2]) <= count:
        raise ConfigError(f"{path}: there is no part {int(name[2])} of {count}")
    parts = [path.with_name(f"{stem}-{number:05}-of-{name[3]}.gguf") for number in range(1, count + 1)]
    for part in parts:
        if not part.is_file():
            raise ConfigError(f"{part} is missing: the model {stem} has {count} parts, all in one folder")
    return parts
