"""Weights on CUDA. Plain weights stay as they are; quantised ones are made dense one tile at a time."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from ingine.engine.kernels.layers.stored import Int4Matrix, ReorderedMatrix, ScaledMatrix, StoredMatrix
from ingine.engine.kernels.layers.weights import PlainWeights, Product
from ingine.engine.kernels.triton.stored_linear import stored_linear_kernel, sum_pieces_kernel

BLOCKS_K = (64, 32, 16)
"""Possible numbers of weights in a row of a tile. int4 has twice as many, in as many bytes."""

SPLIT_ROWS = 64
"""Up to this many rows of x, each piece of the columns has programs of its own."""

_PIECE = 2 * BLOCKS_K[0]
"""A number of columns that are whole tiles of every kind."""

_SUM_BLOCK = 1024

_TRITON_DTYPES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


class TritonWeights(PlainWeights):
    """Multiplies quantised weights by activations in bfloat16 or float16, also int8 and fp8 weights (W8A16).

    A matrix is made dense if activations are float32, which serves comparisons and has no tensor cores, or if
    no tile divides its groups.
    """

    name = "plain (triton where quantised)"

    def keeps(self, part: StoredMatrix, dtype: torch.dtype) -> bool:
        inner = part.matrix if isinstance(part, ReorderedMatrix) else part
        return dtype in _TRITON_DTYPES and _block_k(inner) is not None

    def pack_stored(self, parts: Sequence[StoredMatrix], bias: Tensor | None, dtype: torch.dtype) -> Product:
        """Return one product if all parts have one format, else join the results of a product for each."""
        if not any(self.keeps(part, dtype) for part in parts):
            return super().pack_stored(parts, bias, dtype)
        packed = [_pack(part, dtype) for part in parts]
        if None not in packed and len({(one.kind, one.group_size) for one in packed}) == 1:
            return _product(_merged(packed), bias)
        biases = [None] * len(parts) if bias is None else bias.split([part.shape[0] for part in parts])
        products = [self._product_of(part, own, dtype) for part, own in zip(parts, biases, strict=True)]
        return lambda x: torch.cat([product(x) for product in products], dim=1)

    def _product_of(self, part: StoredMatrix, bias: Tensor | None, dtype: torch.dtype) -> Product:
        if isinstance(part, ReorderedMatrix):
            product, order = self._product_of(part.matrix, bias, dtype), part.column_order
            return lambda x: product(x.index_select(1, order))
        packed = _pack(part, dtype)
        return self.pack(part.rounded(dtype), bias) if packed is None else _product(packed, bias)


@dataclass(frozen=True, slots=True)
class _Packed:
    """A matrix in the layout of `stored_linear_kernel`."""

    kind: str
    shape: tuple[int, int]
    group_size: int
    numbers: Tensor
    scales: Tensor
    """[n, groups]; the kernel reads its transpose."""
    zeros: Tensor | None
    block_k: int


def _pack(part: StoredMatrix, dtype: torch.dtype) -> _Packed | None:
    """Pack a matrix for x of `dtype`. Returns None if the kernel does not multiply it."""
    block_k = _block_k(part)
    if dtype not in _TRITON_DTYPES or block_k is None:
        return None
    if isinstance(part, Int4Matrix):
        tiles = _tiles(part.codes, block_k)
        return _Packed("int4", part.shape, part.group_size, tiles, part.scales, part.zeros, block_k)
    numbers = part.numbers if part.name == "int8" else part.numbers.view(torch.uint8)
    # Every row has a scale, also where a block has several rows: 3% more bytes for blocks of 128 by 128.
    scales = part.scales.repeat_interleave(part.block[0], dim=0)[: part.shape[0]]
    return _Packed(part.name, part.shape, part.block[1], numbers, scales, None, block_k)


def _block_k(part: StoredMatrix) -> int | None:
    """Return the largest tile in which each row has one scale; None if there is none."""
    if isinstance(part, Int4Matrix):
        group_size = part.group_size
    elif isinstance(part, ScaledMatrix):
        group_size = part.block[1]
    else:
        return None
    whole_row = group_size >= part.shape[1]
    return next((block for block in BLOCKS_K if whole_row or group_size % block == 0), None)


def _merged(packed: Sequence[_Packed]) -> _Packed:
    """Concatenate the rows of matrices of one kind."""
    first = packed[0]
    numbers, scales = (torch.cat([getattr(one, name) for one in packed]) for name in ("numbers", "scales"))
    zeros = None if first.zeros is None else torch.cat([one.zeros for one in packed])
    shape = sum(one.shape[0] for one in packed), first.shape[1]
    return _Packed(first.kind, shape, first.group_size, numbers, scales, zeros, first.block_k)


def _tiles(codes: Tensor, block_k: int) -> Tensor:
    """Return the codes of an Int4Matrix in the kernel's order, padded to whole tiles."""
    padded = F.pad(codes, (0, -codes.shape[1] % block_k))
    columns = torch.stack((padded & 15, padded >> 4), dim=2).view(len(codes), -1, 2, block_k)
    return (columns[:, :, 0] | columns[:, :, 1] << 4).flatten(1)


