"""Attention in Triton beyond what every backend does: splits, tiles, padded rows, quantised KV.

Without a GPU it runs in triton's interpreter. That computes no fp8, so fp8 is for machines that have one.
"""

import random
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from ingine.engine.kernels.attention import AttentionMetadata
from tests.engine.packed import BlockPool, PagedSequence
from tests.engine.paged_attention import Attention, as_int4, attend_densely, device_of
from tests.paths import needs

pytest.importorskip("triton", reason="triton is for Linux")

from ingine.engine.kernels.attention.triton import TritonAttention
from ingine.engine.kernels.triton.paged_decode import choose_num_splits, paged_decode
from ingine.engine.kernels.triton.paged_kv import PagedKV

TRITON = TritonAttention()
DEVICE = device_of(TRITON)
LAYER = Attention(num_heads=6, num_kv_heads=2, head_dim=16, block_size=4)

QUANTIZED = ["int8", "int4", pytest.param("fp8", marks=needs("fp8 on CUDA"))]


def decode_metadata(
    slots: list[int], block_tables: list[list[int]], seq_lens: list[int]
) -> AttentionMetadata:
    """Metadata of a captured step."""
    num_rows = len(slots)
    return AttentionMetadata(
        slot_mapping=torch.tensor(slots, device=DEVICE),
        block_tables=torch.tensor(block_tables, dtype=torch.int32, device=DEVICE),
        seq_lens=torch.tensor(seq_lens, dtype=torch.int32, device=DEVICE),
        query_start_loc=torch.arange(num_rows + 1, dtype=torch.int32, device=DEVICE),
        num_decodes=num_rows,
        query_lens=[1] * num_rows,
        kv_lens=[],
    )


# ------------------------------------------------------------------------------------------------- any shape


