"""The slow reference: attention over paged KV in plain torch, for CPU, CUDA and MPS."""

from dataclasses import dataclass
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor

from ingine.attention.interface import AttentionBackend, AttentionMetadata, KVCache


@dataclass(slots=True)
class _DecodePlan:
    """The sequences with one query token, as one batch over their KV, padded to the longest."""

    cache_rows: Tensor
    """[num_decodes * num_kv_heads * num_blocks]: which rows of block_size tokens to gather."""
    bias: Tensor
    """[num_decodes, 1, 1, num_blocks * block_size] float32: -inf where a token is not seen."""
    gathered: KVCache
    """Where every layer of the step gathers to: fresh memory a layer costs more than the copy itself."""


@dataclass(slots=True)
class _PrefillPlan:
    """One sequence with several query tokens."""

    queries: slice
    cache_rows: Tensor | None
    """[num_kv_heads * num_blocks]; None when the step's own keys and values are all there is to see."""
    kv_len: int
    mask: Tensor
    """[query_len, kv_len] bool: True where a token is seen."""


@dataclass(slots=True)
class _StepPlan:
    write_rows: Tensor
    """[num_tokens * num_kv_heads]: where each head's key and value go."""
    begun_rows: Tensor | None
    """Which rows of block_size tokens to zero first: of the blocks that the step begins and does not fill."""
    decode: _DecodePlan | None
    prefills: list[_PrefillPlan]


class TorchAttention(AttentionBackend):
    """Keys and values are [num_blocks, num_kv_heads, block_size, head_dim].

    With the head before the token, gathering rows of block_size tokens in the order (sequence, head, block)
    yields keys that a batched matrix product takes as they lie. Query heads of one group become rows of one
    product, so keys and values are never repeated.
    """

    name = "torch"

    def allocate_kv_cache(
        self,
        num_blocks: int,
        block_size: int,
        num_kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> KVCache:
        shape = (num_blocks, num_kv_heads, block_size, head_dim)
        return torch.empty(shape, dtype=dtype, device=device), torch.empty(shape, dtype=dtype, device=device)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: KVCache,
        metadata: AttentionMetadata,
        *,
        scale: float,
        sliding_window: int | None,
    ) -> Tensor:
        plan = metadata.plan.get(sliding_window)
        if plan is None:
            plan = metadata.plan[sliding_window] = _make_plan(metadata, kv_cache[0], sliding_window)

        for cache, new in zip(kv_cache, (key, value), strict=True):
            if plan.begun_rows is not None:
                cache.flatten(0, 1).index_fill_(0, plan.begun_rows, 0)
            cache.flatten(0, 2).index_copy_(0, plan.write_rows, new.reshape(-1, new.shape[-1]))

        num_decodes = metadata.num_decodes
        if not plan.prefills:
            return _decode(query, kv_cache, plan.decode, scale)
        output = torch.empty(query.shape, dtype=query.dtype, device=query.device)
        if plan.decode is not None:
            output[:num_decodes] = _decode(query[:num_decodes], kv_cache, plan.decode, scale)
        for prefill in plan.prefills:
            output[prefill.queries] = _prefill(query, key, value, kv_cache, prefill, scale)
        return output


def _decode(query: Tensor, kv_cache: KVCache, plan: _DecodePlan, scale: float) -> Tensor:
    batch_size, num_heads, head_dim = query.shape
    keys, values = (
        torch.index_select(cache.flatten(0, 1), 0, plan.cache_rows, out=out).view(
            batch_size, -1, plan.bias.shape[-1], head_dim
        )
        for cache, out in zip(kv_cache, plan.gathered, strict=True)
    )
    grouped = query.reshape(batch_size, keys.shape[1], -1, head_dim)
    scores = torch.matmul(grouped, keys.transpose(2, 3)).float().mul_(scale).add_(plan.bias)
    weights = torch.softmax(scores, dim=-1).to(values.dtype)
    return torch.matmul(weights, values).view(batch_size, num_heads, head_dim)


def _prefill(
    query: Tensor, key: Tensor, value: Tensor, kv_cache: KVCache, plan: _PrefillPlan, scale: float
) -> Tensor:
    if plan.cache_rows is None:
        keys, values = (new[plan.queries].transpose(0, 1) for new in (key, value))
    else:
        num_kv_heads, head_dim = key.shape[1:]
        keys, values = (
            cache.flatten(0, 1)[plan.cache_rows].view(num_kv_heads, -1, head_dim)[:, : plan.kv_len]
            for cache in kv_cache
        )
    queries = query[plan.queries].transpose(0, 1)
    attended = F.scaled_dot_product_attention(
        queries[None], keys[None], values[None], attn_mask=plan.mask, scale=scale, enable_gqa=True
    )
    return attended[0].transpose(0, 1)


