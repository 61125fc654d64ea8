"""Weights and activations as int8: rotated, and then a symmetric scale for each row of either.

A few columns of a decoder's activations are far larger than all others, and a row's scale has to reach them.
Rotated, a row has no such columns, and the product is the same, since weights are rotated likewise:
(x H)(W H)^T = x W^T. This is the idea of QuaRot (Ashkboos et al., 2024), in small blocks.
"""

from functools import cache

import torch
from torch import Tensor

ROTATION_SIZES = (64, 16, 4, 1)
"""Powers of four, so that a Hadamard matrix is scaled by a power of two, which rounds nothing."""


def rotation_size(columns: int) -> int:
    """How many numbers of a row are mixed with each other."""
    return next(size for size in ROTATION_SIZES if columns % size == 0)


def rotate(x: Tensor, size: int | None = None) -> Tensor:
    """x [rows, columns] -> float32 [rows, columns]: each `size` numbers times a Hadamard matrix.

    None is `rotation_size`. Rotated twice, x is as it was.
    """
    size = size or rotation_size(x.shape[1])
    return (x.float().view(len(x), -1, size) @ _hadamard(size)).view(x.shape)


def quantize_rows(weight: Tensor) -> tuple[Tensor, Tensor]:
    """weight [rows, columns] -> float32 scales [rows], and int8 [rows, columns]: rotated, over them."""
    scales, quantized = torch.empty(len(weight)), torch.empty(weight.shape, dtype=torch.int8)
    # A part at a time: the whole in float32 may be more than what is left of memory.
    parts = zip(*(tensor.split(1024) for tensor in (weight, scales, quantized)), strict=True)
    for weight_part, scales_part, quantized_part in parts:
        rotated = rotate(weight_part)
        scales_part.copy_(row_scales(rotated))
        quantized_part.copy_(rotated.div_(scales_part[:, None]).round_())
    return scales, quantized


def row_scales(x: Tensor) -> Tensor:
    """Of each row: its largest magnitude becomes 127. A row of zeros has a scale all the same."""
    return x.abs().amax(dim=1).div_(127).clamp_min_(torch.finfo(torch.float32).tiny)


@cache
def _hadamard(size: int) -> Tensor:
    """Sylvester's, symmetric and orthogonal."""
    matrix = torch.ones(1, 1)
    while len(matrix) < size:
        matrix = torch.cat((torch.cat((matrix, matrix), dim=1), torch.cat((matrix, -matrix), dim=1)))
    return matrix / size**0.5
