"""Paged attention on CUDA, in Triton: `ingine/engine/kernels/triton`."""

from functools import cache

import torch
from torch import Tensor

from ingine.engine.kernels.attention.interface import AttentionBackend, AttentionMetadata, KVCache
from ingine.engine.kernels.triton.kv_write import write_kv
from ingine.engine.kernels.triton.paged_decode import choose_num_splits, paged_decode
from ingine.engine.kernels.triton.paged_kv import MAX_HEAD_DIM, PagedKV
from ingine.engine.kernels.triton.paged_prefill import paged_prefill

QUANTIZED_DTYPES = {"int8": torch.int8, "fp8": torch.float8_e4m3fn, "int4": torch.uint8}
"""The stored dtype for each `kv_cache_dtype`. A byte holds two int4."""

INTERPRETER_SMS = 2
"""Number of multiprocessors that the CPU stands for in triton's interpreter: so few that KV is split only if
there is one sequence."""


class TritonAttention(AttentionBackend):
    """Attention for float32, bfloat16 and float16. A step is one launch that writes keys and values, one for
    all decodes (two where their KV is split) and one for all other sequences. Nothing waits for the device.

    Keys and values are [num_blocks, num_kv_heads, block_size, head_dim]. They are followed, for int8 and fp8,
    by the float32 scales of keys and of values, one for each token and KV head; for int4 by a scale and a
    zero in bfloat16.
    """

    can_be_captured = True

    @staticmethod
    def supports(head_dim: int) -> bool:
        return head_dim <= MAX_HEAD_DIM

    def __init__(self, kv_cache_dtype: str = "auto"):
        self.name = "triton" if kv_cache_dtype == "auto" else f"triton, {kv_cache_dtype} KV"
        self._quantized_dtype = None if kv_cache_dtype == "auto" else QUANTIZED_DTYPES[kv_cache_dtype]

    def allocate_kv_cache(
        self,
        num_blocks: int,
        block_size: int,
        num_kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> KVCache:
        tokens = (num_blocks, num_kv_heads, block_size)
        is_int4 = self._quantized_dtype == torch.uint8
        shape = (*tokens, head_dim // 2 if is_int4 else head_dim)
        stored = self._quantized_dtype or dtype
        cache = tuple(torch.empty(shape, dtype=stored, device=device) for _ in range(2))
        if self._quantized_dtype is None:
            return cache
        scales, scale_dtype = ((*tokens, 2), torch.bfloat16) if is_int4 else (tokens, torch.float32)
        return cache + tuple(torch.empty(scales, dtype=scale_dtype, device=device) for _ in range(2))

    def bytes_per_block(self, block_size: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype) -> int:
        if self._quantized_dtype is None:
            return super().bytes_per_block(block_size, num_kv_heads, head_dim, dtype)
        # One float32 or two bfloat16 beside the numbers: 4 bytes.
        bytes_per_head = head_dim // (2 if self._quantized_dtype == torch.uint8 else 1) + 4
        return 2 * block_size * num_kv_heads * bytes_per_head

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
        kv = PagedKV(*kv_cache)
        query = write_kv(query, key, value, rotation, metadata.slot_mapping, kv)
        output = torch.empty(query.shape, dtype=query.dtype, device=query.device)
        num_decodes = metadata.num_decodes
        if num_decodes:
            attend_decodes(query, kv, metadata, output, scale=scale, sliding_window=sliding_window)
        if num_decodes < len(metadata.query_lens):
            paged_prefill(
                query,
                kv,
                metadata.block_tables,
                metadata.seq_lens,
                metadata.query_start_loc,
                output,
                num_decodes=num_decodes,
                max_query_len=max(metadata.query_lens[num_decodes:]),
                scale=scale,
                sliding_window=sliding_window,
            )
        return output


def attend_decodes(
    query: Tensor,
    kv: PagedKV,
    metadata: AttentionMetadata,
    output: Tensor,
    *,
    scale: float,
    sliding_window: int | None,
) -> None:
    """Compute the attention of a step's sequences with one query token, the first rows of `query` and
    `output` (see `AttentionBackend.forward`). Except for tensors it reads only what is the same in every
    replay of a graph.
    """
    num_decodes, (_, num_kv_heads, block_size, _) = metadata.num_decodes, kv.keys.shape
    longest = metadata.block_tables.shape[1] * block_size
    if sliding_window is not None:
        longest = min(longest, sliding_window)
    paged_decode(
        query[:num_decodes],
        kv,
        metadata.block_tables,
        metadata.seq_lens,
        output,
        scale=scale,
        sliding_window=sliding_window,
        num_splits=choose_num_splits(num_decodes, num_kv_heads, _num_sms(query.device), longest),
    )


@cache
def _num_sms(device: torch.device) -> int:
    if device.type != "cuda":
        return INTERPRETER_SMS
    return torch.cuda.get_device_properties(device).multi_processor_count
