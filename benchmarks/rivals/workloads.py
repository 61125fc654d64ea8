"""The workloads: the same token ids for all systems, drawn from one passage of real text."""

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.rivals.protocol import Request
from ingine.bench.workload import PASSAGE, make_workload
from ingine.engine.text.tokenizer import Tokenizer

SEED = 20_261_124
SHARED_PREFIX_TOKENS = 400
OWN_TOKENS = 16
ONE_STREAM_TOKENS = 41
NUM_MIXED_REQUESTS = 200
MIXED_PROMPT = (60, 0.8, 8, 512)
"""Median, sigma of the logarithm, minimum and maximum, in tokens."""
MIXED_OUTPUT = (48, 0.6, 4, 256)

Prompts = list[list[int]]


@dataclass(frozen=True)
class Workload:
    name: str
    title: str
    requests: Callable[[Tokenizer, int], list[Request]]
    """Makes the requests of a round from a tokenizer and its number. They are the same for every system."""


def _text(tokenizer: Tokenizer, num_tokens: int) -> list[int]:
    """The passage repeated with its sentences in a new order each time, so that it has no period."""
    sentences = PASSAGE.replace("\n", " ").split(". ")
    draw = random.Random(SEED)
    token_ids: list[int] = []
    while len(token_ids) < num_tokens:
        draw.shuffle(sentences)
        token_ids += tokenizer.encode(". ".join(sentences) + ". ")
    return token_ids[:num_tokens]


def slices(tokenizer: Tokenizer, lengths: Sequence[int]) -> Prompts:
    """One prompt of each length, consecutive slices of a long text. None is a prefix of another."""
    text = _text(tokenizer, 2 * sum(lengths))
    prompts: Prompts = []
    start = 0
    for length in lengths:
        start = next(
            place
            for place in range(start, len(text) - length + 1)
            if not any(_begin_alike(text[place : place + length], prompt) for prompt in prompts)
        )
        prompts.append(text[start : start + length])
        start += length
    return prompts


def _begin_alike(first: Sequence[int], second: Sequence[int]) -> bool:
    shorter = min(len(first), len(second))
    return first[:shorter] == second[:shorter]


def _one_stream(tokenizer: Tokenizer, round_number: int) -> Prompts:
    return slices(tokenizer, [ONE_STREAM_TOKENS])


def _short(num_requests: int) -> Callable[[Tokenizer, int], Prompts]:
    return lambda tokenizer, round_number: make_workload(tokenizer, num_requests)


def _long(num_requests: int, num_tokens: int) -> Callable[[Tokenizer, int], Prompts]:
    return lambda tokenizer, round_number: slices(tokenizer, [num_tokens] * num_requests)


def _shared_prefix(num_requests: int) -> Callable[[Tokenizer, int], Prompts]:
    def prompts(tokenizer: Tokenizer, round_number: int) -> Prompts:
        """Prompts with another prefix in each round, so that no round finds prefixes of an earlier one in a
        cache."""
        prefixes = slices(tokenizer, [SHARED_PREFIX_TOKENS] * (round_number + 1))
        own = slices(tokenizer, [OWN_TOKENS] * num_requests)
        return [prefixes[round_number] + tail for tail in own]

    return prompts


def _with_outputs(
    prompts: Callable[[Tokenizer, int], Prompts], num_tokens: int
) -> Callable[[Tokenizer, int], list[Request]]:
    return lambda tokenizer, round_number: [
        Request(prompt, num_tokens) for prompt in prompts(tokenizer, round_number)
    ]


def mixed(tokenizer: Tokenizer, round_number: int) -> list[Request]:
    """Prompts and outputs of log-normal lengths, as in production traces, all present at the start."""
    draw = random.Random(SEED)
    prompt_lengths = [_log_normal(draw, *MIXED_PROMPT) for _ in range(NUM_MIXED_REQUESTS)]
    output_lengths = [_log_normal(draw, *MIXED_OUTPUT) for _ in range(NUM_MIXED_REQUESTS)]
    prompts = slices(tokenizer, prompt_lengths)
    return [Request(*pair) for pair in zip(prompts, output_lengths, strict=True)]


def arriving(requests: Sequence[Request], requests_per_s: float) -> list[Request]:
    """The same requests arriving as a Poisson process of that rate. The draw is fixed; the rate scales it."""
    draw = random.Random(SEED + 1)
    now_s, arrived = 0.0, []
    for request in requests:
        now_s += draw.expovariate(1.0) / requests_per_s
        arrived.append(request._replace(arrival_s=now_s))
    return arrived


def _log_normal(draw: random.Random, median: float, sigma: float, least: int, most: int) -> int:
    return min(most, max(least, round(draw.lognormvariate(math.log(median), sigma))))


WORKLOADS = {
    workload.name: workload
    for workload in (
        Workload("1x41", "1 stream, 41 + 64 tokens", _with_outputs(_one_stream, 64)),
        *(
            Workload(f"{n}x41", f"{n} streams, about 41 + 64 tokens", _with_outputs(_short(n), 64))
            for n in (8, 32, 64, 128)
        ),
        Workload("32x400", "32 streams, 400 + 64 tokens", _with_outputs(_long(32, 400), 64)),
        Workload(
            "32-shared", "32 streams that share 400 tokens, 416 + 64", _with_outputs(_shared_prefix(32), 64)
        ),
        Workload("8x2000", "8 streams, 2000 + 128 tokens", _with_outputs(_long(8, 2000), 128)),
        Workload("mixed", f"{NUM_MIXED_REQUESTS} requests of log-normal lengths, all at once", mixed),
    )
}
ARRIVALS = "arrivals"
"""`mixed` as a Poisson process. It is no Workload, since its rate depends on a measurement."""
START_COLD, START_WARM = "start-cold", "start-warm"
"""From the start of a process to its first token, with its files absent from the page cache, or in it."""


def describe(name: str, tokenizer: Tokenizer) -> dict[str, Any]:
    """A description for the report."""
    requests = WORKLOADS[name].requests(tokenizer, 0)
    return {
        "title": WORKLOADS[name].title,
        "num_requests": len(requests),
        "num_prompt_tokens": sum(len(request.prompt) for request in requests),
        "num_output_tokens": sum(request.num_tokens for request in requests),
    }
