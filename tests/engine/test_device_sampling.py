"""Sampling as a GPU does it, in triton's interpreter, against the definition."""

import numpy as np
import pytest
import torch

from ingine.engine.kernels.sampling import cuda as device_sampling
from ingine.engine.kernels.sampling import reference as random_sampling
from ingine.engine.kernels.sampling.reference import uniforms
from ingine.sampling_params import SamplingParams
from tests.engine.marks import needs_interpreter
from tests.engine.sampling_cases import TRUNCATIONS, make_logits, survivors
from tests.engine.tape import Tape

pytestmark = needs_interpreter

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
LAST = 1 - 2**-24
"""The largest number that `uniforms` makes."""


def choose(logits: torch.Tensor, params: list[SamplingParams], uniform: np.ndarray) -> torch.Tensor:
    return device_sampling.choose(logits, torch.from_numpy(device_sampling.pack_params(params, uniform)))


def assert_as_defined(logits: torch.Tensor, params: list[SamplingParams], uniform: np.ndarray) -> None:
    """The same tokens, unless the number of a row is within 1e-6 of an edge between two of them."""
    got = choose(logits, params, uniform).tolist()
    expected = random_sampling.choose(logits, params, uniform).tolist()
    for row, (ours, right) in enumerate(zip(got, expected, strict=True)):
        if ours != right:
            values, p = logits[row].float(), params[row]
            left = survivors(values.tolist(), p)
            is_cut = p.top_k > 0 or np.float32(p.top_p) < 1 or p.min_p > 0
            order = sorted(left, key=lambda i: (-values[i].item(), i)) if is_cut else sorted(left)
            edges = np.cumsum([left[i] for i in order])
            first, second = sorted((order.index(ours), order.index(right)))
            assert np.abs(edges[first:second] - uniform[row]).max() < 1e-6, (row, p, ours, right)


def params_of_all_kinds(temperature: float) -> list[SamplingParams]:
    return [SamplingParams(**{"temperature": temperature, **kind}) for kind in [{}, *TRUNCATIONS]]


# ------------------------------------------------------------------------------- against the definition


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("temperature", [0.3, 1.0, 5.0])
def test_each_kind_of_cut_draws_what_the_definition_draws(temperature, dtype):
    """In this vocabulary some cuts leave more tokens than there are candidates."""
    params = params_of_all_kinds(temperature)
    logits = make_logits(len(params), seed=3, vocab_size=2500).to(dtype)
    assert_as_defined(logits, params, uniforms(range(len(params)), range(len(params))))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("num_candidates", [1, 16, 1024])
def test_how_many_candidates_there_are_does_not_matter(num_candidates, dtype, monkeypatch):
    monkeypatch.setattr(device_sampling, "NUM_CANDIDATES", num_candidates)
    params = params_of_all_kinds(1.3)
    logits = make_logits(len(params), seed=4, vocab_size=100, spread=2.0).to(dtype)
    assert_as_defined(logits, params, uniforms(range(len(params)), range(len(params))))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_row_that_is_nearly_all_masked_draws_what_is_left(dtype):
    """As `allowed_token_ids` leaves it: there are fewer tokens than top_k or the candidates have room for."""
    params = [*params_of_all_kinds(2.0), SamplingParams(temperature=0)]
    logits = make_logits(len(params), seed=6, vocab_size=2500)
    allowed = torch.tensor([3, 700, 701, 2499])
    masked = torch.full_like(logits, -torch.inf)
    masked[:, allowed] = logits[:, allowed]
    numbers = uniforms(range(len(params)), range(len(params)))
    assert_as_defined(masked.to(dtype), params, numbers)
    assert set(choose(masked.to(dtype), params, numbers).tolist()) <= set(allowed.tolist())


@pytest.mark.parametrize("vocab_size", [1, 2, 17, 64])
def test_small_vocabularies(vocab_size):
    params = [*params_of_all_kinds(1.0), SamplingParams(temperature=0)]
    logits = make_logits(len(params), vocab_size=vocab_size)
    assert_as_defined(logits, params, uniforms(range(len(params)), [0] * len(params)))


def test_many_blocks_of_the_vocabulary(monkeypatch):
    monkeypatch.setattr(device_sampling, "BLOCK", 32)
    monkeypatch.setattr(device_sampling, "NUM_CANDIDATES", 8)
    params = [*3 * [SamplingParams()], SamplingParams(top_k=40), *3 * [SamplingParams(temperature=0)]]
    logits = make_logits(len(params), vocab_size=100).bfloat16()
    assert_as_defined(logits, params, uniforms(range(len(params)), [1] * len(params)))
    alike = torch.zeros(1, 100)
    assert choose(alike, [SamplingParams(top_k=90)], np.float32([0.9])).tolist() == [81]


