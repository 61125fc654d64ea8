"""Computes figures from times, and medians from rounds."""

import statistics
from collections.abc import Sequence
from itertools import pairwise

from benchmarks.rivals.protocol import Request
from ingine.bench.percentile import percentile

Figures = dict[str, float]


def throughput(token_times_s: Sequence[Sequence[float]]) -> Figures:
    """Output tokens per second of the whole wall time, prefill included."""
    wall_s = max(times[-1] for times in token_times_s)
    return {"wall_s": wall_s, "tokens_per_s": sum(map(len, token_times_s)) / wall_s}


def latencies(requests: Sequence[Request], token_times_s: Sequence[Sequence[float]]) -> Figures:
    """Time to first token, from each request's arrival; and time between tokens, over all gaps of all
    requests."""
    first = [times[0] - request.arrival_s for request, times in zip(requests, token_times_s, strict=True)]
    between = [later - earlier for times in token_times_s for earlier, later in pairwise(times)]
    return {
        f"{name}_p{percent}_s": percentile(values, percent)
        for name, values in (("ttft", first), ("tbt", between))
        for percent in (50, 95, 99)
    }


def agreement(first_token_ids: Sequence[int], others: Sequence[int]) -> float:
    """The share of requests with the same first token."""
    return statistics.mean(a == b for a, b in zip(first_token_ids, others, strict=True))


def over_rounds(rounds: Sequence[Figures]) -> dict[str, dict[str, float]]:
    """Median, minimum and maximum of each figure; {} without a round."""
    names = rounds[0].keys() if rounds else ()
    columns = {name: [figures[name] for figures in rounds] for name in names}
    return {
        name: {"median": statistics.median(values), "min": min(values), "max": max(values)}
        for name, values in columns.items()
    }
