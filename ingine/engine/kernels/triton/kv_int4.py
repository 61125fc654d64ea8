"""Stores and loads KV in 4 bits: two codes in a byte, and a scale and a zero for each token and head.
`native/src/kv_int4.h` describes the format.
"""

import triton
import triton.language as tl


@triton.jit
def change_basis(x, ROWS: tl.constexpr, COLUMNS: tl.constexpr, STAGES: tl.constexpr):
    """Multiply each 2^STAGES neighbours of x [ROWS, COLUMNS] float32 by a Hadamard matrix, its own inverse.

    A stage computes sums and differences of neighbours, and puts all sums before all differences (Pease,
    1968). After the last stage each number is in its place again.
    """
    if STAGES > 0:
        BLOCKS: tl.constexpr = ROWS * COLUMNS >> STAGES
        x = tl.reshape(x, (BLOCKS, 1 << STAGES))
        for _ in tl.static_range(STAGES):
            even, odd = tl.split(tl.reshape(x, (BLOCKS, 1 << STAGES - 1, 2)))
            x = tl.reshape(tl.permute(tl.join(even + odd, even - odd), (0, 2, 1)), (BLOCKS, 1 << STAGES))
        x = tl.reshape(x, (ROWS, COLUMNS)) / (1 << STAGES // 2)  # STAGES is even
    return x


@triton.jit
def _round_to_bfloat16(x):
    """Round to the nearest bfloat16, as float32. The interpreter rounds differently, and the codes have to
    fit the stored scale and zero.
    """
    bits = x.to(tl.int32, bitcast=True)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16 << 16).to(tl.float32, bitcast=True)


@triton.jit
def store_int4(
    new,
    cache,
    ranges,
    offsets,
    range_offsets,
    written,
    dims,
    HEAD_DIM: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Quantise and store new [BLOCK_T, BLOCK_D] float32, which is zero beyond HEAD_DIM."""
    new = change_basis(new, BLOCK_T, BLOCK_D, STAGES)
    finite = tl.min((tl.abs(new) < float("inf")).to(tl.int32), axis=1) > 0
    new = tl.where(finite[:, None], new, 0.0)
    within = (dims < HEAD_DIM)[None, :]
    lowest = tl.min(tl.where(within, new, float("inf")), axis=1)
    highest = tl.max(tl.where(within, new, float("-inf")), axis=1)
    zero = _round_to_bfloat16(lowest)
    scale = _round_to_bfloat16((highest - zero) / 15.0)
    # A code cannot represent a number that is not finite, so the scale becomes NaN.
    stored_scale = tl.where(finite, scale, float("nan"))
    tl.store(ranges + 2 * range_offsets, stored_scale.to(tl.bfloat16), mask=written)
    tl.store(ranges + 2 * range_offsets + 1, zero.to(tl.bfloat16), mask=written)

    divisor = tl.maximum(scale, 1.1754943508222875e-38)
    codes = tl.floor((new - zero[:, None]) / divisor[:, None] + 0.5)
    codes = tl.minimum(tl.maximum(codes, 0.0), 15.0).to(tl.uint8)
    even, odd = tl.split(tl.reshape(codes, (BLOCK_T, BLOCK_D // 2, 2)))
    pairs = tl.arange(0, BLOCK_D // 2)
    mask = written[:, None] & (pairs < HEAD_DIM // 2)[None, :]
    tl.store(cache + offsets[:, None] + pairs[None, :], even | (odd << 4), mask=mask)


@triton.jit
def load_codes(
    cache,
    offsets,
    in_range,
    HEAD_DIM: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Load the codes [BLOCK_N, BLOCK_D] of tokens at `offsets` [BLOCK_N]: 0 beyond HEAD_DIM, out of range."""
    pairs = tl.arange(0, BLOCK_D // 2)
    loaded = in_range[:, None] & (pairs < HEAD_DIM // 2)[None, :]
    packed = tl.load(cache + offsets[:, None] + pairs[None, :], mask=loaded, other=0)
    return tl.reshape(tl.join(packed & 15, packed >> 4), (BLOCK_N, BLOCK_D))
