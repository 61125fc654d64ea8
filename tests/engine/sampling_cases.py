"""Rows of logits, sequences, and what of a row each kind of sampling leaves: by the definition, slowly."""

import math

import torch

from ingine.engine.kernels.sampling.interface import Sampling
from ingine.engine.request import EngineRequest
from ingine.engine.sample.sampler import sample
from ingine.engine.schedule.sequence import Sequence
from ingine.sampling_params import SamplingParams

VOCAB_SIZE = 6000
"""More than the widest set of candidates, so that rows which need all of the vocabulary do."""
EOS = 7

TRUNCATIONS = [
    {"top_k": 1},
    {"top_k": 40},
    {"top_k": 300},
    {"top_k": 5000},
    {"top_p": 0.5},
    {"top_p": 0.95},
    {"top_p": 0.999},
    {"top_p": 1e-6},
    {"top_p": 0.9999999999},
    {"min_p": 0.1},
    {"min_p": 1e-6},
    {"min_p": 1.0},
    {"top_k": 40, "top_p": 0.8, "min_p": 0.01},
    {"top_k": 5000, "top_p": 0.7},
    {"top_p": 0.9, "min_p": 1e-4},
]
"""The kinds of cuts. A top_p of 0.9999999999 is 1 in float32, so it cuts nothing."""


def make_sequence(
    output: list[int] = (), prompt: list[int] = (1, 2, 3), words: list[list[int]] = (), **params
) -> Sequence:
    """words: the token ids of `bad_words`."""
    params = SamplingParams(**{"temperature": 0.0, "max_tokens": 1000, **params})
    return Sequence(
        EngineRequest("seq", prompt, params, output_token_ids=output, bad_words_token_ids=words),
        seed=params.seed or 0,
        sort_key=(0, 0),
        max_num_tokens=10_000,
        eos_token_ids=frozenset({EOS}),
    )


def make_logits(num_rows: int = 1, *, seed: int = 0, spread: float = 3.0, vocab_size: int = VOCAB_SIZE):
    return torch.randn(num_rows, vocab_size, generator=torch.Generator().manual_seed(seed)) * spread


def sample_one(logits: torch.Tensor, seq: Sequence, sampling: Sampling) -> int | None:
    return sample(logits.clone(), [seq], sampling).wait()[0].token_id


def survivors(logits: list[float], params: SamplingParams) -> dict[int, float]:
    """The definition: temperature, min_p, top_k, top_p, each on what the one before left."""

    def normalised(weights: dict[int, float]) -> dict[int, float]:
        total = sum(weights.values())
        return {token_id: weight / total for token_id, weight in weights.items()}

    largest = max(logits)
    probs = normalised(
        {i: math.exp((logit - largest) / params.temperature) for i, logit in enumerate(logits)}
    )
    floor = params.min_p * max(probs.values())
    probs = normalised({i: prob for i, prob in probs.items() if prob >= floor})
    by_prob = sorted(probs, key=probs.get, reverse=True)
    if params.top_k > 0:
        by_prob = by_prob[: params.top_k]
        probs = normalised({i: probs[i] for i in by_prob})
    nucleus, mass = {}, 0.0
    for i in by_prob:
        if mass >= params.top_p:
            break
        nucleus[i] = probs[i]
        mass += probs[i]
    return normalised(nucleus)
