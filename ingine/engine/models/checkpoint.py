"""Reads the tensors of a model's files, and compares its two vocabulary matrices."""

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
    """Tensors by their Hugging Face names and in Hugging Face's layout, whatever the format of the files."""

    file_of: dict[str, Path]
    """The file of each tensor."""
    shape_of: dict[str, list[int]]

    @abstractmethod
    def read(self, name: str, *part: slice) -> Tensor:
        """Read a tensor, or a part of it, with one slice for each dimension."""

    def matrix(self, name: str) -> StoredMatrix | None:
        """Return a matrix that is stored quantised; None for one that is not."""
        return None

    @abstractmethod
    def has_a_head_of_its_own(self) -> bool:
        """Return whether the checkpoint has an output matrix that differs from the embedding.

        The model then has two matrices, whatever config.json says, as in transformers.
        """


class SafetensorsCheckpoint(Checkpoint):
    def __init__(self, folder: Path):
        """Read the files' headers. Raises ConfigError that names the file at fault."""
        self.shape_of = self._plain_shapes(self._read_headers(folder))

    def _read_headers(self, folder: Path) -> dict[str, StoredTensor]:
        """Return the headers of all tensors by name, and set `file_of`."""
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
        # The file is mapped only during the call, so pages that were read do not stay in the process.
        with opened(self.file_of[name]) as file:
            return file.get_slice(name)[part or slice(None)]

    def has_a_head_of_its_own(self) -> bool:
        if not {EMBEDDING, HEAD} <= self.file_of.keys():
            return False
        with opened(self.file_of[EMBEDDING]) as one, opened(self.file_of[HEAD]) as other:
            return not _equal(one.get_slice(EMBEDDING), other.get_slice(HEAD))


@contextmanager
def opened(path: Path) -> Iterator[Any]:
    """Open a safetensors file. Errors of the file within the block become a ConfigError that names it."""
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise damaged(path, error) from error


def _can_be_computed(name: str) -> bool:
    """Return whether config.json determines the tensor: old Llama checkpoints store rotary frequencies."""
    return name.endswith("rotary_emb.inv_freq")


def _equal(one: Any, other: Any) -> bool:
    """Compare two slices. They are read in parts: a vocabulary matrix may take a gigabyte."""
    shape = one.get_shape()
    if other.get_shape() != shape or other.get_dtype() != one.get_dtype():
        return False
    starts = range(0, shape[0], _ROWS_AT_ONCE)
    return all(torch.equal(one[i : i + _ROWS_AT_ONCE], other[i : i + _ROWS_AT_ONCE]) for i in starts)


def some(names: Iterable[str], limit: int = 5) -> str:
    """Return the first of `names`, and the number of others, for a message."""
    names = sorted(names)
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
