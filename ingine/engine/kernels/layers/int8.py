"""Quantises weights and activations to int8: rows are rotated, then each gets a symmetric scale.

A few columns of a decoder's activations are far larger than all others, and a row's scale has to reach them.
A rotated row has no such columns, and the product is the same, since the weights are rotated too:
(x H)(W H)^T = x W^T. This is the idea of QuaRot (Ashkboos et al., 2024), in small blocks.
"""

from functools import cache

import torch
from torch import Tensor

ROTATION_SIZES = (64, 16, 4, 1)
"""Powers of four, so that a Hadamard matrix is scaled by a power of two, which rounds nothing."""


def rotation_size(columns: int) -> int:
    """Return how many neighbouring numbers of a row a rotation mixes."""
    return next(size for size in ROTATION_SIZES if columns % size == 0)


def rotate(x: Tensor, size: int | None = None) -> Tensor:
    """Multiply each `size` neighbours of x [rows, columns] by a Hadamard matrix, in float32.

    size: None is `rotation_size`. Rotating twice gives x again.
    """
    size = size or rotation_size(x.shape[1])
    return (x.float().view(len(x), -1, size) @ _hadamard(size)).view(x.shape)


def quantize_rows(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return float32 scales [rows], and the rotated weight [rows, columns] divided by them as int8."""
    scales, quantized = torch.empty(len(weight)), torch.empty(weight.shape, dtype=torch.int8)
    # A part at a time: all of it in float32 may exceed the free memory.
    parts = zip(*(tensor.split(1024) for tensor in (weight, scales, quantized)), strict=True)
    for weight_part, scales_part, quantized_part in parts:
        rotated = rotate(weight_part)
        scales_part.copy_(row_scales(rotated))
        quantized_part.copy_(rotated.div_(scales_part[:, None]).round_())
    return scales, quantized


def row_scales(x: Tensor) -> Tensor:
    """Return each row's scale, which maps its largest magnitude to 127. It is positive for zeros too."""
    return x.abs().amax(dim=1).div_(127).clamp_min_(torch.finfo(torch.float32).tiny)


@cache
def _hadamard(size: int) -> Tensor:
    """Return Sylvester's Hadamard matrix, scaled to be orthogonal; it is symmetric."""
    matrix = torch.ones(1, 1)
    while len(matrix) < size:
        matrix = torch.cat((torch.cat((matrix, matrix), dim=1), torch.cat((matrix, -matrix), dim=1)))
    return matrix / size**0.5
