"""Attention of sequences with one query token over paged KV, as in flash-decoding (Dao et al., 2023)."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ingine.engine.kernels.triton.kv_int4 import change_basis
from ingine.engine.kernels.triton.paged_kv import PagedKV, attend_tile, is_short_of_registers, tile_arguments

PROGRAMS_PER_SM = 2
"""Programs for each multiprocessor that a GPU needs to read memory at full speed. KV is split to reach this
number. Not tuned."""

MAX_SPLITS = 128

MAX_TOKENS_PER_PROGRAM = 4096
"""Most tokens that a program should read: all others wait for the one that reads most. Not tuned."""

MAX_PROGRAMS_PER_SM = 32
"""Limit for the programs that MAX_TOKENS_PER_PROGRAM asks for. Most programs of short sequences are launched
for nothing, and the partial results of a program take `group_size * head_dim * 4` bytes: 17 MB in all on 132
multiprocessors with groups of 8 heads of 128 dimensions. Not tuned."""


def choose_num_splits(num_seqs: int, num_kv_heads: int, num_sms: int, longest: int) -> int:
    """Return into how many programs the KV of each sequence and head is split: so many that few sequences
    fill the GPU, and that a sequence of `longest` tokens among short ones does not run long after all others.

    The number is a power of two, so that few kernels are compiled. `longest` is an upper bound: a CUDA graph
    keeps the number for all lengths with which it is replayed. A program that a sequence does not need ends
    at once.
    """
    num_rows = num_seqs * num_kv_heads
    to_fill = _power_of_two_under(PROGRAMS_PER_SM * num_sms // num_rows)
    for_longest = triton.next_power_of_2(triton.cdiv(longest, MAX_TOKENS_PER_PROGRAM))
    most = _power_of_two_under(MAX_PROGRAMS_PER_SM * num_sms // num_rows)
    return min(max(to_fill, min(for_longest, most)), MAX_SPLITS)


def _power_of_two_under(number: int) -> int:
    """Return the largest power of two that is at most `number`; at least 1."""
    return 1 << (max(number, 1).bit_length() - 1)


def paged_decode(
    query: Tensor,
    kv: PagedKV,
    block_tables: Tensor,
    seq_lens: Tensor,
    output: Tensor,
    *,
    scale: float,
    sliding_window: int | None,
    num_splits: int,
) -> None:
    """Compute the attention of query [num_seqs, num_heads, head_dim] into output, contiguous and of the same
    shape. block_tables [num_seqs, any] and seq_lens [num_seqs] are int32. The output of a sequence of length
    0 is zeros.
    """
    num_seqs, num_heads, head_dim = query.shape
    num_kv_heads = kv.keys.shape[1]
    partials = log_sums = None
    if num_splits > 1:
        shape = (num_seqs, num_heads, num_splits)
        partials = torch.empty((*shape, head_dim), dtype=torch.float32, device=query.device)
        log_sums = torch.empty(shape, dtype=torch.float32, device=query.device)
    tile = tile_arguments(kv, query, scale)
    window = sliding_window or 0
    group_size = num_heads // num_kv_heads
    _decode_kernel[(num_seqs, num_kv_heads, num_splits)](
        output,
        partials,
        log_sums,
        block_tables,
        block_tables.stride(0),
        seq_lens,
        **tile,
        **kv.launch_arguments(),
        WINDOW=window,
        GROUP_SIZE=group_size,
        BLOCK_G=triton.next_power_of_2(max(group_size, 16)),  # tl.dot takes at least 16
        num_warps=8 if is_short_of_registers(kv, query) else 4,
        num_stages=5,  # its address is loaded first: so one tile is in flight while another is used
    )
    if num_splits > 1:
        block_d, block_s = triton.next_power_of_2(head_dim), triton.next_power_of_2(num_splits)
        _reduce_kernel[(num_seqs, num_heads)](
            output,
            partials,
            log_sums,
            seq_lens,
            num_splits,
            WINDOW=window,
            BLOCK_N=tile["BLOCK_N"],
            HEAD_DIM=head_dim,
            BLOCK_D=block_d,
            STAGES=kv.launch_arguments()["STAGES"],
            BLOCK_S=block_s,
            num_warps=8 if block_s * block_d >= 128 * 256 else 4,  # this size spills registers with 4
        )


@triton.jit
def _kv_range(seq_len, split, num_splits, WINDOW: tl.constexpr, BLOCK_N: tl.constexpr):
    """Return the first KV token of a split and the end of its tokens. All splits have the same number of
    whole tiles while tokens are left. A split is empty if its first token is not before its end.
    """
    begin = 0
    if WINDOW > 0:
        begin = tl.maximum(seq_len - WINDOW, 0)
    split_len = tl.cdiv(tl.cdiv(seq_len - begin, BLOCK_N), num_splits) * BLOCK_N
    first = begin + split * split_len
    return first, tl.minimum(first + split_len, seq_len)


@triton.jit(do_not_specialize=["table_stride"])
def _decode_kernel(
    output,
    partials,
    log_sums,
    block_tables,
    table_stride,
    seq_lens,
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
    BLOCK_G: tl.constexpr,
):
    """A program handles one sequence, one KV head with all its query heads, and one split of the KV."""
    seq, kv_head, split = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    num_kv_heads, num_splits = tl.num_programs(1), tl.num_programs(2)
    seq_len = tl.load(seq_lens + seq)
    first, end = _kv_range(seq_len, split, num_splits, WINDOW, BLOCK_N)
    if partials is not None and first >= end:
        return

    members, dims = tl.arange(0, BLOCK_G), tl.arange(0, BLOCK_D)
    heads = kv_head * GROUP_SIZE + members
    mask = (members < GROUP_SIZE)[:, None] & (dims < HEAD_DIM)[None, :]
    query_offsets = seq * query_stride + heads[:, None] * HEAD_DIM + dims[None, :]
    rows = tl.load(query + query_offsets, mask=mask, other=0.0).to(KEY_DTYPE)
    accumulator = tl.zeros([BLOCK_G, BLOCK_D], dtype=tl.float32)
    row_max = tl.full([BLOCK_G], float("-inf"), dtype=tl.float32)
    row_sum = tl.zeros([BLOCK_G], dtype=tl.float32)
    for tile in range(first, end, BLOCK_N):
        tokens = tile + tl.arange(0, BLOCK_N)
        in_range = tokens < end
        accumulator, row_max, row_sum = attend_tile(
            rows,
            accumulator,
            row_max,
            row_sum,
            tokens,
            in_range,
            in_range[None, :],
            block_tables + seq * table_stride,
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

    head_rows = seq * num_kv_heads * GROUP_SIZE + heads
    if partials is None:
        # An empty sequence gets zeros. If all scores are -inf: 0 / 0, as in the formula.
        attended = accumulator / tl.where(seq_len > 0, row_sum, 1.0)[:, None]
        attended = change_basis(attended, BLOCK_G, BLOCK_D, STAGES)
        offsets = head_rows[:, None] * HEAD_DIM + dims[None, :]
        tl.store(output + offsets, attended.to(output.dtype.element_ty), mask=mask)
    else:
        # All scores of a split may be -inf: then it adds nothing to the other splits.
        row_sum = tl.where(row_sum == 0.0, 1.0, row_sum)
        attended = accumulator / row_sum[:, None]
        split_rows = head_rows * num_splits + split
        tl.store(partials + split_rows[:, None] * HEAD_DIM + dims[None, :], attended, mask=mask)
        tl.store(log_sums + split_rows, row_max + tl.log2(row_sum), mask=members < GROUP_SIZE)


@triton.jit
def _reduce_kernel(
    output,
    partials,
    log_sums,
    seq_lens,
    num_splits,
    WINDOW: tl.constexpr,
    BLOCK_N: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    STAGES: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """A program merges the splits of one sequence and query head. Empty splits wrote nothing."""
    seq = tl.program_id(0).to(tl.int64)
    row = seq * tl.num_programs(1) + tl.program_id(1)
    splits, dims = tl.arange(0, BLOCK_S), tl.arange(0, BLOCK_D)
    seq_len = tl.load(seq_lens + seq)
    first, end = _kv_range(seq_len, splits, num_splits, WINDOW, BLOCK_N)
    used = (splits < num_splits) & (first < end)
    log_sum = tl.load(log_sums + row * num_splits + splits, mask=used, other=float("-inf"))
    largest = tl.max(log_sum, axis=0)
    weights = tl.exp2(log_sum - tl.where(largest == float("-inf"), 0.0, largest))
    offsets = (row * num_splits + splits)[:, None] * HEAD_DIM + dims[None, :]
    mask = used[:, None] & (dims < HEAD_DIM)[None, :]
    attended = tl.sum(tl.load(partials + offsets, mask=mask, other=0.0) * weights[:, None], axis=0)
    attended /= tl.where(seq_len > 0, tl.sum(weights, axis=0), 1.0)  # as without splits
    attended = tl.reshape(change_basis(attended, 1, BLOCK_D, STAGES), (BLOCK_D,))
    tl.store(output + row * HEAD_DIM + dims, attended.to(output.dtype.element_ty), mask=dims < HEAD_DIM)
