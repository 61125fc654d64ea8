"""Linear layers, one or several of a checkpoint merged into one matrix product."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Linear(nn.Module):
    """x [T, in_features] -> [T, sum(out_features)]: the outputs of the merged projections side by side.

    One product of a wide matrix is faster than several of narrow ones, most of all for few rows. Weights are
    uninitialised until the loader fills `parts`.
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

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)

    def parts(self, names: list[str]) -> dict[str, Tensor]:
        """The merged projections by their checkpoint names, as views: what is copied into them is loaded."""
        views = dict(
            zip((f"{name}.weight" for name in names), self.weight.split(self.out_features), strict=True)
        )
        if self.bias is not None:
            views |= zip((f"{name}.bias" for name in names), self.bias.split(self.out_features), strict=True)
        return views
