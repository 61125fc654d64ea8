"""The attention interface: what every backend must do. A new backend joins by adding itself to BACKENDS."""

import random
from dataclasses import replace
from functools import cache
from itertools import product

import pytest
import torch
from torch import Tensor

from ingine.engine.kernels.attention import (
    AttentionBackend,
    AttentionMetadata,
    NativeAttention,
    TorchAttention,
    torch_reference,
)
from tests.engine.builds import library
from tests.engine.marks import needs_native, needs_triton
from tests.engine.packed import BlockPool, PagedSequence, pack
from tests.engine.paged_attention import Attention, attend_densely
from tests.paths import needs

BACKENDS = [
    pytest.param("torch", marks=needs("plain torch")),
    pytest.param("native", marks=needs_native),
    pytest.param("triton", marks=needs_triton),
]
ATTENTION = Attention(num_heads=6, num_kv_heads=2, head_dim=16, block_size=4)
STEPS = {
    "one prefill": [[(0, 9)]],
    "batched prefill": [[(0, 3), (1, 17), (2, 4)]],
    "chunked prefill": [[(0, 5)], [(0, 5)], [(0, 2)]],
    "prompts of one token": [[(0, 1), (1, 1)]],
    "decode": [[(0, 3), (1, 9)], [(0, 1), (1, 1)], [(1, 1)], [(0, 1)]],
    "mixed": [[(0, 6), (1, 2)], [(0, 1), (1, 3), (2, 8)], [(0, 1), (1, 1), (2, 2)]],
}
TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 3e-2}
WINDOWS = [(None, False), (None, True), (1, False), (5, True), (1000, True)]
"""Windows, with and without a rotation."""


@cache
def make_backend(name: str) -> AttentionBackend:
    if name == "torch":
        return TorchAttention()
    if name == "native":
        return NativeAttention(library())
    from ingine.engine.kernels.attention.triton import TritonAttention

    return TritonAttention()


@pytest.fixture(params=BACKENDS)
def backend(request) -> AttentionBackend:
    return make_backend(request.param)


def every_case() -> list:
    """All steps in all windows and dtypes; of Triton, whose interpreter is slow, each of them once, and the
    rest as wide."""
    cases = []
    for param, (index, steps), dtype, window in product(
        BACKENDS, enumerate(STEPS), TOLERANCES, range(len(WINDOWS))
    ):
        (name,) = param.values
        is_kept = name != "triton" or (dtype == torch.float32 and window == index % len(WINDOWS))
        is_kept = is_kept or (dtype == torch.bfloat16 and steps == "mixed" and window == 3)
        marks = [*param.marks, *([] if is_kept else [pytest.mark.wide])]
        cases.append(pytest.param(name, steps, dtype, *WINDOWS[window], marks=marks))
    return cases


@pytest.mark.parametrize(("name", "steps", "dtype", "window", "rotary"), every_case())
def test_backend_equals_the_formula(name, steps, dtype, window, rotary):
    attention = replace(ATTENTION, dtype=dtype, sliding_window=window, rotary=rotary)
    assert attention.worst_error(make_backend(name), STEPS[steps]) < TOLERANCES[dtype]


@pytest.mark.parametrize("seed", range(8))
def test_backend_equals_the_formula_on_random_shapes_and_schedules(backend, seed):
    rng = random.Random(seed)
    num_kv_heads, group_size = rng.choice((1, 2, 3)), rng.choice((1, 2, 3, 5, 8))
    attention = Attention(
        num_heads=num_kv_heads * group_size,
        num_kv_heads=num_kv_heads,
        head_dim=rng.choice((8, 16, 40, 64, 80, 128)),
        block_size=rng.choice((1, 3, 4, 16, 24)),
        sliding_window=rng.choice((None, 3, 12)),
        rotary=rng.random() < 0.5,
    )
    steps = [
        [(index, rng.choice((1, 1, 2, 7))) for index in rng.sample(range(6), rng.randint(1, 6))]
        for _ in range(6)
    ]
    assert attention.worst_error(backend, steps) < 1e-5


