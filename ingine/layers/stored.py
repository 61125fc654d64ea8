"""Matrices as checkpoints hold them quantised, for a WeightFormat to multiply without making them dense."""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import gguf
import torch
from torch import Tensor

from ingine.layers.int8 import rotate


class StoredMatrix(ABC):
    """A weight [out_features, in_features] in fewer bits than its numbers have."""

    shape: tuple[int, int]
    rotation: int = 1
    """How many numbers of a row are mixed with each other (`ingine.layers.int8`) in what is stored: 1, 4, 16
    or 64."""

    @property
    @abstractmethod
    def name(self) -> str:
        """Of the kind of storage, such as "q4_k", for the log and for messages."""

    @abstractmethod
    def dense(self) -> Tensor:
        """float32 of `shape`: the numbers that are stored. The yardstick of every product with them."""


@dataclass(frozen=True, slots=True)
class GGUFMatrix(StoredMatrix):
    """Blocks of GGUF, row after row, as they lie in the file."""

    shape: tuple[int, int]
    kind: gguf.GGMLQuantizationType
    data: Tensor
    """uint8 [out_features, bytes of a row]; of a file that is mapped into memory, as a rule."""
    row_order: Tensor | None = None
    """int64 [out_features]: row i of the matrix is row `row_order[i]` of `data`. None: as they lie."""

    @property
    def name(self) -> str:
        return self.kind.name.lower()

    def dense(self) -> Tensor:
        rows = self.data if self.row_order is None else self.data[self.row_order]
        return torch.from_numpy(gguf.dequantize(rows.numpy(), self.kind))


@dataclass(frozen=True, slots=True)
class Int4Matrix(StoredMatrix):
    """(code - zero) * scale with codes 0 to 15, a scale and a zero for each group of columns.

    With a `rotation` these are the rotated numbers, and `dense` turns them back.
    """

    shape: tuple[int, int]
    codes: Tensor
    """uint8 [out_features, in_features / 2]: even columns are the low four bits."""
    scales: Tensor
    """float16 [out_features, in_features / group_size]."""
    zeros: Tensor
    """As `scales`; need not be whole."""
    rotation: int = 1

    @property
    def group_size(self) -> int:
        return self.shape[1] // self.scales.shape[1]

    @property
    def name(self) -> str:
        return f"int4-g{self.group_size}"

    def dense(self) -> Tensor:
        codes = torch.stack((self.codes & 15, self.codes >> 4), dim=2).float()
        groups = codes.view(*self.scales.shape, self.group_size)
        numbers = (groups - self.zeros.float()[..., None]) * self.scales.float()[..., None]
        return rotate(numbers.view(self.shape), self.rotation)
