"""The slow reference: attention over paged KV in plain torch, for CPU, CUDA and MPS."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ingine.attention.interface import AttentionBackend, AttentionMetadata, KVCache


class TorchAttention(AttentionBackend):
    """Keys and values are [num_blocks, block_size, num_kv_heads, head_dim]."""

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
        shape = (num_blocks, block_size, num_kv_heads, head_dim)
        return torch.zeros(shape, dtype=dtype, device=device), torch.zeros(shape, dtype=dtype, device=device)

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
        key_cache, value_cache = kv_cache
        key_cache.flatten(0, 1).index_copy_(0, metadata.slot_mapping, key)
        value_cache.flatten(0, 1).index_copy_(0, metadata.slot_mapping, value)
        raise NotImplementedError
