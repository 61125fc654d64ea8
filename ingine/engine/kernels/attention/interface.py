"""What every attention backend gets and does: the one place of the engine with device code behind it."""

from abc import ABC, abstractmethod
from dataclasses import dataclass, field

import torch
from torch import Tensor

KVCache = tuple[Tensor, ...]
"""One layer's paged keys and values. How many tensors, and their layout, is the business of the backend that
allocated them."""


@dataclass(slots=True)
class AttentionMetadata:
    """The packed tokens of one step, in the order of their sequences.

    Sequences with exactly one query token come first, `num_decodes` of them, the shortest first for a backend
    that pads; the rest (prefill chunks, resumed sequences) follow. A sequence's query tokens are the last of
    its KV tokens; each sees itself and what comes before it.

    A step that is captured in a CUDA graph has decodes only, in any order, and is padded to the graph's batch
    size: a row that is no sequence has a seq_len of 0 and a slot of -1, so nothing is written for it, and
    gets zeros. Its block_tables have the width of the longest sequence that there may be, in every replay,
    and its `kv_lens` is empty. So a backend that can be captured takes nothing of a decode's length from the
    host, and waits for nothing on the device; memory that it allocates is the graph's.
    """

    slot_mapping: Tensor
    """[num_tokens] int64: where each token's KV goes, block * block_size + offset in the block; -1, in a
    step that is captured: nowhere."""
    block_tables: Tensor
    """[num_seqs, max_blocks] int32, each row padded with its own first block: what a backend reads of the
    padding, and masks, is then nothing of another sequence."""
    seq_lens: Tensor
    """[num_seqs] int32: KV tokens, this step's included."""
    query_start_loc: Tensor
    """[num_seqs + 1] int32: sequence i's queries are tokens query_start_loc[i] to query_start_loc[i + 1]. The
    torch reference has no use for it; kernels for packed sequences of any length do."""
    num_decodes: int
    query_lens: list[int]
    """Query tokens of each sequence, on the host: a backend never needs to wait for the device."""
    kv_lens: list[int]
    """seq_lens on the host; empty in a step that is captured."""
    plan: dict[int | None, object] = field(default_factory=dict)
    """By sliding window: what a backend works out once a step and uses in every layer that has this one."""


class AttentionBackend(ABC):
    """Writes a step's keys and values into paged memory, then attends over it. Holds no state of its own.

    Free memory holds anything, NaN included: nothing beyond a sequence's own KV tokens may reach its output.
    Where all scores that a token sees are -inf it gets NaN, as in the formula, or zeros, which torch's own
    attention makes of that.
    """

    name: str
    can_be_captured = False
    """In a CUDA graph: see `AttentionMetadata`."""

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
        """One layer's cache, uninitialised."""

    def bytes_per_block(self, block_size: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype) -> int:
        """Bytes of one block in one layer, keys and values together."""
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
        """Causal attention of a step's tokens, after their keys and values have gone into the cache.

        query is [num_tokens, num_heads, head_dim], key and value [num_tokens, num_kv_heads, head_dim]; each
        may be a strided view whose last two dimensions are contiguous. Returns a contiguous [num_tokens,
        num_heads, head_dim]. With a sliding window of w, a token sees itself and the w - 1 tokens before it.

        rotation: what `RotaryEmbedding` makes of the step's positions. Queries and keys are rotated by it
        first; None if they are already.
        """
