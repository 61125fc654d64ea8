"""Attention over paged KV: one interface, one slow reference in plain torch, fast kernels beside it."""

import logging

import torch

from ingine.attention.interface import AttentionBackend, AttentionMetadata, KVCache
from ingine.attention.torch_reference import TorchAttention

__all__ = ["AttentionBackend", "AttentionMetadata", "KVCache", "TorchAttention", "select_backend"]

logger = logging.getLogger(__name__)


def select_backend(device: torch.device, dtype: torch.dtype) -> AttentionBackend:
    """The fastest backend that this machine has for `device` and `dtype`."""
    backend = TorchAttention()
    logger.info("attention backend: %s (%s, %s)", backend.name, device, str(dtype).removeprefix("torch."))
    return backend
