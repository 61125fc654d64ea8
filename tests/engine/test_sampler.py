"""Each sampling parameter against a slow reference, and the draws against their distribution."""

import numpy as np
import pytest
import torch

from ingine.engine.kernels.native.sampling import NATIVE_SAMPLING
from ingine.engine.kernels.sampling.interface import TORCH_SAMPLING, Sampling
from ingine.engine.kernels.sampling.reference import uniforms
from ingine.engine.sample.sampler import sample
from ingine.sampling_params import SamplingParams
from tests.engine.marks import needs_native
from tests.engine.sampling_cases import (
    EOS,
    TRUNCATIONS,
    VOCAB_SIZE,
    make_logits,
    make_sequence,
    sample_one,
    survivors,
)


@pytest.fixture(
    params=[TORCH_SAMPLING, pytest.param(NATIVE_SAMPLING, marks=needs_native)],
    ids=lambda sampling: sampling.name,
)
def sampling(request) -> Sampling:
    return request.param


@pytest.fixture
def choose(sampling):
    return sampling.choose


# --------------------------------------------------------------------------------- one parameter each


def test_greedy_takes_the_largest_logit(sampling):
    logits = make_logits(4)
    tokens = sample(logits.clone(), [make_sequence() for _ in range(4)], sampling).wait()
    assert [token.token_id for token in tokens] == logits.argmax(dim=-1).tolist()


def test_logit_bias_is_added(sampling):
    logits = torch.zeros(1, 10)
    assert sample_one(logits, make_sequence(logit_bias={4: 1.0, 5: 2.0, 6: -1.0}), sampling) == 5


def test_min_tokens_masks_every_token_that_ends_the_sequence(sampling):
    logits = torch.zeros(1, 10)
    logits[0, [EOS, 5, 4]] = torch.tensor([9.0, 8.0, 7.0])
    params = {"min_tokens": 3, "stop_token_ids": (5,)}
    assert sample_one(logits, make_sequence([0, 0], **params), sampling) == 4
    assert sample_one(logits, make_sequence([0, 0, 0], **params), sampling) == EOS
    assert sample_one(logits, make_sequence([0, 0], **params, ignore_eos=True), sampling) == EOS, (
        "it ends nothing then"
    )


def penalised(
    logits: list[float], prompt: list[int], output: list[int], params: SamplingParams
) -> list[float]:
    """vLLM's definition, one token at a time."""
    result = []
    for token_id, logit in enumerate(logits):
        if token_id in prompt or token_id in output:
            logit = logit / params.repetition_penalty if logit > 0 else logit * params.repetition_penalty
        logit -= params.frequency_penalty * output.count(token_id)
        logit -= params.presence_penalty * (token_id in output)
        result.append(logit)
    return result


@pytest.mark.parametrize(
    "params",
    [
        {"repetition_penalty": 1.7},
        {"repetition_penalty": 0.5},
        {"presence_penalty": 1.5},
        {"presence_penalty": -1.5},
        {"frequency_penalty": 0.7},
        {"repetition_penalty": 1.3, "presence_penalty": 0.5, "frequency_penalty": 0.9},
    ],
)
def test_penalties_lower_what_has_been_said(sampling, params):
    """Compared by the tokens of a whole greedy generation: each changes the counts for those after it."""
    logits = make_logits(vocab_size=12, spread=1.5)
    prompt, output = [1, 2, 2, 3], []
    for _ in range(40):
        seq = make_sequence(output, prompt, **params, ignore_eos=True)
        expected = penalised(logits[0].tolist(), prompt, output, seq.params)
        token_id = sample_one(logits, seq, sampling)
        assert expected[token_id] == pytest.approx(max(expected), abs=1e-5)
        output.append(token_id)


def test_logprobs_are_those_of_the_model_whatever_is_done_to_the_logits(sampling):
    logits = make_logits()
    seq = make_sequence(logit_bias={9: 100.0}, repetition_penalty=1.5, logprobs=3)
    [token] = sample(logits.clone(), [seq], sampling).wait()
    expected = logits[0].double().log_softmax(dim=-1)
    assert token.token_id == token.logprobs["token_id"] == 9
    assert token.logprobs["logprob"] == pytest.approx(expected[9].item(), abs=1e-4)
    top = expected.topk(3)
    assert [token_id for token_id, _ in token.logprobs["top"]] == top.indices.tolist()
    assert [logprob for _, logprob in token.logprobs["top"]] == pytest.approx(top.values.tolist(), abs=1e-4)


