"""Random matrices in blocks, and the products that are expected of them."""

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType
from torch import Tensor

from ingine.engine.kernels.layers.stored import GGUFMatrix, Int4Matrix, StoredMatrix

HALVES = {
    GGMLQuantizationType.Q8_0: [0],
    GGMLQuantizationType.Q4_0: [0],
    GGMLQuantizationType.Q4_1: [0, 2],
    GGMLQuantizationType.Q4_K: [0, 2],
    GGMLQuantizationType.Q5_K: [0, 2],
    GGMLQuantizationType.Q6_K: [208],
}
"""Offsets of the 16-bit numbers in a block, by kind. All other bytes may have any value."""

BLOCK_SIZES = {kind: gguf.GGML_QUANT_SIZES[kind] for kind in HALVES}
"""Numbers and bytes of a block, by kind."""

SCALES = (0.01, -0.003, 0.5, 6e-8, 3e-6, 0.0)
"""Two of them are subnormal in 16 bits."""


def gguf_matrix(
    kind: GGMLQuantizationType, n: int, k: int, *, seed: int = 0, scales: tuple[float, ...] = SCALES
) -> GGUFMatrix:
    """Make a matrix at an odd address, directly followed by other data, as in a mapped file."""
    block_size, block_bytes = BLOCK_SIZES[kind]
    generator = np.random.default_rng(seed)
    blocks = generator.integers(0, 256, (n * k // block_size, block_bytes), dtype=np.uint8)
    for at in HALVES[kind]:
        drawn = generator.choice(np.array(scales, np.float16), (len(blocks), 1))
        blocks[:, at : at + 2] = drawn.view(np.uint8)
    memory = torch.zeros(blocks.size + 1, dtype=torch.uint8)
    memory[1:] = torch.from_numpy(blocks.reshape(-1))
    return GGUFMatrix((n, k), kind, memory[1:].view(n, -1))


def int4_matrix(n: int, k: int, group_size: int, *, seed: int = 0) -> Int4Matrix:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 256, (n, k // 2), dtype=torch.uint8, generator=generator)
    scales = torch.randn(n, k // group_size, generator=generator).mul(0.02).half()
    zeros = torch.rand(n, k // group_size, generator=generator).mul(15).half()
    return Int4Matrix((n, k), codes, scales, zeros)


def quantized(x: Tensor) -> Tensor:
    """x as the kernels multiply it, in float64: of each 32 whole numbers up to 127 times a scale."""
    groups = x.float().view(len(x), -1, 32)
    largest = groups.abs().amax(dim=2, keepdim=True)
    # `127 / largest` would be torch's reciprocal times 127, which rounds some ties the other way.
    inverse = torch.where(largest > 0, torch.full_like(largest, 127).div(largest), 0)
    return ((groups * inverse).round().double() * largest.div(127).double()).view(x.shape)


def product(x: Tensor, parts: list[StoredMatrix]) -> Tensor:
    return quantized(x) @ torch.cat([part.dense() for part in parts]).double().T
