"""The tensors that a model's safetensors files hold, and whether its two vocabulary matrices are one."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from ingine.errors import ConfigError, UnsupportedModel
from ingine.model_files import weight_files

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
_FLOATS = ("F64", "F32", "F16", "BF16")
_ROWS_AT_ONCE = 4096


class Checkpoint:
    def __init__(self, folder: Path):
        """Reads the files' headers. Raises ConfigError that names the file at fault."""
        self.file_of: dict[str, Path] = {}
        """By tensor."""
        for path in weight_files(folder):
            with _opened(path) as file:
                names = [name for name in file.keys() if not _can_be_computed(name)]  # noqa: SIM118 (no mapping)
                for name in names:
                    if name in self.file_of:
                        raise ConfigError(f"{path}: {name} is in {self.file_of[name].name} too")
                    if (dtype := file.get_slice(name).get_dtype()) not in _FLOATS:
                        raise UnsupportedModel(
                            f"unsupported: {path} holds {name} in {dtype}; use weights that are not quantised"
                        )
                    self.file_of[name] = path

    def slices(self) -> Iterator[tuple[str, Any]]:
        """Every tensor as a slice of safetensors, which reads no more than it is asked for. File by file."""
        for path in dict.fromkeys(self.file_of.values()):
            with _opened(path) as file:
                for name, own in self.file_of.items():
                    if own == path:
                        yield name, file.get_slice(name)

    def has_a_head_of_its_own(self) -> bool:
        """Whether an output matrix is stored that is not the embedding once more.

        Then the model has two matrices, whatever config.json says, as in transformers.
        """
        if not {EMBEDDING, HEAD} <= self.file_of.keys():
            return False
        with _opened(self.file_of[EMBEDDING]) as one, _opened(self.file_of[HEAD]) as other:
            return not _equal(one.get_slice(EMBEDDING), other.get_slice(HEAD))


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise ConfigError(f"{path} is damaged or not a safetensors file: {error}") from error


def _can_be_computed(name: str) -> bool:
    """Old Llama checkpoints also store rotary frequencies, which follow from config.json."""
    return name.endswith("rotary_emb.inv_freq")


def _equal(one: Any, other: Any) -> bool:
    """Of two slices. Read in parts: a vocabulary's matrix may take a gigabyte."""
    shape = one.get_shape()
    if other.get_shape() != shape or other.get_dtype() != one.get_dtype():
        return False
    starts = range(0, shape[0], _ROWS_AT_ONCE)
    return all(torch.equal(one[i : i + _ROWS_AT_ONCE], other[i : i + _ROWS_AT_ONCE]) for i in starts)


def some(names: Iterable[str], limit: int = 5) -> str:
    """The first of `names`, for a message."""
    names = sorted(names)
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
