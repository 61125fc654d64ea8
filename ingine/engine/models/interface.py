"""What the engine asks of a model, whatever it is made of."""

from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from ingine.engine.communication.parallel import TensorParallel
from ingine.engine.kernels.attention import AttentionMetadata, KVCache
from ingine.engine.kernels.select import Kernels
from ingine.engine.models.config import ModelConfig


@runtime_checkable
class Model(Protocol):
    """A loaded model, or this rank's part of it. All is called under `torch.inference_mode()`.

    Where `kernels.attention` can be captured in a CUDA graph, so can `forward` and `compute_logits`.
    """

    config: ModelConfig
    kernels: Kernels
    dtype: torch.dtype
    device: torch.device
    parallel: TensorParallel
    mapped_bytes: int
    """Of weights in files that are mapped into memory."""

    def forward(
        self, input_ids: Tensor, positions: Tensor, kv_caches: list[KVCache], metadata: AttentionMetadata
    ) -> Tensor:
        """input_ids and positions [T] -> final hidden states [T, hidden_size]; writes the tokens' KV.

        The T tokens of all sequences of a step are packed, in the order that `metadata` says.
        """

    def compute_logits(self, hidden: Tensor) -> Tensor:
        """hidden [R, hidden_size] -> contiguous [R, vocab_size], on every rank."""

    def allocate_kv_caches(self, num_blocks: int, block_size: int) -> list[KVCache]:
        """For `forward`: `num_blocks` blocks of `block_size` tokens each."""

    def bytes_per_block(self, block_size: int) -> int:
        """Bytes of one block in all of these caches together."""

    def numerics(self) -> list[str]:
        """What loading has made of the weights, as far as it decides tokens: for `config.numerics`."""
