"""Attention by torch's varlen_attn: what we hand to it, and that this is attention.

torch's own runs on GPUs only. Elsewhere a function of the semantics that torch documents stands for it; the
writing of keys and values, and decodes, are real, in triton's interpreter.
"""

import sys
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from ingine.engine.kernels.attention import AttentionMetadata
from tests.engine.packed import BlockPool, PagedSequence
from tests.engine.paged_attention import Attention, attend_densely, device_of

pytest.importorskip("triton", reason="triton is for Linux")

from ingine.engine.kernels.attention.varlen import VarlenAttention, VarlenAttn, find_varlen_attn

BLOCK_SIZE = 256


def documented_varlen_attn(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor | None,
    max_q: int,
    max_k: int,
    *,
    scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
    enable_gqa: bool = False,
    seqused_k: Tensor | None = None,
    block_table: Tensor | None = None,
    num_splits: int | None = None,
) -> Tensor:
    """torch 2.13's documentation, and what FlashAttention-2 checks besides."""
    num_seqs = len(cu_seq_q) - 1
    assert enable_gqa and num_splits == 1 and key.shape[1] % 256 == 0
    assert cu_seq_k.shape == cu_seq_q.shape and seqused_k.shape == (num_seqs,)
    assert len(block_table) == num_seqs and block_table.stride(1) == 1 and query.stride(-1) == 1
    for tensor in (cu_seq_q, cu_seq_k, seqused_k, block_table):
        assert tensor.dtype == torch.int32
    left, right = window_size
    assert right == 0, "causal"
    output = torch.empty(query.shape, dtype=query.dtype)
    for index in range(num_seqs):
        start, end, kv_len = int(cu_seq_q[index]), int(cu_seq_q[index + 1]), int(seqused_k[index])
        assert end - start <= max_q and kv_len <= max_k
        pages = block_table[index, : -(-kv_len // key.shape[1])].long()
        keys, values = (cache[pages].flatten(0, 1)[:kv_len] for cache in (key, value))
        window = None if left < 0 else left + 1
        output[start:end] = attend_densely(query[start:end], keys, values, scale, window)
    return output


def varlen_attn() -> VarlenAttn:
    return find_varlen_attn() if torch.cuda.is_available() else documented_varlen_attn


def backend() -> VarlenAttention:
    return VarlenAttention(varlen_attn())


pytestmark = pytest.mark.skipif(
    torch.cuda.is_available() and find_varlen_attn() is None, reason="this torch has no paged varlen_attn"
)


@pytest.mark.parametrize(
    ("window", "rotary"),
    [
        *((None, False), (1, True), (5, False), (1000, True)),
        *(
            pytest.param(*case, marks=pytest.mark.wide)
            for case in ((None, True), (1, False), (5, True), (1000, False))
        ),
    ],
)
def test_varlen_equals_the_formula(window, rotary):
    """Prefill, chunks with a cached prefix, mixed steps, decodes alone; the long sequence has two blocks."""
    layer = Attention(6, 2, 16, BLOCK_SIZE, torch.float16, window, rotary)
    steps = [[(0, 6), (1, 250)], [(0, 1), (1, 9), (2, 3)], [(0, 1), (1, 1), (2, 1)]]
    assert layer.worst_error(backend(), steps) < 5e-3


def test_a_padded_row_of_a_graph_gets_zeros():
    layer, attention = Attention(6, 2, 16, BLOCK_SIZE, torch.float16), backend()
    device = device_of(attention)
    pool, kv_cache = BlockPool(2, BLOCK_SIZE), layer.allocate(attention, 2)
    sequence, tokens = PagedSequence([]), layer.make_qkv(5)
    layer.attend(attention, kv_cache, pool, [(sequence, 4)], [[new[:4] for new in tokens]])
    metadata = AttentionMetadata(
        slot_mapping=torch.tensor([sequence.block_table[0] * BLOCK_SIZE + 4, -1], device=device),
        block_tables=torch.tensor([[*sequence.block_table, 0], [0, 0]], dtype=torch.int32, device=device),
        seq_lens=torch.tensor([5, 0], dtype=torch.int32, device=device),
        query_start_loc=torch.tensor([0, 1, 2], dtype=torch.int32, device=device),
        num_decodes=2,
        query_lens=[1, 1],
        kv_lens=[],
    )
    rows = [torch.cat((new[4:], new[:1])).to(device) for new in tokens]
    output = attention.forward(*rows, kv_cache, metadata, scale=layer.scale, sliding_window=None).cpu()
    assert (output[0].double() - layer.expected(0, 5)[4]).abs().max() < 5e-3
    assert (output[1] == 0).all()


def test_torch_gets_the_sequences_with_several_query_tokens_and_no_other():
    """Decodes are Triton's, so that a step which a graph captures has no number in it that follows from a
    length, and nothing of torch's that a graph could not keep."""
    seen = []

    def record(query, key, value, cu_seq_q, *args, **kwargs) -> Tensor:
        seen.append((cu_seq_q.tolist(), kwargs["seqused_k"].tolist(), kwargs["window_size"]))
        return varlen_attn()(query, key, value, cu_seq_q, *args, **kwargs)

    layer = Attention(6, 2, 16, BLOCK_SIZE, torch.float16, sliding_window=3)
    steps = [[(0, 2), (1, 4)], [(0, 1), (1, 1)], [(0, 3), (1, 1), (2, 5)]]
    assert layer.worst_error(VarlenAttention(record), steps) < 5e-3
    assert seen == [([0, 2, 6], [2, 4], (2, 0)), ([0, 5, 8], [5, 6], (2, 0))]


@pytest.mark.parametrize(
    ("dtype", "head_dim", "block_size", "fits"),
    [
        (torch.bfloat16, 128, 256, True),
        (torch.float16, 64, 512, True),
        (torch.float32, 128, 256, False),
        (torch.bfloat16, 100, 256, False),
        (torch.bfloat16, 288, 256, False),
        (torch.bfloat16, 128, 16, False),
    ],
)
def test_what_flash_attention_takes(dtype, head_dim, block_size, fits):
    assert VarlenAttention.supports(dtype, head_dim, block_size) == fits


@pytest.mark.parametrize(
    ("function", "is_found"), [(documented_varlen_attn, True), (lambda query, key, scale=None: None, False)]
)
def test_a_torch_whose_varlen_attn_knows_no_pages_is_told_by_its_signature(
    monkeypatch, function: Callable, is_found: bool
):
    module = SimpleNamespace(varlen_attn=function)
    monkeypatch.setitem(sys.modules, "torch.nn.attention.varlen", module)
    assert (find_varlen_attn() is function) == is_found
