"""Attention over paged KV: one interface, one slow reference in plain torch, fast kernels beside it."""

from ingine.engine.kernels.attention.interface import AttentionBackend, AttentionMetadata, KVCache
from ingine.engine.kernels.attention.native import NativeAttention
from ingine.engine.kernels.attention.torch_reference import TorchAttention

__all__ = ["AttentionBackend", "AttentionMetadata", "KVCache", "NativeAttention", "TorchAttention"]
