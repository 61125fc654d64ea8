"""Paged attention on CUDA whose prefill is torch's own FlashAttention, `torch.nn.attention.varlen`."""

import inspect
from collections.abc import Callable

import torch
from torch import Tensor

from ingine.engine.kernels.attention.interface import AttentionBackend, AttentionMetadata, KVCache
from ingine.engine.kernels.attention.triton import attend_decodes
from ingine.engine.kernels.triton.kv_write import write_kv
from ingine.engine.kernels.triton.paged_kv import PagedKV

VarlenAttn = Callable[..., Tensor]
"""`torch.nn.attention.varlen.varlen_attn`, or a function with its interface."""

PAGE_SIZE = 256
"""FlashAttention-2 takes pages of a multiple of this many tokens."""


def find_varlen_attn() -> VarlenAttn | None:
    """Return torch's function; None if it lacks a parameter used here. Paged KV came after torch 2.11."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    needed = {"scale", "window_size", "enable_gqa", "seqused_k", "block_table", "num_splits"}
    return varlen_attn if needed <= inspect.signature(varlen_attn).parameters.keys() else None


class VarlenAttention(AttentionBackend):
    """torch's attention for sequences with several query tokens. Keys and values are [num_blocks, block_size,
    num_kv_heads, head_dim]; the kernel of `TritonAttention` rotates and writes them.

    Decodes also use the kernel of `TritonAttention`: torch's kernel must not split KV that has pages, so it
    has one program for each sequence and KV head, and few decodes would leave most of a GPU idle. So a graph
    captures only Triton kernels.
    """

    name = "torch varlen"
    can_be_captured = True

    @staticmethod
    def supports(dtype: torch.dtype, head_dim: int, block_size: int) -> bool:
        """Return whether FlashAttention-2 takes these sizes."""
        return (
            dtype in (torch.bfloat16, torch.float16)
            and head_dim % 8 == 0
            and head_dim <= 256
            and block_size % PAGE_SIZE == 0
        )

    def __init__(self, varlen_attn: VarlenAttn):
        self._varlen_attn = varlen_attn

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
        keys, values = kv_cache
        kv = PagedKV(keys.transpose(1, 2), values.transpose(1, 2))
        query = write_kv(query, key, value, rotation, metadata.slot_mapping, kv)
        num_decodes = metadata.num_decodes
        if not num_decodes:
            return self._attend_prefills(query, kv_cache, metadata, scale, sliding_window)
        output = torch.empty(query.shape, dtype=query.dtype, device=query.device)
        attend_decodes(query, kv, metadata, output, scale=scale, sliding_window=sliding_window)
        if num_decodes < len(metadata.query_lens):
            prefills = self._attend_prefills(query[num_decodes:], kv_cache, metadata, scale, sliding_window)
            output[num_decodes:] = prefills
        return output

    def _attend_prefills(
        self,
        query: Tensor,
        kv_cache: KVCache,
        metadata: AttentionMetadata,
        scale: float,
        sliding_window: int | None,
    ) -> Tensor:
        """Compute the attention of the sequences after the decodes, whose tokens are in `query`."""
        keys, values = kv_cache
        num_decodes = metadata.num_decodes
        query_start_loc = metadata.plan.get(sliding_window)
        if query_start_loc is None:
            query_start_loc = metadata.query_start_loc[num_decodes:] - num_decodes
            metadata.plan[sliding_window] = query_start_loc
        return self._varlen_attn(
            query,
            keys,
            values,
            query_start_loc,
            # With pages the start of each key sequence is not read, but a tensor of this shape is required.
            query_start_loc,
            max(metadata.query_lens[num_decodes:]),
            # An upper bound: the loop over a sequence ends at its seqused_k.
            metadata.block_tables.shape[1] * keys.shape[1],
            scale=scale,
            window_size=(-1 if sliding_window is None else sliding_window - 1, 0),
            enable_gqa=True,
            seqused_k=metadata.seq_lens[num_decodes:],
            block_table=metadata.block_tables[num_decodes:],
            # More than one is wrong with pages: github.com/Dao-AILab/flash-attention/issues/1217
            num_splits=1,
        )
