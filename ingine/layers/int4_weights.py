"""Any checkpoint in four bits: its matrices are quantised as they are packed."""

from collections.abc import Sequence

import gguf
import torch
from gguf import GGMLQuantizationType
from torch import Tensor

from ingine.layers.int4 import can_be_int4, quantize_int4
from ingine.layers.stored import GGUFMatrix, Int4Matrix, StoredMatrix
from ingine.layers.weights import Embedding, Product, WeightFormat

ROWS_A_PART = 1024


class Int4Weights(WeightFormat):
    """What is not quantised here, and all products, are those of `inner`.

    Matrices whose rows are not whole groups are left to it, and what a checkpoint holds in fewer than eight
    bits already stays as it is. The vocabulary matrix of a tied model, which decides the logits, becomes
    Q8_0: eight bits and a half, out of which the embedding takes its rows too.
    """

    def __init__(self, inner: WeightFormat):
        self.name = f"int4 ({inner.name})"
        self._inner = inner

    def pack(self, weight: Tensor, bias: Tensor | None) -> Product:
        if not can_be_int4(weight.shape[1]):
            return self._inner.pack(weight, bias)
        return self._inner.pack_stored([quantize_int4(weight)], bias, weight.dtype)

    def pack_tied(self, weight: Tensor) -> tuple[Product, Embedding]:
        if not can_be_int4(weight.shape[1]):
            return self._inner.pack_tied(weight)
        return self._inner.pack_tied_stored(quantize_q8_0(weight), weight.dtype)

    def keeps(self, part: StoredMatrix, dtype: torch.dtype) -> bool:
        return _has_few_bits(part) and self._inner.keeps(part, dtype)

    def pack_stored(self, parts: Sequence[StoredMatrix], bias: Tensor | None, dtype: torch.dtype) -> Product:
        return self._inner.pack_stored([_in_fewer_bits(part) for part in parts], bias, dtype)

    def pack_tied_stored(self, matrix: StoredMatrix, dtype: torch.dtype) -> tuple[Product, Embedding]:
        return self._inner.pack_tied_stored(matrix, dtype)

    def embed_stored(self, matrix: StoredMatrix, dtype: torch.dtype) -> Embedding:
        return self._inner.embed_stored(matrix, dtype)


def quantize_q8_0(weight: Tensor) -> GGUFMatrix:
    """weight [rows, columns], columns a multiple of 32, as int8 with a float16 scale for each 32 columns."""
    parts = (part.float().numpy() for part in weight.split(ROWS_A_PART))  # not all of it in float32 at once
    blocks = [torch.from_numpy(gguf.quantize(part, GGMLQuantizationType.Q8_0)) for part in parts]
    return GGUFMatrix(tuple(weight.shape), GGMLQuantizationType.Q8_0, torch.cat(blocks))


def _in_fewer_bits(part: StoredMatrix) -> StoredMatrix:
    stays = _has_few_bits(part) or not can_be_int4(part.shape[1])
    return part if stays else quantize_int4(part.dense())


def _has_few_bits(part: StoredMatrix) -> bool:
    if isinstance(part, GGUFMatrix):
        numbers, num_bytes = gguf.GGML_QUANT_SIZES[part.kind]
        return num_bytes < numbers
    return isinstance(part, Int4Matrix)
