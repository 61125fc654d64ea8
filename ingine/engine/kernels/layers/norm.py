"""Root mean square layer normalisation."""

import torch
from torch import Tensor, nn

from ingine.engine.kernels.layers.ops import LayerOps


class RMSNorm(nn.Module):
    """Normalises over the last dimension. Computes in float32 for every dtype."""

    def __init__(self, size: int, eps: float, ops: LayerOps, *, dtype: torch.dtype, device: torch.device):
        super().__init__()
        self.eps, self.ops = eps, ops
        self.weight = nn.Parameter(torch.empty(size, dtype=dtype, device=device), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.ops.rms_norm(x, self.weight, self.eps)

    def add(self, residual: Tensor, delta: Tensor | None) -> Tensor:
        """Add `delta`, if it is not None, to `residual` [T, size] in place, and return the normalised sum."""
        if delta is None:
            return self.ops.rms_norm(residual, self.weight, self.eps)
        return self.ops.add_rms_norm(residual, delta, self.weight, self.eps)
