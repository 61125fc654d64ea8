"""Weights on CUDA: plain ones as they are, quantised ones as they are stored, made dense a tile at a time."""

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
"""Numbers of a tile along a row of weights; of int4 twice as many, in as many bytes."""

SPLIT_ROWS = 64
"""Up to so many rows of x, the pieces of the columns are programs side by side."""

_PIECE = 2 * BLOCKS_K[0]
"""Columns that are whole tiles of any kind."""

_SUM_BLOCK = 1024

_TRITON_DTYPES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


class TritonWeights(PlainWeights):
    """Activations stay in their own type (bfloat16 or float16), with int8 and fp8 weights too: W8A16.

    Dense are float32, which is for comparisons and has no tensor cores, and groups that no tile divides.
    """

    name = "plain (triton where quantised)"

    def keeps(self, part: StoredMatrix, dtype: torch.dtype) -> bool:
        inner = part.matrix if isinstance(part, ReorderedMatrix) else part
        return dtype in _TRITON_DTYPES and _block_k(inner) is not None

    def pack_stored(self, parts: Sequence[StoredMatrix], bias: Tensor | None, dtype: torch.dtype) -> Product:
        """One product for all parts if they are stored alike; else one for each, side by side."""
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
    """What `stored_linear_kernel` reads: see there."""

    kind: str
    shape: tuple[int, int]
    group_size: int
    numbers: Tensor
    scales: Tensor
    """[n, groups]; the kernel has it the other way round."""
    zeros: Tensor | None
    block_k: int


def _pack(part: StoredMatrix, dtype: torch.dtype) -> _Packed | None:
    """None for what the kernel does not multiply, x being of `dtype`."""
    block_k = _block_k(part)
    if dtype not in _TRITON_DTYPES or block_k is None:
        return None
    if isinstance(part, Int4Matrix):
        tiles = _tiles(part.codes, block_k)
        return _Packed("int4", part.shape, part.group_size, tiles, part.scales, part.zeros, block_k)
    numbers = part.numbers if part.name == "int8" else part.numbers.view(torch.uint8)
    # A scale for each row, whatever the rows of a block: of blocks of 128 by 128 that is 3% of the bytes.
    scales = part.scales.repeat_interleave(part.block[0], dim=0)[: part.shape[0]]
    return _Packed(part.name, part.shape, part.block[1], numbers, scales, None, block_k)


def _block_k(part: StoredMatrix) -> int | None:
    """The largest tile whose rows have one scale each; None: there is none."""
    if isinstance(part, Int4Matrix):
        group_size = part.group_size
    elif isinstance(part, ScaledMatrix):
        group_size = part.block[1]
    else:
        return None
    whole_row = group_size >= part.shape[1]
    return next((block for block in BLOCKS_K if whole_row or group_size % block == 0), None)


def _merged(packed: Sequence[_Packed]) -> _Packed:
    """All of one kind, one above the other."""
    first = packed[0]
    numbers, scales = (torch.cat([getattr(one, name) for one in packed]) for name in ("numbers", "scales"))
    zeros = None if first.zeros is None else torch.cat([one.zeros for one in packed])
    shape = sum(one.shape[0] for one in packed), first.shape[1]
    return _Packed(first.kind, shape, first.group_size, numbers, scales, zeros, first.block_k)


def _tiles(codes: Tensor, block_k: int) -> Tensor:
    """Codes of an Int4Matrix in the order of the kernel, padded to whole tiles."""
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
    """Columns, whole tiles; the last piece may have fewer."""


def pieces_of(n: int, k: int) -> Pieces:
    """How the columns of a matrix are cut, so that few rows of x, too, give a GPU some hundred programs.

    By the matrix alone: sums are then made in the same order for any number of rows.
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
    """Not measured: sizes that spill no registers and fit the smallest GPUs."""
    if num_rows <= SPLIT_ROWS:
        return Tile(max(16, triton.next_power_of_2(num_rows)), 64, 4, 3)
    return Tile(128, 64, 8, 2)


def dot_dtype(dtype: torch.dtype) -> tl.dtype:
    """The interpreter multiplies the bits of bfloat16 as if they were integers."""
    return tl.float32 if triton.knobs.runtime.interpret else _TRITON_DTYPES[dtype]
