"""How the weights of linear layers are held and multiplied: one interface, the reference in torch."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ingine.engine.kernels.layers.stored import StoredMatrix

Product = Callable[[Tensor], Tensor]
"""x [T, in_features], contiguous -> [T, out_features], of x's dtype."""

Embedding = Callable[[Tensor], Tensor]
"""token_ids [T] -> [T, hidden_size]: rows of the vocabulary matrix."""


class WeightFormat(ABC):
    name: str

    probe: "WeightFormat | None" = None
    """Multiplies what is measured for `pack_delicate`, of a format that asks for it."""

    rounds_for_stored = False
    """Whether a matrix that it `keeps` is multiplied by activations in int8: tokens may then be others than
    those of the dense matrix."""

    @abstractmethod
    def pack(self, weight: Tensor, bias: Tensor | None) -> Product:
        """The product with weight [out_features, in_features] and bias [out_features].

        The product may keep `weight` itself, or hold a layout of its own; the caller forgets `weight`.
        """

    def pack_delicate(
        self, weight: Tensor, bias: Tensor | None, num_delicate: int, importance: Tensor | None = None
    ) -> Product:
        """As `pack`, of a weight whose last `num_delicate` rows bear rounding worse than most.

        importance [in_features] is the mean square of x's columns, where known. Here neither matters.
        """
        return self.pack(weight, bias)

    def pack_tied(self, weight: Tensor) -> tuple[Product, Embedding]:
        """As `pack`, with the rows of `weight` still to be had: the vocabulary matrix of a tied model.

        Here the rows are `weight` itself, which is then held twice if `pack` makes a layout of its own.
        """
        return self.pack(weight, None), embedding(weight)

    def keeps(self, part: StoredMatrix, dtype: torch.dtype) -> bool:
        """Whether `pack_stored` multiplies such a part as it is stored, for x of `dtype`. Here none is.

        The loader makes a matrix dense for `pack` if no part of it is kept.
        """
        return False

    def pack_stored(self, parts: Sequence[StoredMatrix], bias: Tensor | None, dtype: torch.dtype) -> Product:
        """The product with `parts`, one above the other, and bias [out_features]; x is of `dtype`.

        Here they are made dense.
        """
        return self.pack(torch.cat([part.rounded(dtype) for part in parts]), bias)

    def pack_stored_delicate(
        self, parts: Sequence[StoredMatrix], bias: Tensor | None, dtype: torch.dtype, num_delicate: int
    ) -> Product:
        """As `pack_stored`, of parts whose last `num_delicate` rows bear rounding worse than most."""
        return self.pack_stored(parts, bias, dtype)

    def pack_tied_stored(self, matrix: StoredMatrix, dtype: torch.dtype) -> tuple[Product, Embedding]:
        """As `pack_tied`; rows of the embedding are of `dtype`."""
        return self.pack_tied(matrix.rounded(dtype))

    def embed_stored(self, matrix: StoredMatrix, dtype: torch.dtype) -> Embedding:
        """Rows of `dtype`, which here is what all of the matrix is made."""
        return embedding(matrix.rounded(dtype))


class PlainWeights(WeightFormat):
    """The reference: as the checkpoint has them, for every device and dtype."""

    name = "plain"

    def pack(self, weight: Tensor, bias: Tensor | None) -> Product:
        return lambda x: F.linear(x, weight, bias)


def embedding(weight: Tensor) -> Embedding:
    """The rows of weight [vocab_size, hidden_size] as it is."""
    return lambda token_ids: F.embedding(token_ids, weight)
