"""Products with weights in blocks: GGUF's kinds, read directly from the mapped file, and int4.

A product quantises its activations to int8, with a scale for each 32 numbers of a row. A row's result has the
same bits in every batch.
"""

import ctypes
from collections.abc import Sequence
from ctypes import c_int32, c_int64, c_void_p
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ingine.engine.kernels.layers.stored import GGUF_KINDS, GGUFMatrix, Int4Matrix, StoredMatrix
from ingine.engine.kernels.layers.weights import Embedding, Product, WeightFormat
from ingine.engine.kernels.native import DTYPES
from ingine.engine.kernels.native.memory import Arena

INT4 = -1

PANEL = 32
"""Number of rows of a panel (`src/block_formats.h`)."""

GROUP = 32
"""Number of values of x that share a scale."""


class _Segment(ctypes.Structure):
    """A part of a product: `Segment` of `src/blocks.cpp`."""

    _fields_ = [
        ("data", c_void_p),
        ("order", c_void_p),
        ("rows", c_int64),
        ("row_bytes", c_int64),
        ("group_size", c_int64),
        ("kind", c_int32),
    ]


class BlockWeights(WeightFormat):
    """Multiplies matrices in blocks, for the native formats. Parts without a kernel become dense and have a
    product of their own beside the parts that are kept.
    """

    rounds_for_stored = True

    def __init__(self, library: ctypes.CDLL):
        self._blocks = _Blocks(library)

    def keeps(self, part: StoredMatrix, dtype: torch.dtype) -> bool:
        return _fits(part)

    def pack_stored(self, parts: Sequence[StoredMatrix], bias: Tensor | None, dtype: torch.dtype) -> Product:
        if all(map(_fits, parts)):
            return self._blocks.product(self._blocks.segments(parts), bias, dtype)
        if len(parts) == 1 or not any(self.keeps(part, dtype) for part in parts):
            return super().pack_stored(parts, bias, dtype)
        biases = [None] * len(parts) if bias is None else bias.split([part.shape[0] for part in parts])
        products = [self.pack_stored([part], own, dtype) for part, own in zip(parts, biases, strict=True)]
        return lambda x: torch.cat([product(x) for product in products], dim=1)

    def pack_tied_stored(self, part: StoredMatrix, dtype: torch.dtype) -> tuple[Product, Embedding]:
        if not _fits(part):
            return super().pack_tied_stored(part, dtype)
        segments = self._blocks.segments([part])
        return self._blocks.product(segments, None, dtype), self._blocks.embedding(segments, dtype)

    def embed_stored(self, part: StoredMatrix, dtype: torch.dtype) -> Embedding:
        if not _fits(part):
            return super().embed_stored(part, dtype)
        return self._blocks.embedding(self._blocks.segments([part]), dtype)


@dataclass(frozen=True, slots=True)
class _Segments:
    """Matrices whose rows follow each other, in the form that the C++ kernels take."""

    array: ctypes.Array
    shape: tuple[int, int]
    owned: list[tuple[Tensor | None, ...]]
    """The tensors that `array` points to."""


class _Blocks:
    """The kernels of `src/blocks.cpp`."""

    def __init__(self, library: ctypes.CDLL):
        self._arena = Arena()
        self._multiply, self._gather = library.ingine_blocks, library.ingine_blocks_gather
        self._multiply.argtypes = [c_int32, *2 * [c_void_p], c_int64, *2 * [c_void_p], *3 * [c_int64]]
        self._gather.argtypes = [c_int32, *2 * [c_void_p], *2 * [c_int64], c_void_p]
        self._pack_int4 = library.ingine_blocks_pack_int4
        self._pack_int4.argtypes = [*3 * [c_void_p], *3 * [c_int64], c_void_p]
        for function in (self._multiply, self._gather, self._pack_int4):
            function.restype = None

    def segments(self, parts: Sequence[StoredMatrix]) -> _Segments:
        made = [self._int4(part) if isinstance(part, Int4Matrix) else _gguf(part) for part in parts]
        array = (_Segment * len(parts))(*(segment for segment, _ in made))
        shape = sum(part.shape[0] for part in parts), parts[0].shape[1]
        return _Segments(array, shape, [owned for _, owned in made])

    def product(self, segments: _Segments, bias: Tensor | None, dtype: torch.dtype) -> Product:
        (n, k), array = segments.shape, segments.array
        multiply, number, count = self._multiply, DTYPES[dtype], len(segments.array)
        bias = None if bias is None else F.pad(bias.float(), (0, PANEL))  # the kernel reads whole vectors
        bias_address = None if bias is None else bias.data_ptr()

        # C++ holds only addresses: the default argument keeps their memory alive as long as the product.
        def product(x: Tensor, _owned: tuple[_Segments, Tensor | None] = (segments, bias)) -> Tensor:
            out = x.new_empty((x.shape[0], n))
            rows = x.shape[0]
            multiply(number, x.data_ptr(), array, count, bias_address, out.data_ptr(), rows, n, k)
            return out

        return product

    def embedding(self, segments: _Segments, dtype: torch.dtype) -> Embedding:
        gather, number, k = self._gather, DTYPES[dtype], segments.shape[1]

        def rows(token_ids: Tensor) -> Tensor:
            out = torch.empty((len(token_ids), k), dtype=dtype)
            gather(number, segments.array, token_ids.data_ptr(), len(token_ids), k, out.data_ptr())
            return out

        return rows

    def _int4(self, part: Int4Matrix) -> tuple[_Segment, tuple[Tensor]]:
        n, k = part.shape
        row_bytes = k // 2 + 4 * (k // part.group_size)
        packed = self._arena.empty((-(-n // PANEL) * PANEL, row_bytes), torch.uint8)
        stored = [numbers.contiguous() for numbers in (part.codes, part.scales, part.zeros)]
        addresses = [numbers.data_ptr() for numbers in stored]
        self._pack_int4(*addresses, n, k, part.group_size, packed.data_ptr())
        return _Segment(packed.data_ptr(), None, n, row_bytes, part.group_size, INT4), (packed,)


def _gguf(part: GGUFMatrix) -> tuple[_Segment, tuple[Tensor, Tensor | None]]:
    data, order = part.data, part.row_order
    address = None if order is None else order.data_ptr()
    segment = _Segment(data.data_ptr(), address, part.shape[0], data.stride(0), 0, part.kind)
    return segment, (data, order)


def _fits(part: StoredMatrix) -> bool:
    if isinstance(part, Int4Matrix):
        return part.shape[1] % GROUP == 0 and part.group_size % GROUP == 0
    return isinstance(part, GGUFMatrix) and part.kind in GGUF_KINDS
