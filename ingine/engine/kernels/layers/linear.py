"""Linear layers: one or several projections of a checkpoint as one matrix product."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ingine.engine.kernels.attention.interface import AttentionMetadata
from ingine.engine.kernels.layers.stored import StoredMatrix
from ingine.engine.kernels.layers.weights import Embedding, Product, WeightFormat


class Linear(nn.Module):
    """x [T, in_features] -> [T, sum(out_features)]: the outputs of the merged projections side by side.

    One product of a wide matrix is faster than several of narrow ones, most of all for few rows. Its weights
    take no memory (they are on the device "meta") until the loader calls `allocate` and fills `parts`; it is
    ready to run once `pack` or `pack_stored` has been called.
    """

    def __init__(
        self,
        in_features: int,
        out_features: list[int],
        *,
        bias: bool,
        dtype: torch.dtype,
        device: torch.device,
        num_delicate: int = 0,
    ):
        """num_delicate: how many of the last outputs have weights that are more sensitive to rounding."""
        super().__init__()
        self.out_features, self.dtype, self.device = out_features, dtype, device
        self.num_delicate = num_delicate
        rows = sum(out_features)
        self.weight = empty_parameter((rows, in_features), dtype, torch.device("meta"))
        self.bias = empty_parameter((rows,), dtype, device) if bias else None
        self.product: Product | None = None
        self.num_rounding = 0
        """Number of matrices that are multiplied in a checkpoint's quantised form by activations in int8."""
        self.by_importance = False
        """Whether the weights were quantised by the importance of their columns."""

    def allocate(self) -> None:
        """Allocate the weights, uninitialised."""
        self.weight = empty_parameter(self.weight.shape, self.dtype, self.device)

    def pack(self, weights: WeightFormat, importance: Tensor | None = None) -> None:
        """Convert the loaded weights to the layout of `weights` and release them.

        importance: see `WeightFormat.pack_delicate`.
        """
        self.product = weights.pack_delicate(self.weight, self.bias, self.num_delicate, importance)
        self.by_importance = importance is not None
        self.weight = self.bias = None

    def pack_stored(self, weights: WeightFormat, matrices: Sequence[StoredMatrix]) -> None:
        """Pack matrices that a checkpoint holds quantised, one for each of `out_features`, as `pack` does."""
        self.product = weights.pack_stored_delicate(matrices, self.bias, self.dtype, self.num_delicate)
        self.weight = self.bias = None
        self._count(weights, matrices)

    def pack_tied(self, weights: WeightFormat) -> Embedding:
        """Pack an output matrix that is also the embedding, as `pack` does. Returns the embedding."""
        self.product, embedding = weights.pack_tied(self.weight)
        self.weight = None
        return embedding

    def pack_tied_stored(self, weights: WeightFormat, matrix: StoredMatrix) -> Embedding:
        """Pack a tied matrix that a checkpoint holds quantised, as `pack_tied` does."""
        self.product, embedding = weights.pack_tied_stored(matrix, self.dtype)
        self.weight = None
        self._count(weights, [matrix])
        return embedding

    def _count(self, weights: WeightFormat, matrices: Sequence[StoredMatrix]) -> None:
        if weights.rounds_for_stored:
            self.num_rounding = sum(weights.keeps(matrix, self.dtype) for matrix in matrices)

    def forward(self, x: Tensor, metadata: AttentionMetadata | None = None) -> Tensor:
        """Multiply x by the merged weights.

        metadata: the step whose tokens are the rows of x; None if they are no step's tokens. An adapter reads
        from it which rows belong to which sequence; the product itself treats all rows alike.
        """
        return self.product(x)

    def parts(self, names: list[str]) -> dict[str, Tensor]:
        """Return the merged projections by their checkpoint names, as views that the loader copies into."""
        views = dict(
            zip((f"{name}.weight" for name in names), self.weight.split(self.out_features), strict=True)
        )
        if self.bias is not None:
            views |= self.biases(names)
        return views

    def biases(self, names: list[str]) -> dict[str, Tensor]:
        """Return the biases among the `parts`, which need no `allocate`."""
        if self.bias is None:
            return {}
        return dict(zip((f"{name}.bias" for name in names), self.bias.split(self.out_features), strict=True))


def empty_parameter(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> nn.Parameter:
    return nn.Parameter(torch.empty(shape, dtype=dtype, device=device), requires_grad=False)