@pytest.mark.parametrize(
    ("num_heads", "num_kv_heads", "head_dim", "block_size", "window"),
    [
        (1, 1, 16, 1, None),
        (7, 1, 40, 3, 20),  # a group that is no power of two, a head_dim likewise
        (3, 3, 64, 16, 4),  # rows of a query tile that see nothing of its first KV tile
        (18, 1, 24, 7, None),  # a group of more than 16
        (2, 1, 256, 64, None),
        (5, 1, 8, 24, 1),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_shapes_that_are_not_even(num_heads, num_kv_heads, head_dim, block_size, window, dtype):
    """Over several tiles of KV tokens and of query tokens, in mixed steps."""
    steps = [[(0, 70), (1, 5)], [(0, 1), (1, 9)], [(0, 1), (1, 1), (2, 2)]]
    layer = Attention(num_heads, num_kv_heads, head_dim, block_size, dtype, window, rotary=True)
    assert layer.worst_error(TRITON, steps) < (1e-5 if dtype == torch.float32 else 5e-3)


def test_many_short_sequences_share_the_tiles_of_a_prefill():
    """Each query tile finds its sequence by itself: also behind decodes, and where one fills its tiles."""
    rng = random.Random(1)
    layer = Attention(num_heads=4, num_kv_heads=1, head_dim=16, block_size=4)
    first = [(index, rng.choice((2, 3, 8, 31))) for index in range(9)]
    second = [(index, rng.choice((1, 1, 8))) for index in range(9)]
    assert layer.worst_error(TRITON, [first, second]) < 1e-5


@pytest.mark.parametrize("query_len", [1, 5])
def test_what_has_left_the_window_is_not_read(query_len):
    """Seven tokens before the first query are seen: the five blocks before those may hold anything."""
    layer = replace(LAYER, sliding_window=8)
    pool, kv_cache = BlockPool(9, 4), layer.allocate(TRITON, 9)
    sequence, tokens = PagedSequence([]), layer.make_qkv(27 + query_len)
    layer.attend(TRITON, kv_cache, pool, [(sequence, 27)], [[new[:27] for new in tokens]])
    sequence.num_computed_tokens = 27
    for memory in kv_cache:
        memory[sequence.block_table[:5]] = torch.nan
    step = [(sequence, query_len)]
    output = layer.attend(TRITON, kv_cache, pool, step, [[new[27:] for new in tokens]])
    expected = attend_densely(*tokens, layer.scale, 8)[27:]
    torch.testing.assert_close(output.double(), expected, atol=1e-5, rtol=0)


# ------------------------------------------------------------------------------------------------- split KV


def paged_kv(keys: Tensor, values: Tensor, block_size: int) -> tuple[PagedKV, Tensor]:
    """A sequence's keys and values [tokens, num_kv_heads, head_dim] in blocks, and its block table [1, n]."""
    num_blocks = max(-(-len(keys) // block_size), 1)
    table = torch.randperm(num_blocks, generator=torch.Generator().manual_seed(0))
    shape = (num_blocks, keys.shape[1], block_size, keys.shape[2])
    caches = []
    for new in (keys, values):
        cache = torch.full(shape, torch.nan)
        for position in range(len(new)):
            cache[table[position // block_size], :, position % block_size] = new[position]
        caches.append(cache.to(DEVICE))
    return PagedKV(*caches), table[None].to(DEVICE, torch.int32)


@pytest.mark.parametrize("num_splits", [1, 2, 8])
@pytest.mark.parametrize("seq_len", [0, 1, 64, 65, 300])
@pytest.mark.parametrize("window", [None, 100])
def test_splits_are_put_together_again(num_splits, seq_len, window):
    """However many there are of them, and if most have nothing to do."""
    query, keys, values = Attention(6, 2, 16).make_qkv(max(seq_len, 1))
    kv, block_tables = paged_kv(keys[:seq_len], values[:seq_len], block_size=24)
    output = torch.full((1, 6, 16), torch.nan, device=DEVICE)
    seq_lens = torch.tensor([seq_len], dtype=torch.int32, device=DEVICE)
    paged_decode(
        query[-1:].to(DEVICE),
        kv,
        block_tables,
        seq_lens,
        output,
        scale=0.25,
        sliding_window=window,
        num_splits=num_splits,
    )
    expected = torch.zeros(1, 6, 16, dtype=torch.float64)
    if seq_len:
        expected = attend_densely(query[-1:], keys, values, 0.25, window)
    torch.testing.assert_close(output.cpu().double(), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("num_seqs", "num_kv_heads", "expected"), [(1, 2, 128), (8, 2, 16), (32, 2, 4), (64, 8, 1), (256, 2, 1)]
)
def test_splits_fill_the_gpu_that_few_sequences_would_leave_idle(num_seqs, num_kv_heads, expected):
    """132 multiprocessors are those of an H100."""
    assert choose_num_splits(num_seqs, num_kv_heads, num_sms=132, longest=4096) == expected


@pytest.mark.parametrize(
    ("num_seqs", "longest", "expected"),
    [
        (128, 4096, 1),
        (128, 4097, 2),
        (128, 32_768, 8),
        (256, 32_768, 8),  # the most programs that there may be
        (512, 32_768, 4),
        (4096, 1_000_000, 1),
        (1, 1_000_000, 128),
        (16, 32_768, 8),  # which fill the GPU by themselves
        (16, 65_536, 16),
    ],
)
def test_a_sequence_that_may_be_long_is_split_in_a_large_batch_too(num_seqs, longest, expected):
    """Into programs of 4096 tokens, as long as they are no more than 32 a multiprocessor."""
    num_splits = choose_num_splits(num_seqs, 2, num_sms=132, longest=longest)
    assert num_splits == expected
    assert num_splits == 1 or num_seqs * 2 * num_splits <= 32 * 132


@pytest.mark.parametrize(("window", "expected"), [(None, 4), (4096, 1)])
def test_what_a_step_may_see_decides_how_it_is_split(window, expected, monkeypatch):
    """The block tables' width, which a graph keeps, and no length; and of that no more than a window."""
    seen, layer = [], replace(LAYER, block_size=512, sliding_window=window)
    monkeypatch.setattr("ingine.engine.kernels.attention.triton._num_sms", lambda device: 1)
    monkeypatch.setattr(
        "ingine.engine.kernels.attention.triton.paged_decode",
        lambda *a, num_splits, **k: seen.append(num_splits),
    )
    rows, kv_cache = [new.to(DEVICE) for new in layer.make_qkv(2)], layer.allocate(TRITON, 32)
    metadata = decode_metadata(slots=[0, 512], block_tables=[32 * [0], 32 * [1]], seq_lens=[1, 1])
    TRITON.forward(*rows, kv_cache, metadata, scale=layer.scale, sliding_window=window)
    assert seen == [expected]


# ------------------------------------------------------------------------------- steps that a graph captures


@pytest.mark.parametrize("num_padded", [1, 3])
@pytest.mark.parametrize("kv_cache_dtype", ["auto", "int8", "int4"])
def test_padded_rows_write_nothing_and_get_zeros(num_padded, kv_cache_dtype):
    """Whatever is in their queries, keys and block tables. On the CPU, which passes for two multiprocessors,
    two rows are split and four are not."""
    layer = Attention(num_heads=3, num_kv_heads=1, head_dim=16, block_size=4, rotary=True)
    backend = TritonAttention(kv_cache_dtype)
    pool, kv_cache = BlockPool(6, 4), layer.allocate(backend, 6)
    sequence, tokens = PagedSequence([]), layer.make_qkv(10)
    layer.attend(backend, kv_cache, pool, [(sequence, 9)], [[new[:9] for new in tokens]])

    before = [memory.clone() for memory in kv_cache]
    slot = sequence.block_table[2] * 4 + 1
    query, key, value = (
        torch.cat((new[9:], torch.full((num_padded, *new.shape[1:]), torch.nan))).to(DEVICE) for new in tokens
    )
    metadata = decode_metadata(
        slots=[slot, *num_padded * [-1]],
        block_tables=[[*sequence.block_table, 0, 0, 0], *num_padded * [6 * [99]]],
        seq_lens=[10, *num_padded * [0]],
    )
    rotation = layer.rotation(torch.tensor([9, *num_padded * [0]], device=DEVICE))
    output = backend.forward(
        query, key, value, kv_cache, metadata, scale=layer.scale, sliding_window=None, rotation=rotation
    )
    tolerance = 1e-5 if kv_cache_dtype == "auto" else 0.05
    expected = layer.expected(0, 10, as_int4 if kv_cache_dtype == "int4" else lambda new: new)[9]
    assert (output[0].cpu().double() - expected).abs().max() < tolerance
    assert (output[1:] == 0).all()
    for memory, old in zip(kv_cache, before, strict=True):
        written = (memory.view(torch.uint8) != old.view(torch.uint8)).flatten(1).any(dim=1).nonzero()
        assert written.flatten().tolist() == [slot // 4]


# ---------------------------------------------------------------------------------------------- quantised KV


def stored(kv_cache_dtype: str, new: Tensor) -> Tensor:
    """Round keys or values as memory does, with a scale per token and head."""
    if kv_cache_dtype == "int4":
        return as_int4(new).double()
    largest, dtype = {"int8": (127, torch.int8), "fp8": (448, torch.float8_e4m3fn)}[kv_cache_dtype]
    scale = new.double().abs().amax(-1, keepdim=True) / largest
    scaled = new.double() / scale
    return (scaled.round() if dtype == torch.int8 else scaled.float().to(dtype).double()) * scale


@pytest.mark.parametrize("kv_cache_dtype", QUANTIZED)
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 3e-2), (torch.float16, 3e-2)]
)
def test_quantised_kv_is_computed_with_as_it_is_stored(kv_cache_dtype, dtype, tolerance):
    steps = [[(0, 6), (1, 70)], [(0, 1), (1, 3)], [(1, 1)]]
    backend, layer = TritonAttention(kv_cache_dtype), replace(LAYER, dtype=dtype)
    assert layer.errors(backend, steps, lambda new: stored(kv_cache_dtype, new)).max() < tolerance


@pytest.mark.parametrize(
    ("num_heads", "num_kv_heads", "head_dim", "window"),
    [(7, 1, 40, 20), (2, 1, 128, None), (3, 3, 96, 4), (5, 1, 6, None)],
)
def test_int4_of_heads_that_a_hadamard_matrix_does_not_fill(num_heads, num_kv_heads, head_dim, window):
    steps = [[(0, 70), (1, 5)], [(0, 1), (1, 9)], [(0, 1)]]
    layer = Attention(num_heads, num_kv_heads, head_dim, 3, sliding_window=window, rotary=True)
    errors = layer.errors(TritonAttention("int4"), steps, as_int4)
    assert errors.median() < 1e-5 and errors.square().mean().sqrt() < 5e-3


@needs("CUDA")  # the interpreter multiplies in float32
@pytest.mark.parametrize("kv_cache_dtype", QUANTIZED)
def test_small_values_survive_float16(kv_cache_dtype):
    """Their scales times a softmax weight are less than what float16 can tell from zero."""
    layer, backend = replace(LAYER, dtype=torch.float16), TritonAttention(kv_cache_dtype)
    query, key, value = layer.make_qkv(40)
    value = (value.float() * 1e-4).half()
    pool, kv_cache = BlockPool(10, 4), layer.allocate(backend, 10)
    output = layer.attend(backend, kv_cache, pool, [(PagedSequence([]), 40)], [[query, key, value]])
    expected = attend_densely(query, stored(kv_cache_dtype, key), value, layer.scale, None)
    assert (output.double() - expected).abs().max() < 0.01 * expected.abs().max()


@pytest.mark.parametrize("kv_cache_dtype", QUANTIZED)
def test_zeros_are_kept_as_zeros(kv_cache_dtype):
    """The largest of zeros cannot be divided by."""
    backend = TritonAttention(kv_cache_dtype)
    pool, kv_cache = BlockPool(4, LAYER.block_size), LAYER.allocate(backend, 4)
    query, key, value = LAYER.make_qkv(4)
    key, value = torch.zeros_like(key), torch.zeros_like(value)
    sequence = PagedSequence([])
    output = LAYER.attend(backend, kv_cache, pool, [(sequence, 4)], [[query, key, value]])
    assert (output == 0).all()
    keys, values, *scales = (memory[sequence.block_table].float() for memory in kv_cache)
    assert (keys == 0).all() and (values == 0).all()
    assert all((scale >= 0).all() for scale in scales)


@pytest.mark.parametrize("kv_cache_dtype", ["int8", "int4"])
@pytest.mark.parametrize("kind", ["key", "value", "query"])
@pytest.mark.parametrize("number", [torch.nan, torch.inf])
def test_quantised_kv_tells_of_what_is_not_finite(kv_cache_dtype, kind, number):
    """An integer cannot be NaN, so its scale is."""
    tokens = dict(zip(("query", "key", "value"), LAYER.make_qkv(6), strict=True))
    tokens[kind] = tokens[kind].clone()
    tokens[kind][5, 0, 5] = number
    backend = TritonAttention(kv_cache_dtype)
    pool, kv_cache = BlockPool(4, LAYER.block_size), LAYER.allocate(backend, 4)
    output = LAYER.attend(backend, kv_cache, pool, [(PagedSequence([]), 6)], [list(tokens.values())])
    assert output[5, 0].isnan().all()


@pytest.mark.parametrize(("kv_cache_dtype", "part"), [("int8", 2), ("fp8", 2), ("int4", 4)])
def test_quantised_kv_takes_a_part_of_the_memory_and_its_scales(kv_cache_dtype, part):
    layer, backend = replace(LAYER, dtype=torch.bfloat16), TritonAttention(kv_cache_dtype)
    per_block = backend.bytes_per_block(4, layer.num_kv_heads, layer.head_dim, layer.dtype)
    assert per_block == TRITON.bytes_per_block(4, 2, 16, torch.bfloat16) // part + 4 * 2 * 2 * 4
    assert 7 * per_block == sum(memory.nbytes for memory in layer.allocate(backend, 7))
