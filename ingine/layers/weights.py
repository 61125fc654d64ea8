"""How the weights of linear layers are held and multiplied: one interface, the reference in torch."""

from abc import ABC, abstractmethod
from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

Product = Callable[[Tensor], Tensor]
"""x [T, in_features] -> [T, out_features], of x's dtype."""


class WeightFormat(ABC):
    name: str

    @abstractmethod
    def pack(self, weight: Tensor, bias: Tensor | None) -> Product:
        """The product with weight [out_features, in_features] and bias [out_features].

        The product may keep `weight` itself, or hold a layout of its own; the caller forgets `weight`.
        """


class PlainWeights(WeightFormat):
    """The reference: as the checkpoint has them, for every device and dtype."""

    name = "plain"

    def pack(self, weight: Tensor, bias: Tensor | None) -> Product:
        return lambda x: F.linear(x, weight, bias)