def test_evenly_spaced_numbers_walk_through_the_whole_distribution():
    """A token comes as often as it is probable, also where the candidates do not suffice."""
    num_draws = 64
    numbers = ((np.arange(num_draws) + 0.5) / num_draws).astype(np.float32)
    for params in (SamplingParams(), SamplingParams(top_p=0.8, min_p=0.01)):
        logits = make_logits(seed=8, vocab_size=30)
        drawn = choose(logits.expand(num_draws, -1), [params] * num_draws, numbers).tolist()
        expected = survivors(logits[0].tolist(), params)
        assert set(drawn) <= expected.keys()
        assert all(abs(drawn.count(i) - prob * num_draws) <= 1.01 for i, prob in expected.items())


# ----------------------------------------------------------------------------------- ties, ends, nothing


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("num_candidates", [8, 1024])
def test_of_tokens_that_are_alike_the_lowest_ids_stay_and_come_first(num_candidates, dtype, monkeypatch):
    monkeypatch.setattr(device_sampling, "NUM_CANDIDATES", num_candidates)
    logits = torch.zeros(1, 300, dtype=dtype)
    logits[0, [250, 11, 30]] = 1.0
    logits[0, 20:40:3] = -0.0  # which is 0
    numbers = np.float32([0.0, 0.3, 0.5, 0.7, 0.85, LAST])
    params = [SamplingParams(top_k=25)] * len(numbers)
    drawn = choose(logits.expand(len(numbers), -1), params, numbers).tolist()
    assert drawn == random_sampling.choose(logits.expand(len(numbers), -1), params, numbers).tolist()
    assert drawn[0] == 11 and drawn[-1] == 22, "three that are likelier, then 22 of the lowest ids"


@pytest.mark.parametrize(
    "cut", [{"top_k": 8}, {"top_p": 0.6}, {"top_k": 10, "top_p": 0.7}, {"min_p": 1.0}], ids=str
)
@pytest.mark.parametrize("num_candidates", [1, 1024])
def test_a_cut_among_tokens_that_are_alike_keeps_the_lowest_ids(num_candidates, cut, monkeypatch):
    """The rest may be all among the candidates, or the cut may lie outside of them."""
    monkeypatch.setattr(device_sampling, "NUM_CANDIDATES", num_candidates)
    monkeypatch.setattr(device_sampling, "BLOCK", 16)
    logits = torch.zeros(1, 16)
    logits[0, [9, 2, 5]] = 1.0
    left = survivors(logits[0].tolist(), SamplingParams(**cut))
    likeliest = [2, 5, 9]
    order = [*likeliest, *(token_id for token_id in range(16) if token_id not in likeliest)][: len(left)]
    middles = np.cumsum([left[token_id] for token_id in order]) - [left[token_id] / 2 for token_id in order]
    numbers = np.float32([*middles[-2:], LAST])
    drawn = choose(logits.expand(3, -1), [SamplingParams(**cut)] * 3, numbers).tolist()
    assert drawn == [*order[-2:], order[-1]]


@pytest.mark.parametrize("num_candidates", [1, 4])
def test_an_edge_of_the_nucleus_leaves_no_more_than_it_takes(num_candidates, monkeypatch):
    monkeypatch.setattr(device_sampling, "NUM_CANDIDATES", num_candidates)
    params = [SamplingParams(top_p=top_p) for top_p in (0.25, 0.26, 0.5, 0.75)]
    assert choose(torch.zeros(4, 4), params, np.float32([LAST] * 4)).tolist() == [0, 1, 1, 2]


def test_the_nucleus_is_that_of_what_top_k_leaves(monkeypatch):
    """top_k leaves 50 of 100 equal tokens, top_p 13 of these, though 40 candidates hold a quarter of all."""
    monkeypatch.setattr(device_sampling, "NUM_CANDIDATES", 40)
    params = SamplingParams(top_k=50, top_p=0.25)
    assert choose(torch.zeros(1, 100), [params], np.float32([LAST])).tolist() == [12]


def test_min_p_goes_before_a_top_k_that_is_more_than_the_candidates(monkeypatch):
    """It leaves fewer than top_k of each row, and of most more than the candidates."""
    monkeypatch.setattr(device_sampling, "NUM_CANDIDATES", 4)
    params = [SamplingParams(temperature=1.3, top_k=60, min_p=0.15)] * 24
    numbers = np.float32([*(np.arange(20) + 0.5) / 20, *4 * [LAST]])
    assert_as_defined(make_logits(24, vocab_size=100, spread=2.0), params, numbers)


