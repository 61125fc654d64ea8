"""The tensors that a model's files hold, and whether its two vocabulary matrices are one."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ingine.engine.files.model_files import weight_files
from ingine.engine.files.safetensors_header import StoredTensor, damaged, read_header
from ingine.engine.kernels.layers.stored import StoredMatrix
from ingine.errors import ConfigError, UnsupportedModel

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
_FLOATS = ("F64", "F32", "F16", "BF16")
_ROWS_AT_ONCE = 4096


class Checkpoint(ABC):
    """By their Hugging Face names and in Hugging Face's layout, whatever the files are."""

    file_of: dict[str, Path]
    """By tensor."""
    shape_of: dict[str, list[int]]

    @abstractmethod
    def read(self, name: str, *part: slice) -> Tensor:
        """A tensor, or the part of it, one slice a dimension, that is wanted."""

    def matrix(self, name: str) -> StoredMatrix | None:
        """One that is held quantised; None for one that is not."""
        return None

    @abstractmethod
    def has_a_head_of_its_own(self) -> bool:
        """Whether an output matrix is stored that is not the embedding once more.

        Then the model has two matrices, whatever config.json says, as in transformers.
        """


class SafetensorsCheckpoint(Checkpoint):
    def __init__(self, folder: Path):
        """Reads the files' headers. Raises ConfigError that names the file at fault."""
        self.shape_of = self._plain_shapes(self._read_headers(folder))

    def _read_headers(self, folder: Path) -> dict[str, StoredTensor]:
        """Of all tensors, by their names."""
        self.file_of, headers = {}, {}
        for path in weight_files(folder):
            for name, tensor in read_header(path).items():
                if _can_be_computed(name):
                    continue
                if name in self.file_of:
                    raise ConfigError(f"{path}: {name} is in {self.file_of[name].name} too")
                self.file_of[name], headers[name] = path, tensor
        return headers

    def _plain_shapes(self, headers: dict[str, StoredTensor]) -> dict[str, list[int]]:
        for name, tensor in headers.items():
            if tensor.dtype not in _FLOATS:
                raise UnsupportedModel(
                    f"unsupported: {self.file_of[name]} holds {name} in {tensor.dtype}; "
                    "use weights that are not quantised"
                )
        return {name: list(tensor.shape) for name, tensor in headers.items()}

    def read(self, name: str, *part: slice) -> Tensor:
        # The file is mapped for the call alone: pages which have been read do not stay in the process.
        with opened(self.file_of[name]) as file:
            return file.get_slice(name)[part or slice(None)]

    def has_a_head_of_its_own(self) -> bool:
        if not {EMBEDDING, HEAD} <= self.file_of.keys():
            return False
        with opened(self.file_of[EMBEDDING]) as one, opened(self.file_of[HEAD]) as other:
            return not _equal(one.get_slice(EMBEDDING), other.get_slice(HEAD))


@contextmanager
def opened(path: Path) -> Iterator[Any]:
    """A safetensors file; what goes wrong with it in the block is a ConfigError that names it."""
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise damaged(path, error) from error


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
