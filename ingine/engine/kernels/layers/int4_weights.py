"""A weight format in four bits, for any checkpoint: matrices are quantised when they are packed."""

from collections.abc import Sequence

import gguf
import torch
from gguf import GGMLQuantizationType
from torch import Tensor

from ingine.engine.kernels.layers.int4 import can_be_int4, quantize_int4
from ingine.engine.kernels.layers.stored import ROWS_A_PART, GGUFMatrix, StoredMatrix
from ingine.engine.kernels.layers.weights import Embedding, Product, WeightFormat


class Int4Weights(WeightFormat):
    """Quantises matrices to int4 and multiplies them with `inner`.

    Errors cost more in columns that are multiplied by large activations (`ingine.engine.models.importance`).
    Delicate rows become Q8_0, of 8.5 bits, and so does the vocabulary matrix of a tied model, from which the
    embedding also takes its rows. `inner` packs matrices whose rows are not whole groups. Matrices that a
    checkpoint holds quantised stay as they are if `inner` multiplies them so.
    """

    def __init__(self, inner: WeightFormat, probe: WeightFormat | None = None):
        self.name = f"int4 ({inner.name})"
        self._inner, self.probe = inner, probe
        self.rounds_for_stored = inner.rounds_for_stored

    def pack(self, weight: Tensor, bias: Tensor | None) -> Product:
        return self.pack_delicate(weight, bias, 0)

    def pack_delicate(
        self, weight: Tensor, bias: Tensor | None, num_delicate: int, importance: Tensor | None = None
    ) -> Product:
        if not can_be_int4(weight.shape[1]):
            return self._inner.pack(weight, bias)
        rows, delicate = weight.split([len(weight) - num_delicate, num_delicate])
        parts: list[StoredMatrix] = []
        if len(rows):
            parts.append(quantize_int4(rows, importance=importance))
        if num_delicate:
            parts.append(quantize_q8_0(delicate))
        return self._inner.pack_stored(parts, bias, weight.dtype)

    def pack_tied(self, weight: Tensor) -> tuple[Product, Embedding]:
        if not can_be_int4(weight.shape[1]):
            return self._inner.pack_tied(weight)
        return self._inner.pack_tied_stored(quantize_q8_0(weight), weight.dtype)

    def keeps(self, part: StoredMatrix, dtype: torch.dtype) -> bool:
        return self._inner.keeps(part, dtype)

    def pack_stored(self, parts: Sequence[StoredMatrix], bias: Tensor | None, dtype: torch.dtype) -> Product:
        return self.pack_stored_delicate(parts, bias, dtype, 0)

    def pack_stored_delicate(
        self, parts: Sequence[StoredMatrix], bias: Tensor | None, dtype: torch.dtype, num_delicate: int
    ) -> Product:
        if not can_be_int4(parts[0].shape[1]):
            return self._inner.pack_stored(parts, bias, dtype)
        quantized: list[StoredMatrix] = []
        rows_left = sum(part.shape[0] for part in parts)
        for part in parts:
            is_delicate = rows_left <= num_delicate
            rows_left -= part.shape[0]
            if self.keeps(part, dtype):
                quantized.append(part)
            else:
                weight = part.rounded(dtype)
                quantized.append(quantize_q8_0(weight) if is_delicate else quantize_int4(weight))
        return self._inner.pack_stored(quantized, bias, dtype)

    def pack_tied_stored(self, matrix: StoredMatrix, dtype: torch.dtype) -> tuple[Product, Embedding]:
        return self._inner.pack_tied_stored(matrix, dtype)

    def embed_stored(self, matrix: StoredMatrix, dtype: torch.dtype) -> Embedding:
        return self._inner.embed_stored(matrix, dtype)


def quantize_q8_0(weight: Tensor) -> GGUFMatrix:
    """Quantise weight [rows, columns] to int8 with a float16 scale for each 32 columns; columns % 32 is 0."""
    rows, columns = weight.shape
    block_size, block_bytes = gguf.GGML_QUANT_SIZES[GGMLQuantizationType.Q8_0]
    blocks = torch.empty(rows, columns // block_size * block_bytes, dtype=torch.uint8)
    for part, target in zip(weight.split(ROWS_A_PART), blocks.split(ROWS_A_PART), strict=True):
        target.copy_(torch.from_numpy(gguf.quantize(part.float().numpy(), GGMLQuantizationType.Q8_0)))
    return GGUFMatrix((rows, columns), GGMLQuantizationType.Q8_0, blocks)
