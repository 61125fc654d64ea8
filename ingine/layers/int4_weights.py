"""Any checkpoint in four bits: its matrices are quantised as they are packed."""

from torch import Tensor

from ingine.layers.int4 import can_be_int4, quantize_int4
from ingine.layers.weights import Embedding, Product, WeightFormat


class Int4Weights(WeightFormat):
    """Products with the codes are those of `inner`, and so is all that is not quantised here: matrices whose
    rows are not whole groups, and the vocabulary matrix of a tied model.
    """

    def __init__(self, inner: WeightFormat):
        self.name = f"int4 ({inner.name})"
        self._inner = inner

    def pack(self, weight: Tensor, bias: Tensor | None) -> Product:
        if not can_be_int4(weight):
            return self._inner.pack(weight, bias)
        return self._inner.pack_stored([quantize_int4(weight)], bias, weight.dtype)

    def pack_tied(self, weight: Tensor) -> tuple[Product, Embedding]:
        return self._inner.pack_tied(weight)
