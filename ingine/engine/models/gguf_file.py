"""The metadata and tensors of a GGUF model, which is one file or several.

Names and layouts: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import math
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from ingine.engine.files.model_files import gguf_parts
from ingine.engine.models.gguf_header import GGUFTensor, read_gguf_header
from ingine.errors import ConfigError, UnsupportedModel


@dataclass(frozen=True)
class Family:
    architecture: str
    model_type: str
    permuted: bool
    """Whether llama.cpp reorders the rows of queries and keys, for a rotation that pairs neighbours."""


FAMILIES = {
    "llama": Family("LlamaForCausalLM", "llama", permuted=True),  # also most Mistral files
    "mistral": Family("MistralForCausalLM", "mistral", permuted=True),
    "qwen2": Family("Qwen2ForCausalLM", "qwen2", permuted=False),
    "qwen3": Family("Qwen3ForCausalLM", "qwen3", permuted=False),
}


@dataclass(frozen=True)
class GGUFFile:
    path: Path
    """The first file, which has the metadata."""
    metadata: dict[str, Any]
    tensors: dict[str, GGUFTensor]
    """The tensors of all files, by name."""
    arch: str
    """The architecture, with which the names of its metadata begin."""
    header_sha256: tuple[str, ...]
    """The SHA-256 of each file's header, in order."""

    @classmethod
    def open(cls, path: Path) -> "GGUFFile":
        """Open a model, of which `path` is any file. Raises ConfigError, UnsupportedModel."""
        paths = gguf_parts(path)
        parts = [read_gguf_header(part) for part in paths]
        tensors: dict[str, GGUFTensor] = {}
        for number, (part, header) in enumerate(zip(paths, parts, strict=True)):
            _check_split(part, header.metadata, number, len(parts))
            if twice := tensors.keys() & header.tensors.keys():
                raise ConfigError(f"{part}: {min(twice)} is in another part of the model too")
            tensors |= header.tensors
        metadata = parts[0].metadata
        arch = metadata.get("general.architecture")
        if not isinstance(arch, str) or arch not in FAMILIES:
            raise UnsupportedModel(
                f"unsupported GGUF architecture in {path}: {arch!r:.100}. "
                f"Those that work: {', '.join(FAMILIES)}"
            )
        return cls(paths[0], metadata, tensors, arch, tuple(header.sha256 for header in parts))

    def integer(self, key: str, default: int | None = None) -> int:
        """Return the integer `<arch>.<key>`. Raises ConfigError if it is missing and there is no default."""
        return self._own(key, int, default)

    def number(self, key: str, default: float | None = None) -> float:
        value = shortest_float(self._own(key, int | float, default))
        if not math.isfinite(value):
            raise ConfigError(f"{self.path}: {self.arch}.{key} is {value}")
        return value

    def text(self, key: str, default: str) -> str:
        return self._own(key, str, default)

    def _own(self, key: str, kind: Any, default: Any) -> Any:
        name = f"{self.arch}.{key}"
        if isinstance(self.metadata.get(name), list):
            raise UnsupportedModel(f"unsupported: {name} with a value for each layer")
        value = self.value(name, kind, default)
        if value is None:
            raise ConfigError(f"{self.path} lacks the metadata {name}")
        return value

    def value(self, name: str, kind: Any, default: Any = None) -> Any:
        """Return the metadata `name`, or the default. Raises ConfigError if its type is not `kind`."""
        value = self.metadata.get(name, default)
        if value is default or (isinstance(value, kind) and (kind is bool or not isinstance(value, bool))):
            return value
        raise ConfigError(f"{self.path}: {name} is {value!r:.100}")

    def values(self, name: str, kind: Any) -> list:
        """Return an array of metadata, empty if it is missing. Raises ConfigError as `value` does."""
        values = self.value(name, list, [])
        for number, value in enumerate(values):
            if not isinstance(value, kind):
                raise ConfigError(f"{self.path}: element {number} of {name} is {value!r:.100}")
        return values

    def token_id(self, role: str) -> int | None:
        """Return `tokenizer.ggml.<role>_token_id`, or None. Raises ConfigError for a wrong one."""
        key = f"tokenizer.ggml.{role}_token_id"
        token_id, num_tokens = self.value(key, int), len(self.tokens) or self.vocab_size
        if token_id is None or 0 <= token_id < num_tokens:
            return token_id
        raise ConfigError(f"{self.path}: {key} is {token_id!r}, and there are {num_tokens} tokens")

    @cached_property
    def tokens(self) -> list[str]:
        """The tokenizer's vocabulary by id; empty if the file has no tokenizer."""
        tokens = self.values("tokenizer.ggml.tokens", str)
        if len(tokens) > (rows := self.vocab_size):
            raise ConfigError(f"{self.path}: {len(tokens)} tokens, and an embedding of {rows} rows")
        return tokens

    @cached_property
    def token_types(self) -> list[int]:
        """The type of each token; empty if the file has none."""
        types = self.values("tokenizer.ggml.token_type", int)
        if types and len(types) != len(self.tokens):
            raise ConfigError(f"{self.path}: {len(types)} token types for {len(self.tokens)} tokens")
        return types

    @property
    def vocab_size(self) -> int:
        shape = self.tensor("token_embd.weight").shape
        if len(shape) != 2:
            raise ConfigError(f"{self.path}: token_embd.weight is no matrix")
        return shape[1]

    def tensor(self, name: str) -> GGUFTensor:
        if name not in self.tensors:
            raise ConfigError(f"{self.path} lacks the tensor {name}")
        return self.tensors[name]

    def dequantized(self, name: str) -> np.ndarray:
        """Return the tensor in float32, which holds every GGUF type except float64 without rounding."""
        tensor = self.tensor(name)
        try:
            return gguf.dequantize(tensor.read(), tensor.tensor_type)
        except NotImplementedError:
            raise UnsupportedModel(f"unsupported quantisation: {tensor.tensor_type.name}") from None


def shortest_float(value: float) -> float:
    """Return the number with the fewest digits that has the same float32: 0.7, not 0.699999988079071. A
    number that is no float32, and so was stored in 64 bits, stays as it is.
    """
    with np.errstate(over="ignore"):
        stored = np.float32(value)
    return float(str(stored)) if float(stored) == value else float(value)


def _check_split(path: Path, metadata: dict[str, Any], number: int, count: int) -> None:
    """Compare the metadata of a part, which count from 0, with its file's name, which counts from 1."""
    says_number, says_count = metadata.get("split.no", 0), metadata.get("split.count", 0) or 1
    if not isinstance(says_number, int) or not isinstance(says_count, int):
        raise ConfigError(f"{path}: split.no is {says_number!r:.100}, split.count is {says_count!r:.100}")
    if (says_number, says_count) == (number, count):
        return
    says = f"part {says_number + 1} of {says_count}"
    if count == 1:
        name = f"-{says_number + 1:05}-of-{says_count:05}.gguf"
        raise ConfigError(f"{path} is {says} of a model: its name has to end in {name}, the others beside it")
    raise ConfigError(f"{path}: the file says that it is {says}, its name says otherwise")
