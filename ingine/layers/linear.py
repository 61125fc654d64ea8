"""Linear layers, one or several of a checkpoint merged into one matrix product."""

import torch
from torch import Tensor, nn

from ingine.layers.weights import Embedding, Product, WeightFormat


class Linear(nn.Module):
    """x [T, in_features] -> [T, sum(out_features)]: the outputs of the merged projections side by side.

    One product of a wide matrix is faster than several of narrow ones, most of all for few rows. Weights are
    uninitialised until the loader fills `parts`, and multiplied once `pack` has been called.
    """

    def __init__(
        self,
        in_features: int,
        out_features: list[int],
        *,
        bias: bool,
        dtype: torch.dtype,
        device: torch.device,
    ):
        super().__init__()
        self.out_features = out_features
        rows = sum(out_features)
        weight = torch.empty(rows, in_features, dtype=dtype, device=device)
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias = None
        if bias:
            self.bias = nn.Parameter(torch.empty(rows, dtype=dtype, device=device), requires_grad=False)

        self.product: Product | None = None

    def pack(self, weights: WeightFormat) -> None:
        """Bring the loaded weights into the layout of `weights`, and forget them as they were."""
        self.product = weights.pack(self.weight, self.bias)
        self.weight = self.bias = None

    def pack_tied(self, weights: WeightFormat) -> Embedding:
        """As `pack`, for the output matrix that is also the embedding; returns the latter."""
        self.product, embedding = weights.pack_tied(self.weight)
        self.weight = None
        return embedding

    def forward(self, x: Tensor) -> Tensor:
        return self.product(x)

    def parts(self, names: list[str]) -> dict[str, Tensor]:
        """The merged projections by their checkpoint names, as views: what is copied into them is loaded."""
        views = dict(
            zip((f"{name}.weight" for name in names), self.weight.split(self.out_features), strict=True)
        )
        if self.bias is not None:
            views |= zip((f"{name}.bias" for name in names), self.bias.split(self.out_features), strict=True)
        return views
