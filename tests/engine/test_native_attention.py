"""The C++ kernel: for every kind of CPU, in every format of KV, over shapes drawn at random."""

import random
from collections.abc import Callable
from functools import cache

import pytest
import torch
from torch import Tensor

from ingine.engine.config import EngineConfig
from ingine.engine.engine import Engine
from ingine.engine.kernels import native
from ingine.engine.kernels.attention import NativeAttention, TorchAttention
from ingine.engine.kernels.select import select_kernels
from ingine.engine.models.loader import load_model
from ingine.engine.request import EngineRequest
from ingine.errors import ConfigError, UnsupportedModel
from ingine.sampling_params import SamplingParams
from tests.engine.builds import library
from tests.engine.marks import EVERY_MARCH, needs_native
from tests.engine.packed import BlockPool, PackedModel, PagedSequence
from tests.engine.paged_attention import Attention, as_int4, as_int8

pytestmark = needs_native

CPU = torch.device("cpu")


@pytest.fixture(scope="session")
def backend() -> Callable[..., NativeAttention]:
    """The kernel, compiled for a name of g++'s, with a format of KV."""
    return cache(
        lambda march="native", kv_cache_dtype="auto": NativeAttention(library(march), kv_cache_dtype)
    )


def draw_attention(rng: random.Random, dtype: torch.dtype) -> Attention:
    num_kv_heads = rng.randint(1, 2)
    return Attention(
        num_heads=num_kv_heads * rng.choice((1, 2, 3, 4, 5, 6, 7, 8, 11)),
        num_kv_heads=num_kv_heads,
        head_dim=rng.choice((2, 6, 16, 20, 64, 80, 96, 128, 256)),
        block_size=rng.choice((1, 3, 4, 16, 24, 32, 160)),
        dtype=dtype,
        sliding_window=rng.choice((None, None, 1, 7, 100, 300)),
        rotary=rng.choice((True, False)),
    )


def draw_steps(rng: random.Random) -> list[list[tuple[int, int]]]:
    """Decodes, some speculation, chunks of prompts; a few sequences are long enough to be split."""
    lengths = (1, 1, 1, 2, 5, 9, 40, 130, 300)
    return [
        [(index, rng.choice(lengths)) for index in rng.sample(range(3), rng.randint(1, 3))] for _ in range(4)
    ]


@pytest.mark.parametrize("march", EVERY_MARCH)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-5), (torch.bfloat16, 4e-2)])
@pytest.mark.parametrize("seed", range(10))
def test_it_equals_the_formula_whatever_the_shape(backend, march, dtype, tolerance, seed):
    rng = random.Random(seed)
    attention, steps = draw_attention(rng, dtype), draw_steps(rng)
    assert attention.worst_error(backend(march), steps) < tolerance


@pytest.mark.parametrize("march", EVERY_MARCH)
@pytest.mark.parametrize(
    ("dtype", "typical", "worst"), [(torch.float32, 1e-4, 3e-2), (torch.bfloat16, 5e-3, 6e-2)]
)
@pytest.mark.parametrize("seed", range(10))
def test_int8_loses_what_rounding_keys_and_values_loses(backend, march, dtype, typical, worst, seed):
    """Products are of int16, so the formula over keys and values that went through int8 is met closely. What
    lies halfway between two int8 may become one here and the other there: that is the worst that happens.
    """
    rng = random.Random(seed)
    attention, steps = draw_attention(rng, dtype), draw_steps(rng)
    errors = attention.errors(backend(march, "int8"), steps, stored=as_int8)
    assert errors.square().mean().sqrt() < typical and errors.max() < worst


@pytest.mark.parametrize("march", EVERY_MARCH)
@pytest.mark.parametrize(
    ("dtype", "typical", "worst"), [(torch.float32, 1e-4, 0.25), (torch.bfloat16, 5e-3, 0.25)]
)
@pytest.mark.parametrize("seed", range(10))
def test_int4_loses_what_rounding_keys_and_values_loses(backend, march, dtype, typical, worst, seed):
    """The test is that of int8, but two codes are a fifteenth of the row's range apart."""
    rng = random.Random(seed)
    attention, steps = draw_attention(rng, dtype), draw_steps(rng)
    errors = attention.errors(backend(march, "int4"), steps, stored=as_int4)
    assert errors.square().mean().sqrt() < typical and errors.max() < worst


def test_more_heads_may_share_a_key_than_a_tile_has_rows(backend):
    assert Attention(num_heads=200, num_kv_heads=2).worst_error(backend(), [[(0, 5)], [(0, 1)]]) < 1e-5


