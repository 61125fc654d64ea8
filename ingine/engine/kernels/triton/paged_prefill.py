"""Causal attention of sequences with several query tokens over paged KV (FlashAttention-2, Dao, 2023)."""

import triton
import triton.language as tl
from torch import Tensor

from ingine.engine.kernels.triton.kv_int4 import change_basis
from ingine.engine.kernels.triton.paged_kv import PagedKV, attend_tile, is_short_of_registers, tile_arguments

MAX_ROWS = {4: 32, 2: 128}
"""Largest number of query rows, each one token and head, of a program, by item size. Not tuned."""


def paged_prefill(
    query: Tensor,
    kv: PagedKV,
    block_tables: Tensor,
    seq_lens: Tensor,
    query_start_loc: Tensor,
    output: Tensor,
    *,
    num_decodes: int,
    max_query_len: int,
    scale: float,
    sliding_window: int | None,
) -> None:
    """Compute the attention of all sequences after the first `num_decodes`, in the order of
    `AttentionMetadata`.

    query and output are [num_tokens, num_heads, head_dim], output contiguous; max_query_len is the most query
    tokens of a sequence. A query tile belongs to one sequence, which its program finds on the device.
    """
    num_tokens, num_heads, head_dim = query.shape
    num_kv_heads = kv.keys.shape[1]
    num_seqs = len(seq_lens)
    group_size = num_heads // num_kv_heads
    most = MAX_ROWS[query.dtype.itemsize] // (2 if head_dim > 128 else 1)
    block_m = triton.next_power_of_2(max(min(max_query_len * group_size, most), group_size, 16))
    block_q = block_m // group_size
    # Each sequence starts a tile and may leave one empty: see `_find_seq`.
    num_tiles = (num_tokens - num_decodes) // block_q + num_seqs - num_decodes
    _prefill_kernel[(num_tiles, num_kv_heads)](
        output,
        block_tables,
        block_tables.stride(0),
        seq_lens,
        query_start_loc,
        num_decodes,
        num_seqs,
        **tile_arguments(kv, query, scale),
        **kv.launch_arguments(),
        WINDOW=sliding_window or 0,
        GROUP_SIZE=group_size,
        BLOCK_M=block_m,
        BLOCK_Q=block_q,
        num_warps=8 if block_m > 64 or is_short_of_registers(kv, query) else 4,
        num_stages=3,
    )


@triton.jit
def _find_seq(query_start_loc, tile, num_decodes, num_seqs, BLOCK_Q: tl.constexpr):
    """Return the sequence of a query tile, and the tile's index in it.

    The first tile of sequence i is the number of whole tiles in the tokens before it, plus one for each
    sequence before it. Those never need more, and no table is needed. Decodes, of one token each, are left
    out.
    """
    low, high = num_decodes, num_seqs
    while high - low > 1:
        middle = (low + high) // 2
        first_tile = (tl.load(query_start_loc + middle) - num_decodes) // BLOCK_Q + middle - num_decodes
        low = tl.where(first_tile <= tile, middle, low)
        high = tl.where(first_tile <= tile, high, middle)
    first_tile = (tl.load(query_start_loc + low) - num_decodes) // BLOCK_Q + low - num_decodes
    return low, tile - first_tile


@triton.jit(do_not_specialize=["table_stride", "num_decodes", "num_seqs"])
def _prefill_kernel(
    output,
    block_tables,
    table_stride,
    seq_lens,
    query_start_loc,
    num_decodes,
    num_seqs,
    query,
    query_stride,
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
    STAGES: tl.constexpr,
    BLOCK_N: tl.constexpr,
    KEY_DTYPE: tl.constexpr,
    VALUE_DTYPE: tl.constexpr,
    WINDOW: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_Q: tl.constexpr,
):
    """A program handles BLOCK_Q query tokens of one sequence, with all query heads of one KV head.

    A row is one token and head, so loaded keys and values serve the whole group.
    """
    kv_head, num_kv_heads = tl.program_id(1), tl.num_programs(1)
    seq, tile_in_seq = _find_seq(query_start_loc, tl.program_id(0), num_decodes, num_seqs, BLOCK_Q)
    query_start = tl.load(query_start_loc + seq)
    query_len = tl.load(query_start_loc + seq + 1) - query_start
    first_query = tile_in_seq * BLOCK_Q
    if first_query >= query_len:
        return

    rows, dims = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
    query_tokens = first_query + rows // GROUP_SIZE
    heads = kv_head * GROUP_SIZE + rows % GROUP_SIZE
    is_row = (rows < BLOCK_Q * GROUP_SIZE) & (query_tokens < query_len)
    mask = is_row[:, None] & (dims < HEAD_DIM)[None, :]
    packed = (query_start + query_tokens).to(tl.int64)
    query_offsets = packed * query_stride + heads * HEAD_DIM
    query_tile = tl.load(query + query_offsets[:, None] + dims[None, :], mask=mask, other=0.0)
    query_tile = query_tile.to(KEY_DTYPE)

    num_computed_tokens = tl.load(seq_lens + seq) - query_len
    positions = num_computed_tokens + query_tokens
    end = num_computed_tokens + tl.minimum(first_query + BLOCK_Q, query_len)
    first = 0
    if WINDOW > 0:
        first = tl.maximum(num_computed_tokens + first_query - WINDOW + 1, 0)
    accumulator = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)
    row_max = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)
    row_sum = tl.zeros([BLOCK_M], dtype=tl.float32)
    for tile in range(first, end, BLOCK_N):
        tokens = tile + tl.arange(0, BLOCK_N)
        seen = tokens[None, :] <= positions[:, None]
        if WINDOW > 0:
            seen &= tokens[None, :] > positions[:, None] - WINDOW
        accumulator, row_max, row_sum = attend_tile(
            query_tile,
            accumulator,
            row_max,
            row_sum,
            tokens,
            tokens < end,
            seen & is_row[:, None],
            block_tables + seq.to(tl.int64) * table_stride,
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
            BLOCK_SIZE,
            HEAD_DIM,
            BLOCK_D,
            KEY_DTYPE,
            VALUE_DTYPE,
        )

    # A padding row has seen no token. A row whose scores are all -inf gets 0 / 0, as in the formula.
    attended = accumulator / tl.where(is_row, row_sum, 1.0)[:, None]
    attended = change_basis(attended, BLOCK_M, BLOCK_D, STAGES)
    offsets = (packed * num_kv_heads * GROUP_SIZE + heads) * HEAD_DIM
    tl.store(output + offsets[:, None] + dims[None, :], attended.to(output.dtype.element_ty), mask=mask)
