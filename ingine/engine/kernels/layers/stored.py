"""Quantised matrices of checkpoints, for a WeightFormat to multiply without making them dense."""

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace

import gguf
import torch
from torch import Tensor

ROWS_A_PART = 1024
"""Number of rows that are float32 at a time while a matrix is made dense."""

GGUF_KINDS = frozenset(
    gguf.GGMLQuantizationType[name] for name in ("Q8_0", "Q4_0", "Q4_1", "Q4_K", "Q5_K", "Q6_K")
)
"""The types that have kernels; `native/src/blocks.cpp` has their numbers too. Other types are dequantised
while they are read, if the gguf package can."""

_ALL = slice(None)


class StoredMatrix(ABC):
    """A weight [out_features, in_features] in a quantised form."""

    shape: tuple[int, int]

    @property
    @abstractmethod
    def name(self) -> str:
        """Name of the storage format, such as "q4_k", for the log and for messages."""

    @abstractmethod
    def dense(self, rows: slice = _ALL) -> Tensor:
        """Return `rows` of the stored numbers in float32, which every product is compared with."""

    def copy_to(self, target: Tensor) -> Tensor:
        """Round the dense numbers to `target` [`shape`] and return it. Only a part is float32 at a time."""
        for start in range(0, self.shape[0], ROWS_A_PART):
            rows = slice(start, start + ROWS_A_PART)
            target[rows].copy_(self.dense(rows))
        return target

    def rounded(self, dtype: torch.dtype) -> Tensor:
        # `new_empty` allocates on this matrix's device.
        return self.copy_to(self.dense(slice(0, 1)).new_empty(self.shape, dtype=dtype))

    def part(self, dim: int, own: slice) -> "StoredMatrix":
        """Return the rows (dim 0) or columns (dim 1) `own`. Raises ValueError if they cannot be cut out."""
        raise ValueError(f"{self.name} cannot be cut")

    def to(self, device: torch.device) -> "StoredMatrix":
        """Return the matrix on `device`, or itself if the format is multiplied on the CPU only."""
        return self


@dataclass(frozen=True, slots=True)
class DenseMatrix(StoredMatrix):
    """A matrix that is not quantised, in a product with others that are."""

    weight: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        return tuple(self.weight.shape)

    @property
    def name(self) -> str:
        return "dense"

    def dense(self, rows: slice = _ALL) -> Tensor:
        return self.weight[rows].float()


@dataclass(frozen=True, slots=True)
class GGUFMatrix(StoredMatrix):
    """Blocks of GGUF, row by row, as in the file."""

    shape: tuple[int, int]
    kind: gguf.GGMLQuantizationType
    data: Tensor
    """uint8 [out_features, bytes of a row], usually in a file that is mapped into memory."""
    row_order: Tensor | None = None
    """int64 [out_features]: row i of the matrix is row `row_order[i]` of `data`. None: rows in order."""

    @property
    def name(self) -> str:
        return self.kind.name.lower()

    def dense(self, rows: slice = _ALL) -> Tensor:
        data = self.data[rows if self.row_order is None else self.row_order[rows]]
        return torch.from_numpy(gguf.dequantize(data.numpy(), self.kind))


