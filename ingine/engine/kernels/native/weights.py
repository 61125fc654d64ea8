"""Weights packed for the native matrix products, on any CPU that the native kernels are compiled for.

A row's result has the same bits in every batch. None of the libraries oneDNN, XNNPACK, KleidiAI and libxsmm
guarantees that, and all except oneDNN, which torch includes, would be a dependency. oneDNN takes up to twice
as long for the 1 to 64 rows of a decoding step (docs/log.md); the others were not measured.
"""

import ctypes
from collections.abc import Sequence
from ctypes import c_int32, c_int64, c_void_p

import torch
import torch.nn.functional as F
from torch import Tensor

from ingine.engine.kernels.layers.int8 import quantize_rows, rotation_size
from ingine.engine.kernels.layers.stored import ROWS_A_PART, ScaledMatrix, StoredMatrix
from ingine.engine.kernels.layers.weights import Embedding, Product, WeightFormat
from ingine.engine.kernels.native import DTYPES
from ingine.engine.kernels.native.block_weights import BlockWeights
from ingine.engine.kernels.native.memory import Arena

PANEL = 32
"""Number of columns of a panel (`src/tile.h`)."""

GROUP_BYTES = 4
"""Bytes that a lane multiplies at a time (`src/dot.h`). A row of weights is a multiple of it."""

_SHORT_NAMES = {torch.float32: "f32", torch.bfloat16: "bf16"}


class NativeWeights(BlockWeights):
    """Weights, inputs and outputs in float32 or bfloat16, with sums in float32. `fallback` packs weights
    whose rows are no multiple of GROUP_BYTES.
    """

    def __init__(self, library: ctypes.CDLL, dtype: torch.dtype, fallback: WeightFormat):
        super().__init__(library)
        self.name = f"native-{_SHORT_NAMES[dtype]} ({_isa(library, dtype)})"
        self._panels = _Panels(library)
        self._fallback = fallback
        self._linear, self._dtype = library.ingine_linear, DTYPES[dtype]
        self._linear.argtypes, self._linear.restype = [c_int32, *4 * [c_void_p], *3 * [c_int64]], None
        self._int8 = NativeInt8(library, dtype, fallback)

    def keeps(self, part: StoredMatrix, dtype: torch.dtype) -> bool:
        return is_for_int8([part]) or super().keeps(part, dtype)

    def pack_stored(self, parts: Sequence[StoredMatrix], bias: Tensor | None, dtype: torch.dtype) -> Product:
        if is_for_int8(parts):
            return self._int8.pack_stored(parts, bias, dtype)
        return super().pack_stored(parts, bias, dtype)

    def pack(self, weight: Tensor, bias: Tensor | None) -> Product:
        if not _fits(weight):
            return self._fallback.pack(weight, bias)
        return self._product(self._panels.pack(weight), weight.shape, bias)

    def pack_tied(self, weight: Tensor) -> tuple[Product, Embedding]:
        if not _fits(weight):
            return self._fallback.pack_tied(weight)
        packed = self._panels.pack(weight)
        return self._product(packed, weight.shape, None), self._panels.embedding(packed, weight.shape[1])

    def _product(self, packed: Tensor, shape: torch.Size, bias: Tensor | None) -> Product:
        (n, k), linear, dtype = shape, self._linear, self._dtype
        bias = None if bias is None else _padded(bias.float())
        weight_address, bias_address = packed.data_ptr(), None if bias is None else bias.data_ptr()

        # C++ holds only addresses: the default argument keeps their memory alive as long as the product.
        def product(x: Tensor, _owned: tuple[Tensor, Tensor | None] = (packed, bias)) -> Tensor:
            out = x.new_empty((x.shape[0], n))
            linear(dtype, x.data_ptr(), weight_address, bias_address, out.data_ptr(), x.shape[0], n, k)
            return out

        return product


