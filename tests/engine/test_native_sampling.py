"""Drawing and log probabilities: the native kernels against the reference in torch."""

from collections.abc import Iterator

import numpy as np
import pytest
import torch

from ingine.engine.kernels import native
from ingine.engine.kernels.native import sampling as native_sampling
from ingine.engine.kernels.sampling import reference as random_sampling
from ingine.engine.kernels.sampling.interface import TORCH_SAMPLING
from ingine.engine.kernels.sampling.logprobs import logprobs as torch_logprobs
from ingine.engine.kernels.sampling.reference import uniforms
from ingine.engine.kernels.select import select_kernels
from ingine.engine.sample.sampler import sample
from ingine.sampling_params import SamplingParams
from tests.engine.builds import library
from tests.engine.marks import EVERY_MARCH, needs_native
from tests.engine.sampling_cases import TRUNCATIONS, make_logits, make_sequence, survivors


def cdf(logits: torch.Tensor, params: SamplingParams) -> tuple[list[int], np.ndarray]:
    """The tokens that may be drawn from logits [vocab_size], in their order, and the exact CDF."""
    left = survivors(logits.tolist(), params)
    is_cut = params.top_k > 0 or np.float32(params.top_p) < 1 or params.min_p > 0
    token_ids = sorted(left, key=lambda i: (-logits[i].item(), i)) if is_cut else sorted(left)
    return token_ids, np.cumsum([left[i] for i in token_ids])


@pytest.fixture(params=EVERY_MARCH)
def compiled(request, monkeypatch) -> Iterator[None]:
    """The CPU for which the native kernels of sampling are compiled."""
    monkeypatch.setattr(native, "library", lambda: library(request.param))
    native_sampling._library.cache_clear()
    yield
    native_sampling._library.cache_clear()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "temperature", [pytest.param(0.3, marks=pytest.mark.wide), 1.0, pytest.param(5.0, marks=pytest.mark.wide)]
)
@pytest.mark.parametrize("truncation", [{}, *TRUNCATIONS], ids=str)
def test_native_and_reference_differ_at_an_edge_between_two_tokens_at_most(
    compiled, truncation, temperature, dtype
):
    params = SamplingParams(temperature=temperature, **truncation)
    logits = make_logits(seed=3).to(dtype)
    num_draws = 256
    numbers = uniforms([9] * num_draws, range(num_draws))
    drawn = [
        choose(logits.expand(num_draws, -1), [params] * num_draws, numbers).numpy()
        for choose in (random_sampling.choose, native_sampling.choose)
    ]
    for draw in np.flatnonzero(drawn[0] != drawn[1]):
        token_ids, edges = cdf(logits[0].float(), params)
        first, second = sorted(token_ids.index(token_id) for token_id in (drawn[0][draw], drawn[1][draw]))
        assert np.abs(edges[first:second] - numbers[draw]).max() < 1e-6


@pytest.mark.parametrize("num_threads", [1, 2])
def test_native_reads_bfloat16_as_it_is_with_any_number_of_threads(compiled, num_threads):
    kinds = [{}, *TRUNCATIONS, {"temperature": 0.0}]
    all_params = [SamplingParams(**kind) for kind in kinds]
    logits = make_logits(len(kinds), seed=5).bfloat16()
    numbers = uniforms(range(len(kinds)), [3] * len(kinds))
    expected = [
        native_sampling.choose(logits[row : row + 1].float(), [params], numbers[row : row + 1]).item()
        for row, params in enumerate(all_params)
    ]
    before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        assert native_sampling.choose(logits, all_params, numbers).tolist() == expected
    finally:
        torch.set_num_threads(before)


def test_without_native_kernels_the_reference_serves(monkeypatch):
    device = torch.device("cpu")
    assert select_kernels(device, torch.float16).sampling is TORCH_SAMPLING
    monkeypatch.setattr(native, "library", lambda: None)
    assert select_kernels(device, torch.float32).sampling is TORCH_SAMPLING


# ------------------------------------------------------------------------------------ log probabilities


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("spread", [0.3, 3.0, 30.0])
@pytest.mark.parametrize("num_top", [0, 1, 20])
def test_native_log_probabilities_are_the_reference_s(compiled, num_top, spread, dtype):
    logits = make_logits(40, spread=spread).to(dtype)
    logits[3, 9] = torch.nan
    token_ids = native_sampling.choose(logits, [SamplingParams()] * 40, uniforms(range(40), range(40)))
    assert token_ids[3] == -1
    well = [row for row in range(40) if row != 3]
    chosen, ranks, top_ids, top = native_sampling.logprobs(logits, token_ids, num_top)
    expected, expected_ranks, _, expected_top = torch_logprobs(logits, token_ids, num_top)
    torch.testing.assert_close(chosen, expected, equal_nan=True)
    assert ranks.tolist() == expected_ranks.tolist()
    torch.testing.assert_close(top[well], expected_top[well])
    # In bfloat16 many are alike, and the reference has them in any order.
    of_ids = logits.float().log_softmax(dim=-1).gather(1, top_ids)
    torch.testing.assert_close(top[well], of_ids[well])
    assert all(len(set(ids)) == num_top for ids in top_ids[well].tolist())
    assert (top[3] == -torch.inf).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_tokens_too_unlikely_for_a_weight_have_a_log_probability(compiled, dtype):
    logits = torch.tensor([[0, -100, -200, -50, -torch.inf, -200]], dtype=dtype)
    for num_top in range(1, 7):
        _, _, top_ids, top = native_sampling.logprobs(logits, torch.tensor([0]), num_top)
        assert top_ids[0].tolist() == [0, 3, 1, 2, 5, 4][:num_top]
        assert top[0].tolist() == [0, -50, -100, -200, -200, -torch.inf][:num_top]


@pytest.mark.parametrize("logprobs", [torch_logprobs, native_sampling.logprobs], ids=["torch", "native"])
def test_the_rank_is_the_number_of_tokens_at_least_as_likely(compiled, logprobs):
    logits = torch.tensor([[2.0, 5.0, 5.0, -torch.inf, 3.0] + [-1.0] * 200]).repeat(5, 1)
    _, ranks, _, _ = logprobs(logits, torch.tensor([0, 1, 2, 3, -1]), 1)
    assert ranks.tolist() == [4, 2, 2, 205, 0]


@pytest.mark.parametrize(
    "sampling",
    [TORCH_SAMPLING, pytest.param(native_sampling.NATIVE_SAMPLING, marks=needs_native)],
    ids=lambda sampling: sampling.name,
)
def test_tokens_of_no_probability_are_not_among_the_likeliest(sampling):
    logits = torch.full((1, 100), -torch.inf)
    logits[0, [7, 70]] = torch.tensor([1.0, 2.0])
    [token] = sample(logits, [make_sequence(logprobs=5)], sampling).wait()
    assert [token_id for token_id, _ in token.logprobs["top"]] == [70, 7]
