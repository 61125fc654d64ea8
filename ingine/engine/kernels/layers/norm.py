"""Root mean square layer normalisation."""

import torch
from torch import Tensor, nn

from ingine.engine.kernels.layers.ops import LayerOps


class RMSNorm(nn.Module):
    """Over the last dimension; computed in float32 whatever the input is."""

    def __init__(self, size: int, eps: float, ops: LayerOps, *, dtype: torch.dtype, device: torch.device):
        super().__init__()
        self.eps, self.ops = eps, ops
        self.weight = nn.Parameter(torch.empty(size, dtype=dtype, device=device), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.ops.rms_norm(x, self.weight, self.eps)

    def add(self, residual: Tensor, delta: Tensor | None) -> Tensor:
        """Adds `delta`, if there is one, to `residual` [T, size] in place, and normalises that."""
        if delta is None:
            return self.ops.rms_norm(residual, self.weight, self.eps)
        return self.ops.add_rms_norm(residual, delta, self.weight, self.eps)