@dataclass(frozen=True, slots=True)
class Int4Matrix(StoredMatrix):
    """Numbers (code - zero) * scale with codes 0 to 15, and a scale and a zero for each group of columns."""

    shape: tuple[int, int]
    codes: Tensor
    """uint8 [out_features, in_features / 2]: even columns are the low four bits."""
    scales: Tensor
    """float16 [out_features, in_features / group_size]."""
    zeros: Tensor
    """float16, of the shape of `scales`. A zero need not be a whole number."""

    @property
    def group_size(self) -> int:
        return self.shape[1] // self.scales.shape[1]

    @property
    def name(self) -> str:
        return f"int4-g{self.group_size}"

    def dense(self, rows: slice = _ALL) -> Tensor:
        codes, scales, zeros = self.codes[rows], self.scales[rows].float(), self.zeros[rows].float()
        groups = torch.stack((codes & 15, codes >> 4), dim=2).float().view(*scales.shape, self.group_size)
        numbers = (groups - zeros[..., None]) * scales[..., None]
        return numbers.view(-1, self.shape[1])

    def part(self, dim: int, own: slice) -> "Int4Matrix":
        if dim == 0:
            codes, scales, zeros = self.codes[own], self.scales[own], self.zeros[own]
        else:
            _whole(own, 2, "columns that lie in a byte together, each")
            one_group = self.scales.shape[1] == 1
            groups = slice(0, 1) if one_group else _whole(own, self.group_size, "groups of columns")
            codes = self.codes[:, own.start // 2 : own.stop // 2]
            scales, zeros = self.scales[:, groups], self.zeros[:, groups]
        shape = (len(codes), codes.shape[1] * 2)
        codes, scales, zeros = (one.contiguous() for one in (codes, scales, zeros))
        return replace(self, shape=shape, codes=codes, scales=scales, zeros=zeros)

    def to(self, device: torch.device) -> "Int4Matrix":
        codes, scales, zeros = (one.to(device) for one in (self.codes, self.scales, self.zeros))
        return replace(self, codes=codes, scales=scales, zeros=zeros)


@dataclass(frozen=True, slots=True)
class ScaledMatrix(StoredMatrix):
    """Numbers of 8 bits times a scale for each block of rows and columns."""

    shape: tuple[int, int]
    numbers: Tensor
    """int8 or float8_e4m3fn of `shape`."""
    scales: Tensor
    """float32 [out_features / block rows, in_features / block columns], rounded up."""
    block: tuple[int, int]
    """Rows and columns of a block, at most those of `shape`. (1, in_features): a scale for each row."""
    int8_activations: bool = False
    """Whether the matrix is made for activations in int8 too, with a symmetric scale for each row."""

    @property
    def name(self) -> str:
        return "int8" if self.numbers.dtype == torch.int8 else "fp8"

    @property
    def is_by_row(self) -> bool:
        return self.block == (1, self.shape[1])

    def dense(self, rows: slice = _ALL) -> Tensor:
        num_rows, columns = self.shape
        scales = self.scales[torch.arange(num_rows, device=self.scales.device)[rows] // self.block[0]]
        if scales.shape[1] > 1:
            scales = scales.repeat_interleave(self.block[1], dim=1)[:, :columns]
        return self.numbers[rows].float().mul_(scales)

    def part(self, dim: int, own: slice) -> "ScaledMatrix":
        size = own.stop - own.start
        shape = (size, self.shape[1]) if dim == 0 else (self.shape[0], size)
        block = min(self.block[0], shape[0]), min(self.block[1], shape[1])
        one_block = self.scales.shape[dim] == 1
        blocks = slice(0, 1) if one_block else _whole(own, self.block[dim], "blocks", self.shape[dim])
        numbers = self.numbers[own] if dim == 0 else self.numbers[:, own]
        scales = self.scales[blocks] if dim == 0 else self.scales[:, blocks]
        return replace(
            self, shape=shape, numbers=numbers.contiguous(), scales=scales.contiguous(), block=block
        )

    def to(self, device: torch.device) -> "ScaledMatrix":
        return replace(self, numbers=self.numbers.to(device), scales=self.scales.to(device))


@dataclass(frozen=True, slots=True)
class ReorderedMatrix(StoredMatrix):
    """A matrix whose columns are stored in another order, in which the columns of a group are neighbours."""

    matrix: Int4Matrix
    column_order: Tensor
    """int64 [in_features]: column i of `matrix` is column `column_order[i]` of this one."""

    @property
    def shape(self) -> tuple[int, int]:
        return self.matrix.shape

    @property
    def name(self) -> str:
        return f"{self.matrix.name}, reordered"

    def dense(self, rows: slice = _ALL) -> Tensor:
        ordered = self.matrix.dense(rows)
        return torch.empty_like(ordered).index_copy_(1, self.column_order, ordered)

    def part(self, dim: int, own: slice) -> "ReorderedMatrix":
        if dim == 1:
            raise ValueError("the columns of a group do not lie side by side (desc_act)")
        return ReorderedMatrix(self.matrix.part(0, own), self.column_order)

    def to(self, device: torch.device) -> "ReorderedMatrix":
        return ReorderedMatrix(self.matrix.to(device), self.column_order.to(device))


def _whole(own: slice, size: int, what: str, end: int | None = None) -> slice:
    """Return which parts of `size` make up `own`. The last part, which ends at `end`, may be shorter."""
    if own.start % size or (own.stop % size and own.stop != end):
        raise ValueError(f"{own.start} to {own.stop} divides {what} of {size}")
    return slice(own.start // size, -(-own.stop // size))
