"""The attention interface: what every backend must do. A new backend joins by adding itself to BACKENDS."""

import random

import pytest
import torch
from torch import Tensor

from ingine.attention import AttentionBackend, TorchAttention, torch_reference
from tests.engine.packed import BlockPool, PagedSequence, pack

BACKENDS = [TorchAttention()]
BLOCK_SIZE, NUM_HEADS, NUM_KV_HEADS, HEAD_DIM, SCALE = 4, 6, 2, 16, 0.25
CPU = torch.device("cpu")


def attend_densely(query: Tensor, keys: Tensor, values: Tensor, window: int | None) -> Tensor:
    """The textbook formula, in float64, for one sequence: query [Q, H, D], keys and values [KV, Hkv, D]."""
    group = query.shape[1] // keys.shape[1]
    query, keys, values = query.double(), keys.double(), values.double()
    keys, values = keys.repeat_interleave(group, dim=1), values.repeat_interleave(group, dim=1)
    scores = torch.einsum("qhd,khd->hqk", query, keys) * SCALE
    distance = torch.arange(len(keys) - len(query), len(keys))[:, None] - torch.arange(len(keys))
    hidden = distance < 0
    if window is not None:
        hidden |= distance >= window
    return torch.einsum("hqk,khd->qhd", scores.masked_fill(hidden, float("-inf")).softmax(-1), values)


def run_steps(
    backend: AttentionBackend, steps: list[list[tuple[int, int]]], dtype: torch.dtype, window: int | None
) -> float:
    """Run steps of [(sequence, query tokens)] in paged memory; return the largest error."""
    torch.manual_seed(0)
    pool = BlockPool(num_blocks=100, block_size=BLOCK_SIZE)
    kv_cache = backend.allocate_kv_cache(100, BLOCK_SIZE, NUM_KV_HEADS, HEAD_DIM, dtype, CPU)
    for memory in kv_cache:
        memory.fill_(torch.nan)  # what an earlier sequence may have left in any block
    sequences = {index: PagedSequence([]) for step in steps for index, _ in step}
    history = {index: torch.empty(0, 2, NUM_KV_HEADS, HEAD_DIM, dtype=dtype) for index in sequences}
    worst = 0.0
    for step in steps:
        order = [(sequences[index], query_len) for index, query_len in step]
        _, metadata = pack(order, pool)
        num_tokens = sum(metadata.query_lens)
        query, key, value = make_qkv(num_tokens, dtype)
        output = backend.forward(query, key, value, kv_cache, metadata, scale=SCALE, sliding_window=window)
        assert output.shape == query.shape and output.isfinite().all()
        start = 0
        for sequence, query_len in order:
            index = next(index for index, known in sequences.items() if known is sequence)
            tokens = slice(start, start + query_len)
            new = torch.stack((key[tokens], value[tokens]), dim=1)
            history[index] = torch.cat((history[index], new))
            expected = attend_densely(query[tokens], history[index][:, 0], history[index][:, 1], window)
            worst = max(worst, (output[tokens].double() - expected).abs().max().item())
            sequence.num_computed_tokens += query_len
            start += query_len
    return worst


def make_qkv(num_tokens: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """As the decoder makes them: views of one merged projection, not contiguous."""
    merged = torch.randn(num_tokens, NUM_HEADS + 2 * NUM_KV_HEADS, HEAD_DIM, dtype=dtype)
    return merged.split((NUM_HEADS, NUM_KV_HEADS, NUM_KV_HEADS), dim=1)


@pytest.mark.parametrize("backend", BACKENDS, ids=lambda backend: backend.name)
@pytest.mark.parametrize("window", [None, 1, 5, 1000])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)])
@pytest.mark.parametrize(
    "steps",
    [
        pytest.param([[(0, 9)]], id="one prefill"),
        pytest.param([[(0, 3), (1, 17), (2, 4)]], id="batched prefill"),
        pytest.param([[(0, 5)], [(0, 5)], [(0, 2)]], id="chunked prefill"),
        pytest.param([[(0, 1), (1, 1)]], id="prompts of one token"),
        pytest.param([[(0, 3), (1, 9)], [(0, 1), (1, 1)], [(1, 1)], [(0, 1)]], id="decode"),
        pytest.param([[(0, 6), (1, 2)], [(0, 1), (1, 3), (2, 8)], [(0, 1), (1, 1), (2, 2)]], id="mixed"),
    ],
)
def test_backend_equals_the_formula(backend, steps, dtype, tolerance, window):
    assert run_steps(backend, steps, dtype, window) < tolerance


@pytest.mark.parametrize("backend", BACKENDS, ids=lambda backend: backend.name)
@pytest.mark.parametrize("seed", range(5))
def test_backend_equals_the_formula_on_random_schedules(backend, seed):
    rng = random.Random(seed)
    steps = [
        [(index, rng.choice((1, 1, 2, 7))) for index in rng.sample(range(6), rng.randint(1, 6))]
        for _ in range(8)
    ]
    assert run_steps(backend, steps, torch.float32, rng.choice((None, 3, 12))) < 1e-5