def test_sequences_may_share_blocks(backend):
    """A prefix hit: two sequences read the same blocks, and only the first has ever written them."""
    pool, kv_cache = BlockPool(20, ATTENTION.block_size), ATTENTION.allocate(backend, 20)
    first, prefix = PagedSequence([]), ATTENTION.make_qkv(8, seed=1)
    ATTENTION.attend(backend, kv_cache, pool, [(first, 8)], [prefix])

    second = PagedSequence([], block_table=list(first.block_table), num_computed_tokens=8)
    query, key, value = suffix = ATTENTION.make_qkv(3, seed=2)
    output = ATTENTION.attend(backend, kv_cache, pool, [(second, 3)], [suffix])

    keys, values = torch.cat((prefix[1], key)), torch.cat((prefix[2], value))
    expected = attend_densely(query, keys, values, ATTENTION.scale, None)
    torch.testing.assert_close(output.double(), expected, atol=1e-5, rtol=0)


def test_what_is_not_finite_stays_with_its_sequence(backend):
    """This includes blocks that are freed and used by another sequence."""
    pool, kv_cache = BlockPool(20, ATTENTION.block_size), ATTENTION.allocate(backend, 20)
    sick, well = PagedSequence([]), PagedSequence([])
    tokens = ATTENTION.make_qkv(6, seed=1)
    nan = [torch.full_like(new, torch.nan) for new in tokens]
    output = ATTENTION.attend(backend, kv_cache, pool, [(sick, 6), (well, 6)], [nan, tokens])
    assert output[:6].isnan().all()
    expected = attend_densely(*tokens, ATTENTION.scale, None)
    torch.testing.assert_close(output[6:].double(), expected, atol=1e-5, rtol=0)

    heir = PagedSequence([], block_table=sick.block_table)
    output = ATTENTION.attend(backend, kv_cache, pool, [(heir, 6)], [tokens])
    torch.testing.assert_close(output.double(), expected, atol=1e-5, rtol=0)


def last_outputs(
    backend: AttentionBackend, tokens: tuple[Tensor, Tensor, Tensor], query_len: int, num_others: int
) -> Tensor:
    """Of the last `query_len` of a sequence's (query, key, value), in a step with other sequences: these have
    one token each, and come first."""
    sequence, num_cached = PagedSequence([]), len(tokens[0]) - query_len
    pool, kv_cache = BlockPool(30, ATTENTION.block_size), ATTENTION.allocate(backend, 30)
    cached = [new[:num_cached] for new in tokens]
    ATTENTION.attend(backend, kv_cache, pool, [(sequence, num_cached)], [cached])
    sequence.num_computed_tokens = num_cached
    step = [*((PagedSequence([]), 1) for _ in range(num_others)), (sequence, query_len)]
    others = num_others * [ATTENTION.make_qkv(1)]
    rest = [new[num_cached:] for new in tokens]
    return ATTENTION.attend(backend, kv_cache, pool, step, [*others, rest])[-query_len:]


@pytest.mark.filterwarnings("ignore:(invalid value|All-NaN):RuntimeWarning")  # of the interpreter
@pytest.mark.parametrize("query_len", [1, 3])
@pytest.mark.parametrize("num_others", [0, 3])
def test_scores_of_minus_infinity_count_for_nothing(backend, query_len, num_others):
    """65 of 70 tokens: more than a tile of keys, and more than a split of a single sequence."""
    query, key, value = ATTENTION.make_qkv(70)
    query, key = query.abs(), key.clone()
    key[:65, :, 0] = -torch.inf
    output = last_outputs(backend, (query, key, value), query_len, num_others)
    expected = attend_densely(query, key, value, ATTENTION.scale, None)[-query_len:]
    torch.testing.assert_close(output.double(), expected, atol=1e-5, rtol=0)


@pytest.mark.filterwarnings("ignore:(invalid value|All-NaN):RuntimeWarning")  # of the interpreter
@pytest.mark.parametrize("backend", BACKENDS[1:], indirect=True)
@pytest.mark.parametrize("query_len", [1, 3])
@pytest.mark.parametrize("num_tokens", [5, 70])
@pytest.mark.parametrize("num_others", [0, 3])
def test_scores_of_minus_infinity_alone_are_nan(backend, query_len, num_tokens, num_others):
    """The formula gives NaN, too: a model that is broken like this must not go on without a sign."""
    query, key, value = (new.clone() for new in ATTENTION.make_qkv(num_tokens))
    key[:, 0, 0] = -key[:, 0, 0].abs()
    query[-1, 0, 0] = torch.inf
    output = last_outputs(backend, (query, key, value), query_len, num_others)
    assert output[-1, 0].isnan().all()
    assert output[-1, 1:].isfinite().all() and output[:-1].isfinite().all()


