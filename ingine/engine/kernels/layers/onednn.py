"""Weights in the layout that oneDNN's kernels read, for x86 CPUs: no step has to reorder them.

torch provides these operators for its own compiler; an eager `F.linear` keeps the checkpoint's layout.
"""

import ctypes

import torch
from torch import Tensor

from ingine.engine.kernels.layers.int8 import quantize_rows, rotate, row_scales
from ingine.engine.kernels.layers.weights import Embedding, Product, WeightFormat, embedding

ROWS_HINT = 32
"""The number of rows of x for which oneDNN chooses the layout. It chooses the same one for 1 to 512 rows."""

FLOAT32_OUT = (None, 1.0, 0, torch.float32, "none", [], "")
"""Last arguments of `qlinear_pointwise`: no bias; scale, zero point and dtype of the output; no operation
after the product."""


class PackedBfloat16(WeightFormat):
    """bfloat16 weights, blocked for `vdpbf16ps`.

    Without AMX a row's result does not depend on the other rows; with AMX its last bits do.
    """

    name = "onednn-bf16"

    def pack(self, weight: Tensor, bias: Tensor | None) -> Product:
        return _product(_reorder(weight), bias)

    def pack_tied(self, weight: Tensor) -> tuple[Product, Embedding]:
        packed = _reorder(weight)
        return _product(packed, None), _packed_embedding(packed, weight) or embedding(weight)


class PackedInt8(WeightFormat):
    """int8 weights. They are quantised when they are packed, activations in each product: see `layers.int8`.

    x is passed as uint8 with a zero point of 128, since oneDNN has only a slow reference for int8. Sums are
    exact integers, and scales are applied in float32. A row's result does not depend on the other rows.
    """

    name = "onednn-int8"

    def pack(self, weight: Tensor, bias: Tensor | None) -> Product:
        scales, quantized = quantize_rows(weight)
        packed = torch.ops.onednn.qlinear_prepack(quantized, None)
        zero_points = torch.zeros(len(weight), dtype=torch.int64)
        linear = torch.ops.onednn.qlinear_pointwise.default

        def product(x: Tensor) -> Tensor:
            x_quantized, x_scales = _quantize_activations(x)
            out = linear(x_quantized, 1.0, 128, packed, scales, zero_points, *FLOAT32_OUT).mul_(x_scales)
            return (out if bias is None else out.add_(bias)).to(x.dtype)

        return product


def _quantize_activations(x: Tensor) -> tuple[Tensor, Tensor]:
    """Quantise x [T, columns] to uint8 [T, columns], with 128 for zero, and float32 scales [T, 1]."""
    rotated = rotate(x)
    scales = row_scales(rotated)[:, None]
    return rotated.div_(scales).round_().add_(128).to(torch.uint8), scales


def bfloat16_is_packable() -> bool:
    """Return whether this CPU and this build of torch have oneDNN's products in bfloat16."""
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def int8_obstacle() -> str | None:
    """Return why oneDNN's int8 products are not available or not exact here, or None if they are: without
    VNNI intermediate sums saturate in 16 bits.
    """
    if not torch.backends.mkldnn.is_available():
        return "this torch has no oneDNN"
    return None if torch.cpu._is_vnni_supported() else "this CPU has no VNNI"


def int8_is_packable() -> bool:
    return int8_obstacle() is None


def _reorder(weight: Tensor) -> Tensor:
    return torch.ops.mkldnn._reorder_linear_weight(weight, ROWS_HINT)


def _product(packed: Tensor, bias: Tensor | None) -> Product:
    linear = torch.ops.mkldnn._linear_pointwise.default
    return lambda x: linear(x, packed, bias, "none", [], "")


def _packed_embedding(packed: Tensor, weight: Tensor) -> Embedding | None:
    """Return an embedding that gathers rows from `packed`, or None if `packed` has an unknown layout.

    The known layout, of CPUs with AVX-512, is [rows / 64, columns / 2, 64 rows, 2 columns]. oneDNN does not
    guarantee it, so every row is compared with `weight` first.
    """
    vocab_size, hidden_size = weight.shape
    num_bytes = torch.ops.mkldnn._nbytes(packed)
    if vocab_size % 64 or hidden_size % 2 or num_bytes != weight.nbytes:
        return None
    buffer = (ctypes.c_byte * num_bytes).from_address(torch.ops.mkldnn.data_ptr(packed))
    buffer.owner = packed  # keeps the memory alive as long as `pairs`
    pairs = torch.frombuffer(buffer, dtype=torch.int32).view(vocab_size // 64, hidden_size // 2, 64)
    blocks = weight.view(torch.int32).view(vocab_size // 64, 64, hidden_size // 2)
    if not torch.equal(pairs.transpose(1, 2), blocks):
        return None
    return lambda token_ids: pairs[token_ids // 64, :, token_ids % 64].view(torch.bfloat16)