@pytest.mark.parametrize("cut", [{"top_k": 30}, {"top_p": 0.6}], ids=str)
def test_rounding_draws_nothing_beyond_a_cut(cut, monkeypatch):
    monkeypatch.setattr(device_sampling, "NUM_CANDIDATES", 1)
    logits, params = make_logits(24, vocab_size=60, spread=0.5), SamplingParams(**cut)
    drawn = choose(logits, [params] * len(logits), np.full(len(logits), LAST, dtype=np.float32)).tolist()
    for row, token_id in zip(logits.tolist(), drawn, strict=True):
        assert token_id in survivors(row, params)


@pytest.mark.parametrize("num_candidates", [1, 16])
def test_the_ends_of_the_unit_interval_draw_tokens_that_have_a_probability(num_candidates, monkeypatch):
    monkeypatch.setattr(device_sampling, "NUM_CANDIDATES", num_candidates)
    monkeypatch.setattr(device_sampling, "BLOCK", 16)
    logits = torch.full((1, 40), -torch.inf)
    logits[:, 3:6] = 0.0
    for params in (SamplingParams(), SamplingParams(top_p=0.999), SamplingParams(top_k=8)):
        ends = np.float32([0, LAST, 1])  # 1 never comes
        assert choose(logits.expand(3, -1), [params] * 3, ends).tolist() == [3, 5, 5]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_where_the_largest_logit_is_not_finite_nothing_is_chosen(dtype):
    logits = make_logits(5, vocab_size=50).to(dtype)
    logits[0, 7] = torch.nan
    logits[1, 7] = torch.inf
    logits[2] = -torch.inf
    logits[3, 8:] = -torch.inf
    for params in (SamplingParams(temperature=0), SamplingParams(), SamplingParams(top_p=0.9)):
        numbers = uniforms(range(5), range(5))
        got = choose(logits, [params] * 5, numbers).tolist()
        assert got[:3] == [-1, -1, -1]
        assert got == random_sampling.choose(logits, [params] * 5, numbers).tolist()
    right = random_sampling.choose(logits, [SamplingParams(temperature=0)] * 5, numbers)
    assert torch.equal(device_sampling.greedy(logits), right)


def test_greedy_takes_the_lowest_id_of_many_that_are_alike():
    logits = torch.zeros(2, 3000)
    logits[1, [2999, 1500]] = 1.0
    params = [SamplingParams(temperature=0)] * 2
    assert device_sampling.greedy(logits).tolist() == [0, 1500]
    assert choose(logits, params, np.zeros(2, dtype=np.float32)).tolist() == [0, 1500]


# ------------------------------------------------------------------------------------- rows and parameters


def test_parameters_at_the_ends_of_their_ranges():
    params = [
        SamplingParams(temperature=0, top_k=-1),
        SamplingParams(temperature=5e-324),
        SamplingParams(top_k=2**40, top_p=1 - 1e-12),
    ]
    rows = device_sampling.pack_params(params, np.float32([0.25, 0.5, 0.75]))
    assert rows.dtype == np.float32
    assert rows[:, 0].tolist() == [0, np.float32(random_sampling.MIN_TEMPERATURE), 1]
    assert rows[:, 1].tolist() == [0, 0, 2**40]
    assert rows[:, 2].tolist() == [1, 1, 1]
    assert rows[:, 4].tolist() == [0.25, 0.5, 0.75]
    assert_as_defined(make_logits(3, vocab_size=40), params, rows[:, 4])


def test_a_row_depends_on_nothing_but_itself():
    params = params_of_all_kinds(1.0)
    logits = make_logits(len(params), vocab_size=1200).bfloat16()
    numbers = uniforms(range(len(params)), [3] * len(params))
    together = choose(logits, params, numbers).tolist()
    backwards = choose(logits.flip(0), params[::-1], numbers[::-1].copy()).tolist()
    assert together == backwards[::-1]


# ------------------------------------------------------------------------------------------ CUDA graphs


def test_a_captured_choice_is_made_anew_for_other_logits_and_parameters():
    """This includes rows with needs that no captured row had. No operation in it waits for the device."""
    all_params = params_of_all_kinds(1.0)
    logits = torch.zeros(len(all_params), 1500)
    rows = torch.from_numpy(
        device_sampling.pack_params(
            [SamplingParams(temperature=0)] * len(all_params), np.zeros(len(all_params))
        )
    )
    tape = Tape.capture(lambda: (device_sampling.greedy(logits), device_sampling.choose(logits, rows)))
    for seed in (1, 2):
        logits.copy_(make_logits(len(all_params), seed=seed, vocab_size=1500))
        numbers = uniforms(range(len(all_params)), [seed] * len(all_params))
        rows.copy_(torch.from_numpy(device_sampling.pack_params(all_params, numbers)))
        tape.replay()
        greedy, chosen = tape.result
        assert torch.equal(greedy, logits.argmax(dim=-1))
        assert torch.equal(chosen, choose(logits, all_params, numbers))
