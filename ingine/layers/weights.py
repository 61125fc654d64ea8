"""How the weights of linear layers are held and multiplied: one interface, the reference in torch."""

from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

Product = Callable[[Tensor], Tensor]
"""x [T, in_features], contiguous -> [T, out_features], of x's dtype."""

Embedding = Callable[[Tensor], Tensor]
"""token_ids [T] -> [T, hidden_size]: rows of the vocabulary matrix."""


class WeightFormat(ABC):
    name: str

    @abstractmethod
    def pack(self, weight: Tensor, bias: Tensor | None) -> Product:
        """The product with weight [out_features, in_features] and bias [out_features].

        The product may keep `weight` itself, or hold a layout of its own; the caller forgets `weight`.
        """

    def pack_tied(self, weight: Tensor) -> tuple[Product, Embedding]:
        """As `pack`, with the rows of `weight` still to be had: the vocabulary matrix of a tied model.

        Here the rows are `weight` itself, which is then held twice if `pack` makes a layout of its own.
        """
        return self.pack(weight, None), embedding(weight)


class PlainWeights(WeightFormat):
    """The reference: as the checkpoint has them, for every device and dtype."""

    name = "plain"

    def pack(self, weight: Tensor, bias: Tensor | None) -> Product:
        return lambda x: F.linear(x, weight, bias)


def embedding(weight: Tensor) -> Embedding:
    """The rows of weight [vocab_size, hidden_size] as it is."""
    return lambda token_ids: F.embedding(token_ids, weight)


def quantize_rows(weight: Tensor) -> tuple[Tensor, Tensor]:
    """weight [rows, columns] -> float32 scales [rows], and int8 [rows, columns] to multiply with them."""
    scales, quantized = torch.empty(len(weight)), torch.empty(weight.shape, dtype=torch.int8)
    # A part at a time: the whole in float32 may be more than what is left of memory.
    parts = zip(*(tensor.split(4096) for tensor in (weight, scales, quantized)), strict=True)
    for weight_part, scales_part, quantized_part in parts:
        scales_part.copy_(row_scales(weight_part))
        quantized_part.copy_(weight_part.div(scales_part[:, None]).round_())
    return scales, quantized


def row_scales(x: Tensor) -> Tensor:
    """Of each row, in float32: its largest magnitude becomes 127. A row of zeros has a scale all the same."""
    return x.abs().amax(dim=1).float().div_(127).clamp_min_(torch.finfo(torch.float32).tiny)
