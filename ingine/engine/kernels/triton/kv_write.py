"""Applies the rotary embedding and writes keys and values to paged memory, in one pass."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ingine.engine.kernels.triton.kv_int4 import change_basis, store_int4
from ingine.engine.kernels.triton.paged_kv import PagedKV

LARGEST = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}
"""The quantised value of the largest magnitude in a token's head, by dtype."""

BLOCK_T = 8
"""Number of tokens of a program. Not tuned."""


def write_kv(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rotation: tuple[Tensor, Tensor] | None,
    slot_mapping: Tensor,
    kv: PagedKV,
) -> Tensor:
    """Write each token's rotated keys and its values to the token's slot; a slot of -1 is not written.

    Shapes are those of `AttentionBackend.forward`. Returns the rotated queries, contiguous and in the basis
    of the keys, or `query` itself if it does not change. Rounds once, where `apply_rotary` rounds twice.
    """
    num_tokens, num_heads = query.shape[:2]
    cos, sin = rotation or (None, None)
    rotated, num_rotated_heads = query, 0
    if rotation is not None or kv.is_int4:
        rotated = torch.empty(query.shape, dtype=query.dtype, device=query.device)
        num_rotated_heads = num_heads
    num_kv_heads = key.shape[1]
    _write_kernel[(triton.cdiv(num_tokens, BLOCK_T), num_rotated_heads + num_kv_heads)](
        rotated,
        query,
        key,
        value,
        cos,
        sin,
        slot_mapping,
        num_tokens,
        num_rotated_heads,
        num_kv_heads,
        query.stride(0),
        key.stride(0),
        value.stride(0),
        **kv.launch_arguments(),
        BLOCK_T=BLOCK_T,
        LARGEST=LARGEST.get(kv.keys.dtype),
        num_warps=4,
    )
    return rotated


@triton.jit(do_not_specialize=["num_tokens"])
def _write_kernel(
    rotated,
    query,
    key,
    value,
    cos,
    sin,
    slot_mapping,
    num_tokens,
    num_rotated_heads,
    num_kv_heads,
    query_stride,
    key_stride,
    value_stride,
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
    BLOCK_T: tl.constexpr,
    LARGEST: tl.constexpr,
):
    """A program handles BLOCK_T tokens of one head. Heads of queries come first, if they are rotated."""
    tokens = (tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)).to(tl.int64)
    head = tl.program_id(1)
    dims = tl.arange(0, BLOCK_D)
    is_token = tokens < num_tokens
    mask = is_token[:, None] & (dims < HEAD_DIM)[None, :]
    if head < num_rotated_heads:
        rows = query + tokens * query_stride + head * HEAD_DIM
        turned = _load_rotated(rows, cos, sin, tokens, dims, mask, HEAD_DIM)
        turned = change_basis(turned, BLOCK_T, BLOCK_D, STAGES)
        out = (tokens * num_rotated_heads + head) * HEAD_DIM
        tl.store(rotated + out[:, None] + dims[None, :], turned.to(rotated.dtype.element_ty), mask=mask)
    else:
        head -= num_rotated_heads
        slots = tl.load(slot_mapping + tokens, mask=is_token, other=-1)
        written = slots >= 0
        blocks, places = slots // BLOCK_SIZE, slots % BLOCK_SIZE
        offsets = blocks * block_stride + head * head_stride + places * token_stride
        scale_offsets = (blocks * num_kv_heads + head) * BLOCK_SIZE + places
        key_rows = key + tokens * key_stride + head * HEAD_DIM
        new_keys = _load_rotated(key_rows, cos, sin, tokens, dims, mask, HEAD_DIM)
        value_rows = value + tokens * value_stride + head * HEAD_DIM
        new_values = tl.load(value_rows[:, None] + dims[None, :], mask=mask, other=0.0).to(tl.float32)
        if keys.dtype.element_ty == tl.uint8:
            store_int4(
                new_keys,
                keys,
                key_scales,
                offsets,
                scale_offsets,
                written,
                dims,
                HEAD_DIM,
                BLOCK_T,
                BLOCK_D,
                STAGES,
            )
            store_int4(
                new_values,
                values,
                value_scales,
                offsets,
                scale_offsets,
                written,
                dims,
                HEAD_DIM,
                BLOCK_T,
                BLOCK_D,
                STAGES,
            )
        else:
            _store(new_keys, keys, key_scales, offsets, scale_offsets, written, dims, HEAD_DIM, LARGEST)
            _store(new_values, values, value_scales, offsets, scale_offsets, written, dims, HEAD_DIM, LARGEST)


@triton.jit
def _load_rotated(rows, cos, sin, tokens, dims, mask, HEAD_DIM: tl.constexpr):
    """Load one head of each token as float32 [BLOCK_T, BLOCK_D], rotated if `cos` is not None."""
    loaded = tl.load(rows[:, None] + dims[None, :], mask=mask, other=0.0).to(tl.float32)
    if cos is not None:
        swapped = tl.where(dims < HEAD_DIM // 2, dims + HEAD_DIM // 2, dims - HEAD_DIM // 2)
        other_half = tl.load(rows[:, None] + swapped[None, :], mask=mask, other=0.0).to(tl.float32)
        angles = tokens[:, None] * HEAD_DIM + dims[None, :]
        loaded = loaded * tl.load(cos + angles, mask=mask, other=0.0).to(tl.float32)
        # As in `RotaryEmbedding`, the sign of the swapped halves is in `sin`.
        loaded += other_half * tl.load(sin + angles, mask=mask, other=0.0).to(tl.float32)
    return loaded


@triton.jit
def _store(
    new,
    cache,
    scales,
    offsets,
    scale_offsets,
    written,
    dims,
    HEAD_DIM: tl.constexpr,
    LARGEST: tl.constexpr,
):
    """Store new [BLOCK_T, BLOCK_D] float32, zero beyond HEAD_DIM; quantise it if there are scales."""
    if scales is not None:
        # An int8 cannot represent a number that is not finite, so the scale becomes NaN.
        finite = tl.min((tl.abs(new) < float("inf")).to(tl.int32), axis=1) > 0
        scale = tl.maximum(tl.max(tl.abs(new), axis=1) / LARGEST, 1.1754943508222875e-38)
        tl.store(scales + scale_offsets, tl.where(finite, scale, float("nan")), mask=written)
        new = tl.where(finite[:, None], new / scale[:, None], 0.0)
        if cache.dtype.element_ty == tl.int8:
            new = tl.floor(new + 0.5)
    mask = written[:, None] & (dims < HEAD_DIM)[None, :]
    tl.store(cache + offsets[:, None] + dims[None, :], new.to(cache.dtype.element_ty), mask=mask)
