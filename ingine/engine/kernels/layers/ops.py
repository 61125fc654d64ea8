"""What a decoder does between its matrix products: one interface, the reference in torch."""

from abc import ABC, abstractmethod

import torch
import torch.nn.functional as F
from torch import Tensor


class LayerOps(ABC):
    """Each one pass over memory where it is fused. Rows are tokens; the last dimension is contiguous."""

    name: str

    @abstractmethod
    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """Root mean square normalisation of x [..., size] over its last dimension, computed in float32."""

    @abstractmethod
    def add_rms_norm(self, residual: Tensor, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """Adds x to residual [T, size] in place, and returns the sum's `rms_norm`."""

    @abstractmethod
    def silu_mul(self, gate_up: Tensor) -> Tensor:
        """[T, 2 * size] -> [T, size]: SiLU of the first half times the second."""


class TorchOps(LayerOps):
    """The reference, for every device and dtype."""

    name = "torch"

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        return F.rms_norm(x, weight.shape, weight, eps)

    def add_rms_norm(self, residual: Tensor, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        return F.rms_norm(torch.add(residual, x, out=residual), weight.shape, weight, eps)

    def silu_mul(self, gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        return F.silu(gate).mul_(up)