def test_logprobs_of_zero_report_the_chosen_token_only(sampling):
    plain, wanted = sample(make_logits(2), [make_sequence(), make_sequence(logprobs=0)], sampling).wait()
    assert plain.logprobs is None
    assert wanted.logprobs["top"] == []


# ------------------------------------------------------------------------------- what may be drawn


@pytest.mark.parametrize("temperature", [0.3, 1.0, 5.0])
@pytest.mark.parametrize("truncation", TRUNCATIONS, ids=str)
def test_only_what_is_left_is_drawn_each_at_its_own_number(choose, truncation, temperature):
    """Evenly spaced numbers walk through the whole CDF: a token comes as often as it is probable."""
    params = SamplingParams(temperature=temperature, **truncation)
    logits = make_logits()
    expected = survivors(logits[0].tolist(), params)
    num_draws = 512
    numbers = ((np.arange(num_draws) + 0.5) / num_draws).astype(np.float32)
    drawn = choose(logits.expand(num_draws, -1), [params] * num_draws, numbers).tolist()
    assert set(drawn) <= expected.keys()
    for token_id, prob in expected.items():
        assert abs(drawn.count(token_id) - prob * num_draws) <= 1.01


def test_a_batch_of_all_kinds_draws_what_each_would_alone(choose):
    kinds = [{}, *TRUNCATIONS, {}]
    all_params = [SamplingParams(temperature=0.7 + i / 4, **kind) for i, kind in enumerate(kinds)]
    logits = make_logits(len(all_params))
    numbers = uniforms(range(len(all_params)), [3] * len(all_params))
    together = choose(logits, all_params, numbers).tolist()
    alone = [
        choose(logits[row : row + 1], [params], numbers[row : row + 1]).item()
        for row, params in enumerate(all_params)
    ]
    assert together == alone


def test_a_draw_does_not_depend_on_whether_another_row_has_min_p(choose):
    """top_p is exactly at a token's edge, where the last digit of the total decides."""
    logits = make_logits(spread=1.5)
    cdf = logits[0].softmax(-1).sort(descending=True).values.cumsum(-1)
    all_params = [SamplingParams(top_p=top_p) for top_p in cdf[:300].tolist()]
    numbers = np.full(len(all_params), 1 - 2**-24, dtype=np.float32)  # draws the last token that is left
    alone = choose(logits.repeat(len(all_params), 1), all_params, numbers)
    beside = choose(
        logits.repeat(len(all_params) + 1, 1),
        [*all_params, SamplingParams(min_p=0.5)],
        np.append(numbers, numbers[0]),
    )
    assert alone.tolist() == beside[:-1].tolist()


def test_very_low_temperatures_are_greedy(sampling):
    logits = make_logits()
    for temperature in (1e-3, 1e-30, 5e-324):
        assert sample_one(logits, make_sequence(temperature=temperature), sampling) == logits.argmax().item()


def test_the_ends_of_the_unit_interval_draw_tokens_that_have_a_probability(choose):
    logits = torch.full((2, 9), -torch.inf)
    logits[:, 3:6] = 0.0
    numbers = np.array([0.0, 1.0], dtype=np.float32)  # 1.0 never comes; rounding can act as if it did
    assert choose(logits, [SamplingParams()] * 2, numbers).tolist() == [3, 5]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_of_tokens_that_are_alike_the_lowest_ids_stay(choose, dtype):
    logits = torch.zeros(1, VOCAB_SIZE, dtype=dtype)
    logits[0, [5000, 11, 300]] = 1.0
    logits[0, 20:40] = -0.0  # which is 0
    numbers = np.float32([0.0, 0.3, 0.5, 0.7, 0.85, 1 - 2**-24])
    drawn = choose(logits.expand(len(numbers), -1), [SamplingParams(top_k=25)] * len(numbers), numbers)
    assert drawn[0] == 11 and drawn[-1] == 22, "three that are likelier, then 22 of the lowest ids"
    in_order = [11, 300, 5000, *(i for i in range(25) if i != 11)]
    assert [in_order.index(token_id) for token_id in drawn.tolist()] == sorted(
        map(in_order.index, drawn.tolist())
    )