@pytest.mark.parametrize("march", EVERY_MARCH)
@pytest.mark.parametrize("kv_cache_dtype", ["auto", "int8", "int4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("window", [None, 300])
def test_a_token_depends_on_its_sequence_alone_to_the_last_bit(backend, march, kv_cache_dtype, dtype, window):
    """Whole, in chunks, or token by token, with others or without, on one thread or two."""
    attention = Attention(9, 3, 64, 16, dtype, window, rotary=True)
    native_attention = backend(march, kv_cache_dtype)
    whole = attention.run(native_attention, [[(0, 700)]])[0]

    chunks = [[(0, 123), (1, 5)], [(1, 1), (2, 40)], [(0, 5)], [(0, 500), (2, 1)], [(0, 70), (1, 1)]]
    decodes = [[(0, 1), (1, 1)], [(0, 1), (2, 1)]]
    in_parts = attention.run(native_attention, [*chunks, *decodes])[0]
    assert torch.equal(in_parts, whole)

    num_threads = torch.get_num_threads()
    torch.set_num_threads(3 - min(num_threads, 2))
    try:
        assert torch.equal(attention.run(native_attention, [*chunks, *decodes])[0], whole)
    finally:
        torch.set_num_threads(num_threads)


@pytest.mark.parametrize("kv_cache_dtype", ["int8", "int4"])
@pytest.mark.parametrize("kind", ["key", "value", "query"])
@pytest.mark.parametrize("number", [torch.nan, torch.inf])
def test_quantised_kv_tells_of_what_is_not_finite(backend, kv_cache_dtype, kind, number):
    """An integer cannot be NaN, so its scale is."""
    attention, quantised = Attention(), backend(kv_cache_dtype=kv_cache_dtype)
    tokens = dict(zip(("query", "key", "value"), attention.make_qkv(6), strict=True))
    tokens[kind] = tokens[kind].clone()
    tokens[kind][3, 0, 5] = number
    pool, kv_cache = BlockPool(4, attention.block_size), attention.allocate(quantised, 4)
    output = attention.attend(quantised, kv_cache, pool, [(PagedSequence([]), 6)], [list(tokens.values())])
    assert output[:3].isfinite().all()
    assert output[3, 0].isnan().all()


@pytest.mark.parametrize("head_dim", [258, 15])
def test_a_head_dim_that_it_cannot_take_is_refused(backend, head_dim):
    with pytest.raises(UnsupportedModel, match=f"not {head_dim}"):
        Attention(head_dim=head_dim).allocate(backend(), 4)


def test_int8_takes_half_of_the_memory_and_int4_half_of_that(backend):
    sizes = [
        backend(kv_cache_dtype=kv_cache_dtype).bytes_per_block(16, 3, 64, torch.bfloat16)
        for kv_cache_dtype in ("int4", "int8", "auto")
    ]
    assert sizes == [16 * 3 * 2 * (32 + 4), 16 * 3 * 2 * (64 + 4), 16 * 3 * 2 * 64 * 2]


@pytest.mark.parametrize("kv_cache_dtype", ["int8", "int4"])
def test_zeros_are_kept_as_zeros(backend, kv_cache_dtype):
    """The range of zeros cannot be divided by."""
    attention, quantised = Attention(), backend(kv_cache_dtype=kv_cache_dtype)
    pool, kv_cache = BlockPool(4, attention.block_size), attention.allocate(quantised, 4)
    query, key, value = attention.make_qkv(4)
    tokens = [query, torch.zeros_like(key), torch.zeros_like(value)]
    assert (attention.attend(quantised, kv_cache, pool, [(PagedSequence([]), 4)], [tokens]) == 0).all()


# -------------------------------------------------------------------------------------------- in the engine


@pytest.mark.parametrize(("kv_cache_dtype", "share"), [("int8", 0.02), ("int4", 0.2)])
@torch.inference_mode()
def test_a_model_with_quantised_kv_says_nearly_the_same(llama, kv_cache_dtype, share):
    prompt = list(range(3, 60))

    def logits(kv_cache_dtype: str) -> Tensor:
        kernels = select_kernels(CPU, torch.float32, kv_cache_dtype=kv_cache_dtype)
        model = PackedModel(load_model(llama.path, dtype=torch.float32, device=CPU, kernels=kernels))
        sequence = PagedSequence(prompt)
        return torch.cat([model.step((sequence, length))[0] for length in (40, 16, 1)])

    exact, quantised = logits("auto"), logits(kv_cache_dtype)
    assert 0 < (exact - quantised).std() < share * exact.std()


@pytest.mark.parametrize("kv_cache_dtype", ["int8", "int4"])
def test_kv_cache_dtype_is_an_option_of_the_engine(llama, kv_cache_dtype):
    engine = Engine(
        EngineConfig(str(llama.path), dtype="float32", kv_cache_dtype=kv_cache_dtype, kv_cache_bytes=1 << 20)
    )
    engine.add(EngineRequest("a", [5, 6, 7], SamplingParams(temperature=0, max_tokens=4)))
    num_tokens = 0
    while engine.has_unfinished:
        num_tokens += sum(len(output.token_ids) for output in engine.step())
    assert num_tokens == 4


def test_an_unknown_kv_cache_dtype_is_refused():
    with pytest.raises(ConfigError, match="kv_cache_dtype must be one of auto, int8, int4, fp8, not 'int3'"):
        EngineConfig("model", kv_cache_dtype="int3")


@pytest.mark.parametrize("kv_cache_dtype", ["int8", "int4"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_quantised_kv_without_the_kernel_is_refused(monkeypatch, dtype, kv_cache_dtype):
    if dtype == torch.float32:
        monkeypatch.setattr(native, "library", lambda: None)
    with pytest.raises(ConfigError, match=f"kv_cache_dtype '{kv_cache_dtype}' needs"):
        select_kernels(CPU, dtype, kv_cache_dtype=kv_cache_dtype)


def test_without_a_compiler_the_reference_serves_and_says_the_same(monkeypatch, llama):
    monkeypatch.setattr(native, "library", lambda: None)
    kernels = select_kernels(CPU, torch.float32)
    assert isinstance(kernels.attention, TorchAttention)
    decoder = load_model(llama.path, dtype=torch.float32, device=CPU, kernels=kernels)
    engine = Engine(EngineConfig(str(llama.path), kv_cache_bytes=1 << 20), model=decoder)
    prompt = [5, 6, 7, 8, 9]
    engine.add(EngineRequest("a", prompt, SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)))
    token_ids = []
    while engine.has_unfinished:
        token_ids += [token_id for output in engine.step() for token_id in output.token_ids]
    assert token_ids == llama.hf_greedy(prompt, 12)
