"""The slow reference: attention over paged KV in plain torch, for CPU, CUDA and MPS."""

from dataclasses import dataclass
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor

from ingine.engine.kernels.attention.interface import AttentionBackend, AttentionMetadata, KVCache
from ingine.engine.kernels.layers.rotary import apply_rotary

MAX_GATHERED_BYTES = 256 << 20
"""Most bytes of keys and values, with padding, that decode gathers at a time. A longer sequence is alone."""


@dataclass(slots=True)
class _DecodePlan:
    """A batch of sequences with one query token, whose KV is padded to the longest."""

    queries: slice
    cache_rows: Tensor
    """[num_seqs * num_kv_heads * num_blocks]: indices of the rows of block_size tokens to gather."""
    bias: Tensor
    """[num_seqs, 1, 1, num_blocks * block_size] float32: -inf where a token is not seen."""
    gathered: tuple[Tensor, Tensor]
    """Memory that every layer gathers into: allocating it for each layer costs more than the copy."""


@dataclass(slots=True)
class _PrefillPlan:
    """One sequence with several query tokens."""

    queries: slice
    cache_rows: Tensor | None
    """[num_kv_heads * num_blocks]; None if the sequence has no keys and values but those of the step."""
    kv_len: int
    mask: Tensor | None
    """[query_len, kv_len] bool: True where a token is seen. None: a token sees itself and all before it."""


@dataclass(slots=True)
class _StepPlan:
    write_rows: Tensor
    """[num_tokens * num_kv_heads]: indices at which each head's key and value are written."""
    begun_rows: Tensor | None
    """Indices of rows of block_size tokens to zero first, of blocks that a step begins but does not fill."""
    decodes: list[_DecodePlan]
    prefills: list[_PrefillPlan]


class TorchAttention(AttentionBackend):
    """The reference. Keys and values are [num_blocks, num_kv_heads, block_size, head_dim].

    Since the head comes before the token, gathering rows of block_size tokens in the order (sequence, head,
    block) gives keys in the layout of a batched matrix product. Query heads of one group are rows of one
    product, so keys and values are not repeated.
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
        rotation: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        if rotation is not None:
            query, key = apply_rotary(query, *rotation), apply_rotary(key, *rotation)
        plan = metadata.plan.get(sliding_window)
        if plan is None:
            plan = metadata.plan[sliding_window] = _make_plan(metadata, kv_cache[0], sliding_window)

        for cache, new in zip(kv_cache, (key, value), strict=True):
            if plan.begun_rows is not None:
                cache.flatten(0, 1).index_fill_(0, plan.begun_rows, 0)
            cache.flatten(0, 2).index_copy_(0, plan.write_rows, new.reshape(-1, new.shape[-1]))

        if not plan.prefills and len(plan.decodes) == 1:
            return _decode(query, kv_cache, plan.decodes[0], scale)
        output = torch.empty(query.shape, dtype=query.dtype, device=query.device)
        for decode in plan.decodes:
            output[decode.queries] = _decode(query[decode.queries], kv_cache, decode, scale)
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
    # Scale before the product, which could overflow float16 otherwise.
    grouped = (query * scale).reshape(batch_size, keys.shape[1], -1, head_dim)
    scores = torch.matmul(grouped, keys.transpose(2, 3)).float().add_(plan.bias)
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
    if plan.mask is not None and query.device.type != "cpu":
        # No fused GPU kernel takes both a mask and several query heads for one key head.
        group_size = len(queries) // len(keys)
        keys, values = (new.repeat_interleave(group_size, dim=0) for new in (keys, values))
    attended = F.scaled_dot_product_attention(
        queries[None],
        keys[None],
        values[None],
        attn_mask=plan.mask,
        is_causal=plan.mask is None,
        scale=scale,
        enable_gqa=len(queries) != len(keys),
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
    decodes = _plan_decodes(metadata, key_cache, sliding_window) if metadata.num_decodes else []
    return _StepPlan(write_rows.flatten(), _begun_rows(metadata, key_cache), decodes, prefills)


def _begun_rows(metadata: AttentionMetadata, key_cache: Tensor) -> Tensor | None:
    """Return the rows to zero before the step's writes. Decode reads a sequence's whole last block and
    multiplies masked values by 0, but 0 times a NaN of an earlier sequence is NaN. So a block is zeroed
    before its first token is written.
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