class NativeInt8(BlockWeights):
    """Weights in int8. A product quantises its activations row by row, as `layers.int8` does the weights.

    Sums are exact integers. Inputs and outputs are of `dtype` (float32 or bfloat16). `fallback` packs weights
    whose rows are no multiple of GROUP_BYTES.
    """

    def __init__(self, library: ctypes.CDLL, dtype: torch.dtype, fallback: WeightFormat):
        super().__init__(library)
        self.name = f"native-int8 ({_isa(library, torch.int8)})"
        self._panels = _Panels(library)
        self._fallback = fallback
        self._linear, self._dtype = library.ingine_linear_int8, DTYPES[dtype]
        self._linear.argtypes, self._linear.restype = [c_int32, *6 * [c_void_p], *4 * [c_int64]], None

    def pack(self, weight: Tensor, bias: Tensor | None) -> Product:
        k = weight.shape[1]
        if k % GROUP_BYTES:
            return self._fallback.pack(weight, bias)
        return self._product(*quantize_rows(weight), bias, rotation_size(k))

    def keeps(self, part: StoredMatrix, dtype: torch.dtype) -> bool:
        return is_for_int8([part]) or super().keeps(part, dtype)

    def pack_stored(self, parts: Sequence[StoredMatrix], bias: Tensor | None, dtype: torch.dtype) -> Product:
        """Multiply int8 matrices made for int8 activations as they are stored, without a rotation."""
        if not is_for_int8(parts):
            return super().pack_stored(parts, bias, dtype)
        scales = torch.cat([part.scales[:, 0] for part in parts])
        return self._product(scales, torch.cat([part.numbers for part in parts]), bias, rotation=1)

    def _product(self, scales: Tensor, rows: Tensor, bias: Tensor | None, rotation: int) -> Product:
        (n, k), linear, dtype = rows.shape, self._linear, self._dtype
        packed, sums = self._panels.pack(rows), _padded(_sums(rows))
        scales, bias = _padded(scales), None if bias is None else _padded(bias.float())
        addresses = [None if t is None else t.data_ptr() for t in (packed, scales, sums, bias)]

        # As above, the default argument keeps the memory alive.
        def product(x: Tensor, _owned: tuple[Tensor | None, ...] = (packed, scales, sums, bias)) -> Tensor:
            out = x.new_empty((x.shape[0], n))
            linear(dtype, x.data_ptr(), *addresses, out.data_ptr(), x.shape[0], n, k, rotation)
            return out

        return product


def is_for_int8(parts: Sequence[StoredMatrix]) -> bool:
    """Return whether `parts` are int8 with a scale for each row, of a checkpoint with int8 activations."""
    return all(
        isinstance(part, ScaledMatrix)
        and part.numbers.dtype == torch.int8
        and part.int8_activations
        and part.is_by_row
        and part.shape[1] % GROUP_BYTES == 0
        for part in parts
    )


def _isa(library: ctypes.CDLL, dtype: torch.dtype) -> str:
    """Return the instruction set that multiplies weights of `dtype`, such as "avx2"."""
    library.ingine_linear_isa.argtypes, library.ingine_linear_isa.restype = [c_int64], ctypes.c_char_p
    return library.ingine_linear_isa(dtype.itemsize).decode()


def _fits(weight: Tensor) -> bool:
    return weight.shape[1] * weight.itemsize % GROUP_BYTES == 0


def _sums(rows: Tensor) -> Tensor:
    """Sum int8 [n, k] to int32 [n], a part at a time: torch first converts all that it sums to int32."""
    return torch.cat([part.sum(dim=1, dtype=torch.int32) for part in rows.split(ROWS_A_PART)])


def _padded(columns: Tensor) -> Tensor:
    """Pad columns [n] with zeros to a whole panel, since the kernels read whole panels."""
    return F.pad(columns, (0, -len(columns) % PANEL))


class _Panels:
    """Packs weights with elements of 4, 2 or 1 bytes into panels, the layout of all native products."""

    def __init__(self, library: ctypes.CDLL):
        self._arena = Arena()
        self._pack, self._gather = library.ingine_linear_pack, library.ingine_linear_gather
        self._pack.argtypes, self._pack.restype = [c_void_p, *3 * [c_int64], c_void_p], None
        self._gather.argtypes, self._gather.restype = [*2 * [c_void_p], *3 * [c_int64], c_void_p], None

    def pack(self, weight: Tensor) -> Tensor:
        """Return weight [n, k] in panels, of its dtype, with n rounded up to a multiple of `PANEL`."""
        (n, k), weight = weight.shape, weight.contiguous()
        packed = self._arena.empty((-(-n // PANEL) * PANEL, k), weight.dtype)
        self._pack(weight.data_ptr(), n, k, weight.itemsize, packed.data_ptr())
        return packed

    def embedding(self, packed: Tensor, k: int) -> Embedding:
        """Return an embedding that gathers rows from packed panels."""

        def rows(token_ids: Tensor) -> Tensor:
            out = packed.new_empty((len(token_ids), k))
            self._gather(
                packed.data_ptr(), token_ids.data_ptr(), len(token_ids), k, packed.itemsize, out.data_ptr()
            )
            return out

        return rows
