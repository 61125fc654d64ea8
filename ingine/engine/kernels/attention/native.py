"""Paged attention on the CPU, in C++: `ingine/engine/kernels/native/src/attention.cpp`."""

import ctypes
from ctypes import POINTER, c_float, c_int32, c_int64, c_void_p
from dataclasses import dataclass

import torch
from torch import Tensor

from ingine.engine.kernels.attention.interface import AttentionBackend, AttentionMetadata, KVCache
from ingine.engine.kernels.native import DTYPES
from ingine.errors import UnsupportedModel

KV_FORMATS = {"auto": 0, "int8": 1, "int4": 2}
"""Number of each `kv_cache_dtype` in attention.cpp. "auto" is the model's dtype; int8 has a scale for each
token and head, int4 a scale and a zero."""

STRIP_TOKENS, MAX_HEAD_DIM = 16, 256
"""The same as in kv_format.h: a block is padded to a multiple of STRIP_TOKENS tokens."""

ITEM_FIELDS = 6
"""Number of int32 fields of an `Item` of attention.cpp."""

_POINTERS = "slot_mapping block_tables query_start_loc seq_lens items partials"
_NUMBERS = (
    "num_seqs block_table_stride num_heads num_kv_heads head_dim block_size sliding_window dtype kv_format "
    "num_items num_partials state_size"
)


class _Step(ctypes.Structure):
    """`Step` of attention.cpp, which all layers of a step share."""

    _fields_ = (
        *((name, c_void_p) for name in _POINTERS.split()),
        *((name, c_int32) for name in _NUMBERS.split()),
    )


@dataclass(slots=True)
class _Plan:
    step: _Step
    pointer: ctypes._Pointer
    owned: tuple[Tensor, ...]
    """The tensors that `step` points to."""


class NativeAttention(AttentionBackend):
    """Attention for the dtypes in `native.DTYPES`. Keys and values of 16 tokens are stored together in the
    order in which they are multiplied, and blocks are padded to a multiple of 16 tokens: see kv_format.h.

    The bits of a token's output depend only on its sequence's tokens: not on the batch, on how the sequence
    was cut into chunks, or on the number of threads.
    """

    @staticmethod
    def supports(head_dim: int) -> bool:
        return head_dim <= MAX_HEAD_DIM and head_dim % 2 == 0

    def __init__(self, library: ctypes.CDLL, kv_cache_dtype: str = "auto"):
        self.name = "native" if kv_cache_dtype == "auto" else f"native, {kv_cache_dtype} KV"
        self._kv_format = KV_FORMATS[kv_cache_dtype]
        self._block_bytes = library.ingine_kv_block_bytes
        self._block_bytes.argtypes, self._block_bytes.restype = [*3 * [c_int64], *2 * [c_int32]], c_int64
        self._plan = library.ingine_attention_plan
        self._plan.argtypes, self._plan.restype = [POINTER(_Step)], None
        self._attend = library.ingine_attention
        self._attend.argtypes = [POINTER(_Step), *3 * [c_void_p, c_int64], *4 * [c_void_p], c_float]
        self._attend.restype = None

    def allocate_kv_cache(
        self,
        num_blocks: int,
        block_size: int,
        num_kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> KVCache:
        """Return a view [num_blocks, block_size, size of a token] without the blocks' padding.

        The shape does not describe the order within a block: see kv_format.h.
        """
        stored = dtype if self._kv_format == KV_FORMATS["auto"] else torch.int8
        padded = -(-block_size // STRIP_TOKENS) * STRIP_TOKENS
        token_bytes = self.bytes_per_block(block_size, num_kv_heads, head_dim, dtype) // padded
        memory = torch.empty(num_blocks, padded, token_bytes // stored.itemsize, dtype=stored, device=device)
        return (memory[:, :block_size],)

    def bytes_per_block(self, block_size: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype) -> int:
        if not self.supports(head_dim):
            raise UnsupportedModel(
                f"native attention takes an even head_dim of at most {MAX_HEAD_DIM}, not {head_dim}"
            )
        return self._block_bytes(block_size, num_kv_heads, head_dim, DTYPES[dtype], self._kv_format)

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
        plan = metadata.plan.get(sliding_window)
        if plan is None:
            plan = metadata.plan[sliding_window] = self._make_plan(
                query, key, kv_cache, metadata, sliding_window
            )
        output = torch.empty(query.shape, dtype=query.dtype)
        cos, sin = (None, None) if rotation is None else (rotation[0].data_ptr(), rotation[1].data_ptr())
        self._attend(
            plan.pointer,
            query.data_ptr(),
            query.stride(0),
            key.data_ptr(),
            key.stride(0),
            value.data_ptr(),
            value.stride(0),
            cos,
            sin,
            kv_cache[0].data_ptr(),
            output.data_ptr(),
            scale,
        )
        return output

    def _make_plan(
        self,
        query: Tensor,
        key: Tensor,
        kv_cache: KVCache,
        metadata: AttentionMetadata,
        sliding_window: int | None,
    ) -> _Plan:
        tables = (metadata.slot_mapping, metadata.block_tables, metadata.query_start_loc, metadata.seq_lens)
        step = _Step(
            *(table.data_ptr() for table in tables),
            num_seqs=len(metadata.query_lens),
            block_table_stride=metadata.block_tables.stride(0),
            num_heads=query.shape[1],
            num_kv_heads=key.shape[1],
            head_dim=key.shape[2],
            block_size=kv_cache[0].shape[1],
            sliding_window=sliding_window or 0,
            dtype=DTYPES[query.dtype],
            kv_format=self._kv_format,
        )
        pointer = ctypes.pointer(step)
        self._plan(pointer)  # sets the sizes of items and partials
        items = torch.empty(step.num_items, ITEM_FIELDS, dtype=torch.int32)
        partials = torch.empty(step.num_kv_heads * step.num_partials, step.state_size)
        step.items, step.partials = items.data_ptr(), partials.data_ptr()
        self._plan(pointer)
        return _Plan(step, pointer, (*tables, items, partials))