@pytest.mark.parametrize("backend", BACKENDS, ids=lambda backend: backend.name)
def test_sequences_may_share_blocks(backend):
    """A prefix hit: two sequences read the same blocks, and only the first has ever written them."""
    torch.manual_seed(0)
    pool = BlockPool(num_blocks=20, block_size=BLOCK_SIZE)
    kv_cache = backend.allocate_kv_cache(20, BLOCK_SIZE, NUM_KV_HEADS, HEAD_DIM, torch.float32, CPU)
    first = PagedSequence([])
    _, metadata = pack([(first, 2 * BLOCK_SIZE)], pool)
    prefix = make_qkv(2 * BLOCK_SIZE, torch.float32)
    backend.forward(*prefix, kv_cache, metadata, scale=SCALE, sliding_window=None)

    second = PagedSequence([], block_table=list(first.block_table), num_computed_tokens=2 * BLOCK_SIZE)
    _, metadata = pack([(second, 3)], pool)
    query, key, value = make_qkv(3, torch.float32)
    output = backend.forward(query, key, value, kv_cache, metadata, scale=SCALE, sliding_window=None)

    keys, values = torch.cat((prefix[1], key)), torch.cat((prefix[2], value))
    torch.testing.assert_close(output.double(), attend_densely(query, keys, values, None), atol=1e-5, rtol=0)


@pytest.mark.parametrize("backend", BACKENDS, ids=lambda backend: backend.name)
def test_bytes_per_block_is_what_a_block_takes(backend):
    kv_cache = backend.allocate_kv_cache(7, BLOCK_SIZE, NUM_KV_HEADS, HEAD_DIM, torch.bfloat16, CPU)
    per_block = backend.bytes_per_block(BLOCK_SIZE, NUM_KV_HEADS, HEAD_DIM, torch.bfloat16)
    assert 7 * per_block == sum(tensor.numel() * tensor.itemsize for tensor in kv_cache)


@pytest.mark.parametrize("backend", BACKENDS, ids=lambda backend: backend.name)
def test_large_float16_values_do_not_overflow(backend):
    """The product of a query and a key may be over 65504, the scaled product is not."""
    kv_cache = backend.allocate_kv_cache(9, BLOCK_SIZE, NUM_KV_HEADS, HEAD_DIM, torch.float16, CPU)
    tokens = make_qkv(7, torch.float16)
    query, key, _ = tokens
    query.fill_(80.0)
    key.fill_(-80.0)[-1] = 80.0  # so the last token sees nothing but itself

    def last_output(*lengths: int) -> Tensor:
        sequence, pool = PagedSequence([]), BlockPool(9, BLOCK_SIZE)
        for length in lengths:
            _, metadata = pack([(sequence, length)], pool)
            step = (new[sequence.num_computed_tokens :][:length] for new in tokens)
            output = backend.forward(*step, kv_cache, metadata, scale=SCALE, sliding_window=None)
            sequence.num_computed_tokens += length
        return output[-1]

    prefilled, decoded = last_output(7), last_output(6, 1)
    assert torch.equal(prefilled, tokens[2][-1].repeat_interleave(NUM_HEADS // NUM_KV_HEADS, dim=0))
    assert torch.equal(decoded, prefilled)


# ------------------------------------------------------------------------------- the torch reference alone


@pytest.mark.parametrize("max_bytes", [1, 4 * 2 * BLOCK_SIZE * NUM_KV_HEADS * HEAD_DIM * 4])
@pytest.mark.parametrize("window", [None, 5])
def test_decodes_that_take_too_much_memory_at_a_time_go_in_groups(monkeypatch, max_bytes, window):
    """One by one, and by four blocks; among them are prompts of one token, and there is a prefill."""
    monkeypatch.setattr(torch_reference, "MAX_GATHERED_BYTES", max_bytes)
    steps = [[(0, 3), (1, 19), (2, 8), (3, 4)], [(0, 1), (1, 1), (2, 1), (3, 1), (4, 1), (5, 6)]]
    assert run_steps(TorchAttention(), [*steps, [(i, 1) for i in range(6)]], torch.float32, window) < 1e-5


def test_decode_copies_no_more_than_the_longest_sequence_needs():
    """One sequence that only waits must not make the gather of those that decode any larger."""
    backend, pool = TorchAttention(), BlockPool(num_blocks=300, block_size=BLOCK_SIZE)
    kv_cache = backend.allocate_kv_cache(300, BLOCK_SIZE, NUM_KV_HEADS, HEAD_DIM, torch.float32, CPU)
    short, long = PagedSequence([], num_computed_tokens=5), PagedSequence([], num_computed_tokens=400)
    _, metadata = pack([(short, 1), (long, 2)], pool)
    assert metadata.block_tables.shape[1] > 100
    backend.forward(*make_qkv(3, torch.float32), kv_cache, metadata, scale=SCALE, sliding_window=None)
    gathered = metadata.plan[None].decodes[0].gathered[0]
    assert gathered.numel() == 2 * BLOCK_SIZE * NUM_KV_HEADS * HEAD_DIM


def test_one_long_sequence_does_not_make_the_others_as_long(monkeypatch):
    """Sixteen short ones and one of 100 blocks: padded to one length they would gather 1700 blocks."""
    block_bytes = 2 * BLOCK_SIZE * NUM_KV_HEADS * HEAD_DIM * 4
    monkeypatch.setattr(torch_reference, "MAX_GATHERED_BYTES", 100 * block_bytes)
    backend, pool = TorchAttention(), BlockPool(200, BLOCK_SIZE)
    kv_cache = backend.allocate_kv_cache(200, BLOCK_SIZE, NUM_KV_HEADS, HEAD_DIM, torch.float32, CPU)
    lengths = [5] * 16 + [399]
    _, metadata = pack([(PagedSequence([], num_computed_tokens=length), 1) for length in lengths], pool)
    backend.forward(*make_qkv(17, torch.float32), kv_cache, metadata, scale=SCALE, sliding_window=None)
    decodes = metadata.plan[None].decodes
    assert [decode.queries for decode in decodes] == [slice(0, 16), slice(16, 17)]
    assert (
        max(keys.untyped_storage().nbytes() for keys, _ in (d.gathered for d in decodes)) == 100 * block_bytes
    )