def _product(packed: _Packed, bias: Tensor | None) -> Product:
    (n, k), kind, group_size, numbers = packed.shape, packed.kind, packed.group_size, packed.numbers
    scales = packed.scales.t().contiguous()
    zeros = scales if packed.zeros is None else packed.zeros.t().contiguous()
    pieces = pieces_of(n, k)
    has_bias, bias_or_any = bias is not None, scales if bias is None else bias

    def product(x: Tensor) -> Tensor:
        num_rows = x.shape[0]
        out = x.new_empty((num_rows, n))
        split = num_rows <= SPLIT_ROWS and pieces.number > 1
        target = out
        if split:
            target = torch.empty((pieces.number, num_rows, n), dtype=torch.float32, device=x.device)
        tile = tile_for(num_rows)
        grid = (triton.cdiv(n, tile.n), triton.cdiv(num_rows, tile.m), pieces.number if split else 1)
        stored_linear_kernel[grid](
            *(x, numbers, scales, zeros, bias_or_any, target),
            *(num_rows, n, k, numbers.shape[1], group_size, pieces.size, pieces.number),
            KIND=kind,
            HAS_BIAS=has_bias,
            SPLIT=split,
            DOT_DTYPE=dot_dtype(x.dtype),
            BLOCK_M=tile.m,
            BLOCK_N=tile.n,
            BLOCK_K=packed.block_k,
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
        )
        if split:
            sum_pieces_kernel[(triton.cdiv(num_rows * n, _SUM_BLOCK),)](
                *(target, bias_or_any, out, n, num_rows * n, pieces.number),
                HAS_BIAS=has_bias,
                BLOCK=_SUM_BLOCK,
            )
        return out

    return product


class Pieces(NamedTuple):
    number: int
    size: int
    """Number of columns, a multiple of a tile; the last piece may have fewer."""


def pieces_of(n: int, k: int) -> Pieces:
    """Return how a matrix's columns are split, so that few rows of x give a GPU some hundred programs.

    This depends only on the matrix: sums then have the same order for any number of rows.
    """
    wanted = -(-256 // triton.cdiv(n, 64))
    number = max(1, min(wanted, 8, k // 512))
    size = triton.cdiv(triton.cdiv(k, number), _PIECE) * _PIECE
    return Pieces(triton.cdiv(k, size), size)


class Tile(NamedTuple):
    m: int
    n: int
    num_warps: int
    num_stages: int


def tile_for(num_rows: int) -> Tile:
    """Return a tile that spills no registers and fits the smallest GPUs. The sizes were not measured."""
    if num_rows <= SPLIT_ROWS:
        return Tile(max(16, triton.next_power_of_2(num_rows)), 64, 4, 3)
    return Tile(128, 64, 8, 2)


def dot_dtype(dtype: torch.dtype) -> tl.dtype:
    """Return the type to multiply in; float32 in the interpreter, which takes bfloat16 bits as integers."""
    return tl.float32 if triton.knobs.runtime.interpret else _TRITON_DTYPES[dtype]
