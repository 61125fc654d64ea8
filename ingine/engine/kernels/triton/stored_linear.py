"""Products with weights that stay quantised in memory: int4, int8 or fp8 (E4M3).

A tile of weights is made dense in registers, rounded to the type of x as a dense copy of the matrix would be,
and multiplied by tensor cores into float32. fp8 is decoded from its bits, so that every GPU can run it.
"""

import triton
import triton.language as tl


@triton.jit
def stored_linear_kernel(
    x_ptr,
    numbers_ptr,
    scales_ptr,
    zeros_ptr,
    bias_ptr,
    out_ptr,
    num_rows,
    n,
    k,
    row_bytes,
    group_size,
    piece_size,
    num_pieces,
    KIND: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    SPLIT: tl.constexpr,
    DOT_DTYPE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Program (outputs, rows, piece) computes out[rows, outputs] for x [num_rows, k]; numbers are [n,
    row_bytes].

    Columns are summed piece by piece, each piece from zero, in the same order for any number of rows. With
    SPLIT a program computes one piece, and out is float32 [num_pieces, num_rows, n], for `sum_pieces_kernel`.

    scales and zeros are [groups, n]; BLOCK_K divides `group_size`, or there is one group. A row of int4 is a
    row of tiles of 2 * BLOCK_K columns: byte i of a tile holds its columns i and, in the high bits,
    BLOCK_K + i.
    """
    rows = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    outputs = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    x_rows = x_ptr + rows.to(tl.int64)[:, None] * k
    weight_rows = numbers_ptr + outputs.to(tl.int64)[None, :] * row_bytes
    is_row, is_output = (rows < num_rows)[:, None], (outputs < n)[None, :]
    inner = tl.arange(0, BLOCK_K)
    first = tl.program_id(2) if SPLIT else 0
    last = first + 1 if SPLIT else num_pieces
    step: tl.constexpr = 2 * BLOCK_K if KIND == "int4" else BLOCK_K
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for piece in range(first, last):
        accumulator = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        start = piece * piece_size
        for column in range(start, tl.minimum(start + piece_size, k), step):
            if KIND == "int4":
                both = tl.load(weight_rows + (column // 2 + inner)[:, None], mask=is_output, other=0)
                for half in tl.static_range(2):
                    columns = column + half * BLOCK_K + inner
                    # The last half tile may begin beyond the matrix. x is 0 there, so any group will do.
                    group = tl.minimum(column + half * BLOCK_K, k - 1) // group_size * n + outputs
                    scales = tl.load(scales_ptr + group, mask=outputs < n, other=0.0).to(tl.float32)
                    zeros = tl.load(zeros_ptr + group, mask=outputs < n, other=0.0).to(tl.float32)
                    codes = (both >> 4) if half == 1 else (both & 15)
                    weight = (codes.to(tl.float32) - zeros[None, :]) * scales[None, :]
                    x = tl.load(x_rows + columns[None, :], mask=is_row & (columns < k)[None, :], other=0.0)
                    accumulator = _dot(x, weight, accumulator, DOT_DTYPE)
            else:
                columns = column + inner
                inside = is_output & (columns < k)[:, None]
                stored = tl.load(weight_rows + columns[:, None], mask=inside, other=0)
                group = column // group_size * n + outputs
                scales = tl.load(scales_ptr + group, mask=outputs < n, other=0.0)
                weight = (_fp8_to_float32(stored) if KIND == "fp8" else stored.to(tl.float32)) * scales[
                    None, :
                ]
                x = tl.load(x_rows + columns[None, :], mask=is_row & (columns < k)[None, :], other=0.0)
                accumulator = _dot(x, weight, accumulator, DOT_DTYPE)
        total += accumulator
    offsets = rows.to(tl.int64)[:, None] * n + outputs[None, :]
    if SPLIT:
        out_ptr += first.to(tl.int64) * num_rows * n
    elif HAS_BIAS:
        total += tl.load(bias_ptr + outputs, mask=outputs < n, other=0.0).to(tl.float32)[None, :]
    tl.store(out_ptr + offsets, total.to(out_ptr.dtype.element_ty), mask=is_row & is_output)


@triton.jit
def _dot(x, weight, accumulator, DOT_DTYPE: tl.constexpr):
    """Multiply x by `weight` rounded to the type of x. DOT_DTYPE is that type, except in the interpreter."""
    rounded = weight.to(x.dtype).to(DOT_DTYPE)
    return tl.dot(x.to(DOT_DTYPE), rounded, accumulator, input_precision="ieee")


@triton.jit
def _fp8_to_float32(stored):
    """Convert bits of E4M3 through float16, whose exponent bias is 8 larger; this holds for subnormals too.
    All ones are NaN, and there are no infinities.
    """
    bits = stored.to(tl.uint16)
    half = ((bits & 0x80) << 8) | ((bits & 0x7F) << 7)
    number = half.to(tl.float16, bitcast=True).to(tl.float32) * 256.0
    return tl.where((bits & 0x7F) == 0x7F, float("nan"), number)


@triton.jit
def sum_pieces_kernel(
    pieces_ptr, bias_ptr, out_ptr, n, size, num_pieces, HAS_BIAS: tl.constexpr, BLOCK: tl.constexpr
):
    """Sum float32 pieces [num_pieces, size] and bias [n] into out [size]; `size` is a multiple of `n`."""
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = offsets < size
    total = tl.zeros((BLOCK,), tl.float32)
    pieces = pieces_ptr + offsets
    for _ in range(num_pieces):
        total += tl.load(pieces, mask=inside, other=0.0)
        pieces += size
    if HAS_BIAS:
        total += tl.load(bias_ptr + offsets % n, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + offsets, total.to(out_ptr.dtype.element_ty), mask=inside)
