"""The operations of a decoder between its matrix products in C++, each one pass over memory."""

import ctypes
from ctypes import c_float, c_int32, c_int64, c_void_p

import torch
from torch import Tensor

from ingine.engine.kernels.layers.ops import LayerOps
from ingine.engine.kernels.native import DTYPES


class NativeOps(LayerOps):
    """Operations for the dtypes in `DTYPES`. They equal torch's, but squares are summed in another order."""

    name = "native"

    def __init__(self, library: ctypes.CDLL):
        self._rms_norm = _function(
            library.ingine_rms_norm, 3 * [c_void_p] + 5 * [c_int64] + [c_float, c_int32]
        )
        self._add_rms_norm = _function(
            library.ingine_add_rms_norm, 4 * [c_void_p] + 2 * [c_int64] + [c_float, c_int32]
        )
        self._silu_mul = _function(library.ingine_silu_mul, 2 * [c_void_p] + 2 * [c_int64] + [c_int32])

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        out = torch.empty(x.shape, dtype=x.dtype)
        num_tokens, num_heads, size = x.shape if x.dim() == 3 else (x.shape[0], 1, x.shape[1])
        token_stride, head_stride = x.stride()[:2]
        self._rms_norm(
            x.data_ptr(),
            weight.data_ptr(),
            out.data_ptr(),
            num_tokens,
            token_stride,
            num_heads,
            head_stride,
            size,
            eps,
            DTYPES[x.dtype],
        )
        return out

    def add_rms_norm(self, residual: Tensor, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        out = torch.empty_like(residual)
        num_tokens, size = residual.shape
        self._add_rms_norm(
            residual.data_ptr(),
            x.data_ptr(),
            weight.data_ptr(),
            out.data_ptr(),
            num_tokens,
            size,
            eps,
            DTYPES[x.dtype],
        )
        return out

    def silu_mul(self, gate_up: Tensor) -> Tensor:
        num_tokens, size = gate_up.shape[0], gate_up.shape[1] // 2
        out = gate_up.new_empty((num_tokens, size))
        self._silu_mul(gate_up.data_ptr(), out.data_ptr(), num_tokens, size, DTYPES[gate_up.dtype])
        return out


def _function(function: ctypes._CFuncPtr, argtypes: list[type]) -> ctypes._CFuncPtr:
    function.argtypes, function.restype = argtypes, None
    return function
