"""A layer's paged keys and values as arguments of the attention kernels, and the tile that these share."""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ingine.engine.kernels.layers.int8 import rotation_size
from ingine.engine.kernels.triton.kv_int4 import load_codes

MAX_HEAD_DIM = 256
"""Largest head_dim of the kernels: wider tiles do not fit into shared memory."""

TILE_BYTES = 16 << 10
"""Bytes of keys, in the query's dtype, that a program holds at a time; values take as many. Not tuned."""

_TRITON_DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


class PagedKV(NamedTuple):
    """Views with the shapes below, in any order in memory. `keys` and `values` have the same strides and a
    contiguous last dimension; the scales are contiguous.
    """

    keys: Tensor
    """[num_blocks, num_kv_heads, block_size, head_dim]; [..., head_dim / 2] uint8 in 4 bits."""
    values: Tensor
    key_scales: Tensor | None = None
    """[num_blocks, num_kv_heads, block_size] float32 if keys are stored divided by a scale; [..., 2]
    bfloat16, scale and zero, in 4 bits."""
    value_scales: Tensor | None = None

    @property
    def is_int4(self) -> bool:
        return self.keys.dtype == torch.uint8

    def launch_arguments(self) -> dict[str, object]:
        """Return the arguments of every kernel that reads or writes the KV memory."""
        block_stride, head_stride, token_stride, _ = self.keys.stride()
        head_dim = self.keys.shape[3] * (2 if self.is_int4 else 1)
        return {
            **self._asdict(),
            "block_stride": block_stride,
            "head_stride": head_stride,
            "token_stride": token_stride,
            "BLOCK_SIZE": self.keys.shape[2],
            "HEAD_DIM": head_dim,
            "BLOCK_D": triton.next_power_of_2(max(head_dim, 16)),
            # The stages of the change of basis in which keys and values are stored.
            "STAGES": rotation_size(head_dim).bit_length() - 1 if self.is_int4 else 0,
        }


def is_short_of_registers(kv: PagedKV, query: Tensor) -> bool:
    """Return whether a program converts quantised KV to float32. It then has half the tile and 8 warps:
    otherwise the compiler spills thousands of bytes for each thread.
    """
    return kv.key_scales is not None and query.dtype == torch.float32


def tile_arguments(kv: PagedKV, query: Tensor, scale: float) -> dict[str, object]:
    """Return the other arguments of a kernel that calls `attend_tile`."""
    key_dtype = value_dtype = _TRITON_DTYPES[query.dtype]
    if kv.value_scales is not None and query.dtype == torch.float16:
        # Softmax weights times the scales of values may underflow in float16.
        value_dtype = tl.bfloat16
    if triton.knobs.runtime.interpret:
        # The interpreter multiplies the bits of bfloat16 as if they were integers.
        key_dtype = value_dtype = tl.float32
    block_d = triton.next_power_of_2(max(query.shape[2], 16))
    tile_bytes = TILE_BYTES // (2 if is_short_of_registers(kv, query) else 1)
    return {
        "query": query,
        "query_stride": query.stride(0),
        "scale_log2": scale * 1.4426950408889634,  # log2(e): exp2 is what the hardware has
        "BLOCK_N": min(max(tile_bytes // (block_d * query.dtype.itemsize), 16), 64),
        "KEY_DTYPE": key_dtype,
        "VALUE_DTYPE": value_dtype,
    }


@triton.jit
def attend_tile(
    query,
    accumulator,
    row_max,
    row_sum,
    tokens,
    in_range,
    seen,
    block_table,
    kv_head,
    num_kv_heads,
    scale_log2,
    keys,
    values,
    key_scales,
    value_scales,
    block_stride,
    head_stride,
    token_stride,
    BLOCK_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    KEY_DTYPE: tl.constexpr,
    VALUE_DTYPE: tl.constexpr,
):
    """Compute one step of the online softmax (Milakov and Gimelshein, 2018) over a tile of KV tokens.

    query is [M, BLOCK_D] of KEY_DTYPE; `tokens` [N] are positions in the sequence of `block_table`. Only
    tokens `in_range` [N] are loaded, so that free memory is never computed with. Each row sees those of them
    that are `seen` ([M, N] or [1, N]). Returns the new accumulator [M, BLOCK_D], row_max and row_sum [M].
    """
    blocks = tl.load(block_table + tokens // BLOCK_SIZE, mask=in_range, other=0).to(tl.int64)
    dims = tl.arange(0, BLOCK_D)
    offsets = blocks * block_stride + kv_head * head_stride + (tokens % BLOCK_SIZE) * token_stride
    IS_INT4: tl.constexpr = keys.dtype.element_ty == tl.uint8
    element_offsets = offsets[:, None] + dims[None, :]
    loaded = in_range[:, None] & (dims < HEAD_DIM)[None, :]

    if IS_INT4:
        key = load_codes(keys, offsets, in_range, HEAD_DIM, tokens.shape[0], BLOCK_D).to(KEY_DTYPE)
    else:
        key = tl.load(keys + element_offsets, mask=loaded, other=0.0).to(KEY_DTYPE)
    scores = tl.dot(query, tl.trans(key), input_precision="ieee") * scale_log2
    scale_offsets = (blocks * num_kv_heads + kv_head) * BLOCK_SIZE + tokens % BLOCK_SIZE
    if IS_INT4:
        scores *= tl.load(key_scales + 2 * scale_offsets, mask=in_range, other=0.0).to(tl.float32)[None, :]
        zeros = tl.load(key_scales + 2 * scale_offsets + 1, mask=in_range, other=0.0).to(tl.float32)
        scores += (tl.sum(query.to(tl.float32), axis=1) * scale_log2)[:, None] * zeros[None, :]
    elif key_scales is not None:
        scores *= tl.load(key_scales + scale_offsets, mask=in_range, other=0.0)[None, :]
    scores = tl.where(seen, scores, float("-inf"))

    new_max = tl.maximum(row_max, tl.max(scores, axis=1))
    # In a row that has seen no token yet, -inf minus -inf would be NaN.
    shift = tl.where(new_max == float("-inf"), 0.0, new_max)
    weights = tl.exp2(scores - shift[:, None])
    correction = tl.exp2(row_max - shift)
    row_sum = row_sum * correction + tl.sum(weights, axis=1)
    accumulator *= correction[:, None]
    if IS_INT4:
        zeros = tl.load(value_scales + 2 * scale_offsets + 1, mask=in_range, other=0.0).to(tl.float32)
        accumulator += tl.sum(weights * zeros[None, :], axis=1)[:, None]
        weights *= tl.load(value_scales + 2 * scale_offsets, mask=in_range, other=0.0).to(tl.float32)[None, :]
        value = load_codes(values, offsets, in_range, HEAD_DIM, tokens.shape[0], BLOCK_D).to(VALUE_DTYPE)
    else:
        if value_scales is not None:
            weights *= tl.load(value_scales + scale_offsets, mask=in_range, other=0.0)[None, :]
        value = tl.load(values + element_offsets, mask=loaded, other=0.0).to(VALUE_DTYPE)
    accumulator = tl.dot(weights.to(VALUE_DTYPE), value, accumulator, input_precision="ieee")
    return accumulator, new_max, row_sum
