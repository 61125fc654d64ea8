"""The operations of a decoder between its matrix products: the interface, and the reference in torch."""

from abc import ABC, abstractmethod

import torch
import torch.nn.functional as F
from torch import Tensor


class LayerOps(ABC):
    """Operations on rows, which are tokens; the last dimension is contiguous. A fused implementation passes
    over memory once for each operation.
    """

    name: str

    @abstractmethod
    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """Normalise x [..., size] by the root mean square over its last dimension, computed in float32."""

    @abstractmethod
    def add_rms_norm(self, residual: Tensor, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """Add x to residual [T, size] in place, and return the `rms_norm` of the sum."""

    @abstractmethod
    def silu_mul(self, gate_up: Tensor) -> Tensor:
        """Return [T, size]: SiLU of the first half of gate_up [T, 2 * size] times the second half."""


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
