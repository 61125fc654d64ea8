"""Weights packed for kernels of our own, for CPUs with AVX-512 BF16 and VNNI.

oneDNN, the library for it, takes up to twice as long at the 1 to 64 rows of a decoding step: docs/log.md has
the figures. A row's result is the same bits in any batch.
"""

import ctypes
from ctypes import c_int64, c_void_p

import torch
from torch import Tensor

from ingine.layers.int8 import quantize_rows, rotation_size
from ingine.layers.weights import Embedding, Product, WeightFormat
from ingine.native.memory import Arena

PANEL = 32
"""Columns of a panel (`src/linear.cpp`)."""


def is_supported(library: ctypes.CDLL) -> bool:
    return bool(library.ingine_linear_is_supported())


class NativeBfloat16(WeightFormat):
    """bfloat16 in and out, sums in float32. Sizes that do not fit go to `fallback`."""

    name = "native-bf16"

    def __init__(self, library: ctypes.CDLL, fallback: WeightFormat):
        self._panels = _Panels(library)
        self._fallback = fallback
        self._linear = library.ingine_linear_bf16
        self._linear.argtypes, self._linear.restype = 4 * [c_void_p] + 3 * [c_int64], None

    def pack(self, weight: Tensor, bias: Tensor | None) -> Product:
        if weight.shape[1] % 2:
            return self._fallback.pack(weight, bias)
        return self._product(self._panels.pack(weight), weight.shape, bias)

    def pack_tied(self, weight: Tensor) -> tuple[Product, Embedding]:
        if weight.shape[1] % 2:
            return self._fallback.pack_tied(weight)
        packed = self._panels.pack(weight)
        return self._product(packed, weight.shape, None), self._panels.embedding(packed, weight.shape[1])

    def _product(self, packed: Tensor, shape: torch.Size, bias: Tensor | None) -> Product:
        (n, k), linear = shape, self._linear
        bias = None if bias is None else bias.float()
        weight_address, bias_address = packed.data_ptr(), None if bias is None else bias.data_ptr()

        # C++ has addresses only: the default argument keeps the memory behind them as long as the product.
        def product(x: Tensor, _owned: tuple[Tensor, Tensor | None] = (packed, bias)) -> Tensor:
            out = x.new_empty((x.shape[0], n))
            linear(x.data_ptr(), weight_address, bias_address, out.data_ptr(), x.shape[0], n, k)
            return out

        return product


class NativeInt8(WeightFormat):
    """Activations are quantised row by row on the way, as `ingine.layers.int8` does it with the weights.

    Sums are exact integers. bfloat16 in and out.
    """

    name = "native-int8"

    def __init__(self, library: ctypes.CDLL, fallback: WeightFormat):
        self._panels = _Panels(library)
        self._fallback = fallback
        self._linear = library.ingine_linear_int8
        self._linear.argtypes, self._linear.restype = 6 * [c_void_p] + 4 * [c_int64], None

    def pack(self, weight: Tensor, bias: Tensor | None) -> Product:
        (n, k), linear = weight.shape, self._linear
        if k % 4:
            return self._fallback.pack(weight, bias)
        scales, rows = quantize_rows(weight)
        packed, sums = self._panels.pack(rows), rows.sum(dim=1, dtype=torch.int32)
        bias = None if bias is None else bias.float()
        addresses = [None if t is None else t.data_ptr() for t in (packed, scales, sums, bias)]
        rotation = rotation_size(k)

        # As above, a default argument keeps the memory.
        def product(x: Tensor, _owned: tuple[Tensor | None, ...] = (packed, scales, sums, bias)) -> Tensor:
            out = x.new_empty((x.shape[0], n))
            linear(x.data_ptr(), *addresses, out.data_ptr(), x.shape[0], n, k, rotation)
            return out

        return product


class _Panels:
    """The layout that both share, over elements of 2 bytes or 1."""

    def __init__(self, library: ctypes.CDLL):
        self._arena = Arena()
        self._pack, self._gather = library.ingine_linear_pack, library.ingine_linear_gather
        self._pack.argtypes, self._pack.restype = [c_void_p, *3 * [c_int64], c_void_p], None
        self._gather.argtypes, self._gather.restype = [*2 * [c_void_p], *3 * [c_int64], c_void_p], None

    def pack(self, weight: Tensor) -> Tensor:
        """weight [n, k] in panels, of its dtype: [n up to a multiple of `PANEL`, k] numbers in all."""
        (n, k), weight = weight.shape, weight.contiguous()
        packed = self._arena.empty((-(-n // PANEL) * PANEL, k), weight.dtype)
        self._pack(weight.data_ptr(), n, k, weight.itemsize, packed.data_ptr())
        return packed

    def embedding(self, packed: Tensor, k: int) -> Embedding:
        """The rows of what was packed."""

        def rows(token_ids: Tensor) -> Tensor:
            out = packed.new_empty((len(token_ids), k))
            self._gather(
                packed.data_ptr(), token_ids.data_ptr(), len(token_ids), k, packed.itemsize, out.data_ptr()
            )
            return out

        return rows
