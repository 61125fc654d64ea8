"""The interface of attention backends, and the metadata of a step that they receive."""

from abc import ABC, abstractmethod
from dataclasses import dataclass, field

import torch
from torch import Tensor

KVCache = tuple[Tensor, ...]
"""One layer's paged keys and values. Their number of tensors and layout depend on the backend."""


@dataclass(slots=True)
class AttentionMetadata:
    """The packed tokens of one step, in the order of their sequences.

    The `num_decodes` sequences with exactly one query token come first, the shortest first for a backend that
    pads; the other sequences (prefill chunks, resumed sequences) follow. A sequence's query tokens are the
    last of its KV tokens; each sees itself and the tokens before it.

    A step that is captured in a CUDA graph has only decodes, in any order, and is padded to the graph's batch
    size. A padding row has a seq_len of 0 and a slot of -1: nothing is written for it, and its output is
    zeros. The block_tables are as wide as the longest possible sequence needs, in every replay, and `kv_lens`
    is empty. So a backend that can be captured reads no decode's length on the host and does not wait for the
    device; memory that it allocates belongs to the graph.
    """

    slot_mapping: Tensor
    """[num_tokens] int64: the slot of each token's KV, block * block_size + offset in the block. -1, only in
    a captured step: the KV is not written."""
    block_tables: Tensor
    """[num_seqs, max_blocks] int32, each row padded with its own first block, so that a backend which reads
    and masks the padding never reads another sequence's blocks."""
    seq_lens: Tensor
    """[num_seqs] int32: number of KV tokens, including those of this step."""
    query_start_loc: Tensor
    """[num_seqs + 1] int32: sequence i's queries are tokens query_start_loc[i] to query_start_loc[i + 1]. The
    torch reference does not use it; kernels for packed sequences of any length do."""
    num_decodes: int
    query_lens: list[int]
    """Number of query tokens of each sequence, on the host: a backend need not wait for the device."""
    kv_lens: list[int]
    """`seq_lens` on the host; empty in a captured step."""
    plan: dict[int | None, object] = field(default_factory=dict)
    """By sliding window: what a backend computes once a step for all layers with that window."""


class AttentionBackend(ABC):
    """Writes a step's keys and values into paged memory, then attends over it. Has no state of its own.

    Free memory holds arbitrary numbers, including NaN: nothing beyond a sequence's own KV tokens may affect
    its output. If all scores that a token sees are -inf, its output is NaN, as in the formula, or zeros, as
    in torch's own attention.
    """

    name: str
    can_be_captured = False
    """Whether a CUDA graph can capture `forward`: see `AttentionMetadata`."""

    @abstractmethod
    def allocate_kv_cache(
        self,
        num_blocks: int,
        block_size: int,
        num_kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> KVCache:
        """Allocate one layer's cache, uninitialised."""

    def bytes_per_block(self, block_size: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype) -> int:
        """Return the bytes of one block in one layer, keys and values together."""
        return 2 * block_size * num_kv_heads * head_dim * dtype.itemsize

    @abstractmethod
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
        """Write the keys and values of a step's tokens to the cache, then compute causal attention.

        query is [num_tokens, num_heads, head_dim], key and value [num_tokens, num_kv_heads, head_dim]; each
        may be a strided view whose last two dimensions are contiguous. Returns a contiguous [num_tokens,
        num_heads, head_dim]. With a sliding window of w, a token sees itself and the w - 1 tokens before it.

        rotation: the result of `RotaryEmbedding` for the step's positions, by which queries and keys are
        rotated first; None if they are rotated already.
        """