def _make_plan(metadata: AttentionMetadata, key_cache: Tensor, sliding_window: int | None) -> _StepPlan:
    num_kv_heads, block_size = key_cache.shape[1:3]
    heads = torch.arange(num_kv_heads, device=key_cache.device)
    blocks, offsets = metadata.slot_mapping // block_size, metadata.slot_mapping % block_size
    write_rows = (blocks[:, None] * num_kv_heads + heads) * block_size + offsets[:, None]

    prefills, start = [], metadata.num_decodes
    for index in range(metadata.num_decodes, len(metadata.query_lens)):
        query_len = metadata.query_lens[index]
        queries = slice(start, start + query_len)
        prefills.append(_plan_prefill(metadata, index, queries, key_cache, sliding_window))
        start += query_len
    decode = _plan_decode(metadata, key_cache, sliding_window) if metadata.num_decodes else None
    return _StepPlan(write_rows.flatten(), _begun_rows(metadata, key_cache), decode, prefills)


def _begun_rows(metadata: AttentionMetadata, key_cache: Tensor) -> Tensor | None:
    """Decode reads a sequence's last block whole. What is masked there is multiplied by 0, and 0 times the
    NaN of an earlier sequence is NaN: so a block is zeroed before its first token is written.
    """
    block_size = key_cache.shape[2]
    last_slots = [
        end - 1
        for end, query_len, kv_len in zip(
            accumulate(metadata.query_lens), metadata.query_lens, metadata.kv_lens, strict=True
        )
        if 0 < kv_len % block_size <= query_len
    ]
    if not last_slots:
        return None
    last_slots = torch.tensor(last_slots, device=key_cache.device)
    return _cache_rows(metadata.slot_mapping[last_slots, None] // block_size, key_cache)


def _plan_decode(metadata: AttentionMetadata, key_cache: Tensor, sliding_window: int | None) -> _DecodePlan:
    block_size, head_dim = key_cache.shape[2:]
    num_decodes = metadata.num_decodes
    num_blocks = -(-max(metadata.kv_lens[:num_decodes]) // block_size)
    cache_rows = _cache_rows(metadata.block_tables[:num_decodes, :num_blocks], key_cache)

    kv_lens = metadata.seq_lens[:num_decodes, None]
    seen = _seen(kv_lens - 1, num_blocks * block_size, sliding_window)
    bias = torch.zeros(seen.shape, device=seen.device).masked_fill_(~seen, float("-inf"))
    gathered = key_cache.new_empty(2, len(cache_rows), block_size, head_dim)
    return _DecodePlan(cache_rows, bias[:, None, None], (gathered[0], gathered[1]))


def _plan_prefill(
    metadata: AttentionMetadata, index: int, queries: slice, key_cache: Tensor, sliding_window: int | None
) -> _PrefillPlan:
    kv_len = metadata.kv_lens[index]
    num_computed_tokens = kv_len - metadata.query_lens[index]
    positions = torch.arange(num_computed_tokens, kv_len, device=key_cache.device)
    cache_rows = None
    if num_computed_tokens:
        num_blocks = -(-kv_len // key_cache.shape[2])
        cache_rows = _cache_rows(metadata.block_tables[index : index + 1, :num_blocks], key_cache)
    return _PrefillPlan(queries, cache_rows, kv_len, _seen(positions[:, None], kv_len, sliding_window))


def _cache_rows(block_tables: Tensor, key_cache: Tensor) -> Tensor:
    """Block tables [B, N] -> indices [B * num_kv_heads * N] into the cache seen as (block, head) rows."""
    num_kv_heads = key_cache.shape[1]
    heads = torch.arange(num_kv_heads, device=key_cache.device)
    return (block_tables[:, None, :].long() * num_kv_heads + heads[:, None]).flatten()


def _seen(positions: Tensor, num_kv_tokens: int, sliding_window: int | None) -> Tensor:
    """Query positions [Q, 1] -> [Q, num_kv_tokens] bool: the KV tokens that each may look at."""
    kv_positions = torch.arange(num_kv_tokens, device=positions.device)
    seen = kv_positions <= positions
    if sliding_window is not None:
        seen &= kv_positions > positions - sliding_window
    return seen
