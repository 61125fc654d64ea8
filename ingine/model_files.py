"""Which files a model is made of, for all that read them. Imports nothing heavy."""

import json
import re
from pathlib import Path
from typing import Any

from ingine.errors import ConfigError

WEIGHTS, WEIGHTS_INDEX = "model.safetensors", "model.safetensors.index.json"
_GGUF_PART = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf")


def read_json(path: Path) -> dict[str, Any]:
    """Raises ConfigError where there is no such file, or something else than a JSON object in it."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path} does not exist") from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path} holds no JSON object")
    return content


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files that hold the model's weights, sorted by name. Raises ConfigError."""
    if (folder / WEIGHTS).exists() or not (folder / WEIGHTS_INDEX).exists():  # in transformers' order
        files = [folder / WEIGHTS]
    else:
        weight_map = read_json(folder / WEIGHTS_INDEX).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise ConfigError(f"{folder / WEIGHTS_INDEX} has no weight_map")
        if not all(isinstance(name, str) for name in weight_map.values()):
            raise ConfigError(f"{folder / WEIGHTS_INDEX}: weight_map names a file that is no string")
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


def gguf_parts(path: Path) -> list[Path]:
    """All files of the GGUF model that `path` is one of, in order, by the name that llama.cpp gives them.

    Raises ConfigError that names the first one that is missing.
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
