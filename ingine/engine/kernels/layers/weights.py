"""Formats in which weights of linear layers are stored and multiplied: the interface, and the reference."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ingine.engine.kernels.layers.stored import StoredMatrix

Product = Callable[[Tensor], Tensor]
"""Maps a contiguous x [T, in_features] to [T, out_features] of x's dtype."""

Embedding = Callable[[Tensor], Tensor]
"""Maps token_ids [T] to rows [T, hidden_size] of the vocabulary matrix."""


class WeightFormat(ABC):
    name: str

    probe: "WeightFormat | None" = None
    """The format to multiply with while importance is measured for `pack_delicate`; None: not measured."""

    rounds_for_stored = False
    """Whether a matrix that the format `keeps` is multiplied by activations in int8. Tokens may then differ
    from those of the dense matrix."""

    @abstractmethod
    def pack(self, weight: Tensor, bias: Tensor | None) -> Product:
        """Return the product with weight [out_features, in_features] and bias [out_features].

        The product may keep `weight` itself or a layout of its own; the caller releases `weight`.
        """

    def pack_delicate(
        self, weight: Tensor, bias: Tensor | None, num_delicate: int, importance: Tensor | None = None
    ) -> Product:
        """Pack a weight whose last `num_delicate` rows are more sensitive to rounding.

        importance: [in_features], the mean square of x's columns, if known. By default both are ignored.
        """
        return self.pack(weight, bias)

    def pack_tied(self, weight: Tensor) -> tuple[Product, Embedding]:
        """Pack the vocabulary matrix of a tied model. Returns its product and its embedding.

        By default the embedding keeps `weight` itself, a second copy if `pack` makes a layout of its own.
        """
        return self.pack(weight, None), embedding(weight)

    def keeps(self, part: StoredMatrix, dtype: torch.dtype) -> bool:
        """Return whether `pack_stored` multiplies `part` as it is stored, for x of `dtype`. Default: False.

        The loader makes a matrix dense for `pack` if no part of it is kept.
        """
        return False

    def pack_stored(self, parts: Sequence[StoredMatrix], bias: Tensor | None, dtype: torch.dtype) -> Product:
        """Return the product with the rows of all `parts` and bias [out_features], for x of `dtype`.

        By default the parts are made dense.
        """
        return self.pack(torch.cat([part.rounded(dtype) for part in parts]), bias)

    def pack_stored_delicate(
        self, parts: Sequence[StoredMatrix], bias: Tensor | None, dtype: torch.dtype, num_delicate: int
    ) -> Product:
        """Pack parts whose last `num_delicate` rows are more sensitive to rounding, as `pack_stored` does."""
        return self.pack_stored(parts, bias, dtype)

    def pack_tied_stored(self, matrix: StoredMatrix, dtype: torch.dtype) -> tuple[Product, Embedding]:
        """Pack a quantised matrix as `pack_tied` does; the rows of the embedding are of `dtype`."""
        return self.pack_tied(matrix.rounded(dtype))

    def embed_stored(self, matrix: StoredMatrix, dtype: torch.dtype) -> Embedding:
        """Return an embedding whose rows are of `dtype`. By default the whole matrix is converted to it."""
        return embedding(matrix.rounded(dtype))


class PlainWeights(WeightFormat):
    """The reference: weights as in the checkpoint, for every device and dtype."""

    name = "plain"

    def pack(self, weight: Tensor, bias: Tensor | None) -> Product:
        return lambda x: F.linear(x, weight, bias)


def embedding(weight: Tensor) -> Embedding:
    """Return an embedding of rows of weight [vocab_size, hidden_size]."""
    return lambda token_ids: F.embedding(token_ids, weight)
