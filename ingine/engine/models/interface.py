"""The interface of a model that the engine runs."""

from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from ingine.engine.communication.parallel import TensorParallel
from ingine.engine.kernels.attention import AttentionMetadata, KVCache
from ingine.engine.kernels.select import Kernels
from ingine.engine.models.config import ModelConfig


@runtime_checkable
class Model(Protocol):
    """A loaded model, or this rank's part of it. All methods are called under `torch.inference_mode()`.

    If a CUDA graph can capture `kernels.attention`, it can capture `forward` and `compute_logits`.
    """

    config: ModelConfig
    kernels: Kernels
    dtype: torch.dtype
    device: torch.device
    parallel: TensorParallel
    mapped_bytes: int
    """Bytes of weights in files that are mapped into memory."""

    def forward(
        self, input_ids: Tensor, positions: Tensor, kv_caches: list[KVCache], metadata: AttentionMetadata
    ) -> Tensor:
        """Compute final hidden states [T, hidden_size] of input_ids and positions [T]; write the tokens' KV.

        The T tokens of all sequences of a step are packed in the order of `metadata`.
        """

    def compute_logits(self, hidden: Tensor) -> Tensor:
        """Compute contiguous logits [R, vocab_size] from hidden [R, hidden_size], on every rank."""

    def allocate_kv_caches(self, num_blocks: int, block_size: int) -> list[KVCache]:
        """Allocate the KV caches of `forward`, of `num_blocks` blocks of `block_size` tokens."""

    def bytes_per_block(self, block_size: int) -> int:
        """Return the bytes of one block in all of these caches together."""

    def numerics(self) -> list[str]:
        """Return how loading has changed the weights, as far as it affects tokens: for `config.numerics`."""