def test_an_edge_of_the_nucleus_leaves_no_more_than_it_takes(choose):
    logits = torch.zeros(1, 4)
    last = np.float32([1 - 2**-24])
    drawn = [choose(logits, [SamplingParams(top_p=top_p)], last).item() for top_p in (0.25, 0.26, 0.5, 0.75)]
    assert drawn == [0, 1, 1, 2]


# ------------------------------------------------------------------------------------------ randomness


def test_draws_follow_the_distribution(choose):
    """Chi square over 8 tokens; the bound is the 99.9% quantile at 7 degrees of freedom."""
    probs = torch.tensor([0.3, 0.2, 0.15, 0.1, 0.1, 0.08, 0.05, 0.02])
    num_draws = 20_000
    numbers = uniforms([42] * num_draws, range(num_draws))
    drawn = choose(probs.log().expand(num_draws, -1), [SamplingParams()] * num_draws, numbers)
    expected = probs * num_draws
    chi_square = ((drawn.bincount(minlength=8) - expected) ** 2 / expected).sum()
    assert chi_square < 24.3


def test_the_number_of_a_token_is_that_of_its_seed_and_position(sampling, choose):
    logits = make_logits(spread=0.0)  # all tokens alike: the number decides
    for seed, position in ((1, 0), (1, 1), (2, 1)):
        token_id = sample_one(logits, make_sequence([0] * position, temperature=1.0, seed=seed), sampling)
        expected = choose(logits, [SamplingParams()], uniforms([seed], [position]))
        assert token_id == expected.item()
    assert len({float(uniforms([seed], [position])[0]) for seed in (1, 2) for position in (0, 1)}) == 4


@pytest.mark.parametrize(
    ("seeds", "positions"),
    [([5] * 4096, range(4096)), (range(4096), [5] * 4096), (range(4096), range(4096))],
    ids=["of one seed", "of one position", "of both"],
)
def test_numbers_are_uniform_and_independent_of_their_neighbours(seeds, positions):
    numbers = uniforms(seeds, positions)
    assert numbers.dtype == np.float32 and numbers.min() >= 0 and numbers.max() < 1
    counts = np.histogram(numbers, bins=16, range=(0, 1))[0]
    assert ((counts - 256) ** 2 / 256).sum() < 37.7  # 99.9% at 15 degrees
    assert abs(np.corrcoef(numbers[:-1], numbers[1:])[0, 1]) < 0.06


def test_the_numbers_never_change():
    """A sequence may go on under another version, so these are part of the contract."""
    mask = 2**64 - 1

    def mix(x: int) -> int:
        x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 & mask
        x = (x ^ (x >> 27)) * 0x94D049BB133111EB & mask
        return x ^ (x >> 31)

    def number(seed: int, position: int) -> float:
        golden = 0x9E3779B97F4A7C15
        return (mix((mix((seed + golden) & mask) + (position + 1) * golden) & mask) >> 40) / 2**24

    pairs = [(0, 0), (0, 1), (1, 0), (2**63 - 1, 10)]
    seeds, positions = zip(*pairs, strict=True)
    assert uniforms(seeds, positions).tolist() == [number(*pair) for pair in pairs]
    assert number(0, 0) == 0.6524484753608704


# ------------------------------------------------------------------------------------ nothing to choose


@pytest.mark.parametrize("value", [torch.nan, -torch.inf, torch.inf])
@pytest.mark.parametrize("params", [{}, {"temperature": 1.0}, {"temperature": 1.0, "top_p": 0.9}], ids=str)
def test_a_row_without_a_finite_largest_logit_has_no_token_and_spoils_no_other(sampling, value, params):
    logits = make_logits(2)
    expected = sample_one(logits[1:], make_sequence(**params), sampling)
    logits[0] = value
    sick, well = sample(logits, [make_sequence(**params), make_sequence(**params)], sampling).wait()
    assert sick.token_id is None
    assert well.token_id == expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("token_id", [0, 17, VOCAB_SIZE - 1])
def test_one_nan_is_enough(choose, token_id, dtype):
    logits = make_logits(2).to(dtype)
    logits[0, token_id] = torch.nan
    for params in (SamplingParams(), SamplingParams(temperature=0)):
        sick, well = choose(logits, [params] * 2, np.float32([0.5, 0.5])).tolist()
        assert sick == -1 and well >= 0


def test_min_tokens_that_mask_everything_leave_no_token(sampling):
    seq = make_sequence(min_tokens=3, stop_token_ids=tuple(range(8)))
    assert sample_one(torch.zeros(1, 8), seq, sampling) is None