@pytest.mark.parametrize("block_size", [1, 4, 16, 24])
def test_bytes_per_block_is_what_a_block_takes(backend, block_size):
    attention = replace(ATTENTION, block_size=block_size, dtype=torch.bfloat16)
    kv_cache = attention.allocate(backend, 7)
    per_block = backend.bytes_per_block(
        block_size, attention.num_kv_heads, attention.head_dim, attention.dtype
    )
    assert 7 * per_block == sum(memory.untyped_storage().nbytes() for memory in kv_cache)


@pytest.mark.parametrize("backend", [BACKENDS[0], BACKENDS[2]], indirect=True)  # those that take it
def test_large_float16_values_do_not_overflow(backend):
    """The product of a query and a key may be over 65504, the scaled product is not."""
    attention = replace(ATTENTION, dtype=torch.float16)
    query, key, value = attention.make_qkv(7)
    query, key = torch.full_like(query, 80.0), torch.full_like(key, -80.0)
    key[-1] = 80.0  # so the last token sees nothing but itself

    def last_output(*lengths: int) -> Tensor:
        sequence, pool = PagedSequence([]), BlockPool(9, attention.block_size)
        kv_cache = attention.allocate(backend, 9)
        for length in lengths:
            step = [new[sequence.num_computed_tokens :][:length] for new in (query, key, value)]
            output = attention.attend(backend, kv_cache, pool, [(sequence, length)], [step])
            sequence.num_computed_tokens += length
        return output[-1]

    prefilled, decoded = last_output(7), last_output(6, 1)
    assert torch.equal(prefilled, value[-1].repeat_interleave(3, dim=0))
    assert torch.equal(decoded, prefilled)


# ------------------------------------------------------------------------------- the torch reference alone

BLOCK_BYTES = TorchAttention().bytes_per_block(
    ATTENTION.block_size, ATTENTION.num_kv_heads, ATTENTION.head_dim, ATTENTION.dtype
)


def attend(step: list[tuple[PagedSequence, int]]) -> AttentionMetadata:
    """One step of sequences whose earlier tokens do not matter."""
    backend = TorchAttention()
    _, metadata = pack(step, BlockPool(300, ATTENTION.block_size))
    backend.forward(
        *ATTENTION.make_qkv(sum(metadata.query_lens)),
        ATTENTION.allocate(backend, 300),
        metadata,
        scale=ATTENTION.scale,
        sliding_window=None,
    )
    return metadata


@pytest.mark.parametrize("max_bytes", [1, 4 * BLOCK_BYTES])
@pytest.mark.parametrize("window", [None, 5])
def test_decodes_that_take_too_much_memory_at_a_time_go_in_groups(monkeypatch, max_bytes, window):
    """One by one, and by four blocks; among them are prompts of one token, and there is a prefill."""
    monkeypatch.setattr(torch_reference, "MAX_GATHERED_BYTES", max_bytes)
    steps = [[(0, 3), (1, 19), (2, 8), (3, 4)], [(0, 1), (1, 1), (2, 1), (3, 1), (4, 1), (5, 6)]]
    attention = replace(ATTENTION, sliding_window=window)
    assert attention.worst_error(TorchAttention(), [*steps, [(i, 1) for i in range(6)]]) < 1e-5


def test_decode_copies_no_more_than_the_longest_sequence_needs():
    """One sequence that only waits must not make the gather of those that decode any larger."""
    short, long = PagedSequence([], num_computed_tokens=5), PagedSequence([], num_computed_tokens=400)
    metadata = attend([(short, 1), (long, 2)])
    assert metadata.block_tables.shape[1] > 100
    keys, values = metadata.plan[None].decodes[0].gathered
    assert keys.nbytes + values.nbytes == 2 * BLOCK_BYTES


def test_one_long_sequence_does_not_make_the_others_as_long(monkeypatch):
    """Sixteen short ones and one of 100 blocks: padded to one length they would gather 1700 blocks."""
    monkeypatch.setattr(torch_reference, "MAX_GATHERED_BYTES", 100 * BLOCK_BYTES)
    lengths = [5] * 16 + [399]
    metadata = attend([(PagedSequence([], num_computed_tokens=length), 1) for length in lengths])
    decodes = metadata.plan[None].decodes
    assert [decode.queries for decode in decodes] == [slice(0, 16), slice(16, 17)]
    assert max(d.gathered[0].untyped_storage().nbytes() for d in decodes) == 100 * BLOCK_BYTES