def _plan_decodes(
    metadata: AttentionMetadata, key_cache: Tensor, sliding_window: int | None
) -> list[_DecodePlan]:
    num_kv_heads, block_size, head_dim = key_cache.shape[1:]
    num_blocks = [-(-kv_len // block_size) for kv_len in metadata.kv_lens[: metadata.num_decodes]]
    groups = _group(num_blocks, max_blocks=MAX_GATHERED_BYTES // (2 * key_cache[0].nbytes))
    num_rows = [num_seqs * longest * num_kv_heads for num_seqs, longest in groups]
    gathered = key_cache.new_empty(2, max(num_rows), block_size, head_dim)

    plans, start = [], 0
    for (num_seqs, longest), rows in zip(groups, num_rows, strict=True):
        queries = slice(start, start + num_seqs)
        seen = _seen(metadata.seq_lens[queries, None] - 1, longest * block_size, sliding_window)
        bias = torch.zeros(seen.shape, device=seen.device).masked_fill_(~seen, float("-inf"))
        plans.append(
            _DecodePlan(
                queries,
                _cache_rows(metadata.block_tables[queries, :longest], key_cache),
                bias[:, None, None],
                (gathered[0, :rows], gathered[1, :rows]),
            )
        )
        start += num_seqs
    return plans


def _group(num_blocks: list[int], max_blocks: int) -> list[tuple[int, int]]:
    """Split consecutive sequences into groups that have at most `max_blocks` when padded to their longest.

    Returns for each group its number of sequences and the blocks of its longest. A sequence longer than
    `max_blocks` is a group of its own.
    """
    groups, num_seqs, longest = [], 0, 0
    for blocks in num_blocks:
        if num_seqs and (num_seqs + 1) * max(longest, blocks) > max_blocks:
            groups.append((num_seqs, longest))
            num_seqs, longest = 0, 0
        num_seqs, longest = num_seqs + 1, max(longest, blocks)
    return [*groups, (num_seqs, longest)]


def _plan_prefill(
    metadata: AttentionMetadata, index: int, queries: slice, key_cache: Tensor, sliding_window: int | None
) -> _PrefillPlan:
    kv_len = metadata.kv_lens[index]
    num_computed_tokens = kv_len - metadata.query_lens[index]
    cache_rows = mask = None
    if num_computed_tokens:
        num_blocks = -(-kv_len // key_cache.shape[2])
        cache_rows = _cache_rows(metadata.block_tables[index : index + 1, :num_blocks], key_cache)
    if num_computed_tokens or (sliding_window is not None and sliding_window < kv_len):
        positions = torch.arange(num_computed_tokens, kv_len, device=key_cache.device)
        mask = _seen(positions[:, None], kv_len, sliding_window)
    return _PrefillPlan(queries, cache_rows, kv_len, mask)


def _cache_rows(block_tables: Tensor, key_cache: Tensor) -> Tensor:
    """Convert block tables [B, N] to indices [B * num_kv_heads * N] into the cache as (block, head) rows."""
    num_kv_heads = key_cache.shape[1]
    heads = torch.arange(num_kv_heads, device=key_cache.device)
    return (block_tables[:, None, :].long() * num_kv_heads + heads[:, None]).flatten()


def _seen(positions: Tensor, num_kv_tokens: int, sliding_window: int | None) -> Tensor:
    """Return [Q, num_kv_tokens] bool: the KV tokens that a query at each of positions [Q, 1] sees."""
    kv_positions = torch.arange(num_kv_tokens, device=positions.device)
    seen = kv_positions <= positions
    if sliding_window is not None:
        seen &= kv_positions > positions - sliding_window
    return seen
