"""Computes the rates of prefill and decoding from the times of tokens."""

from collections.abc import Sequence

from benchmarks.rivals.protocol import Request

Figures = dict[str, float]


def rates(requests: Sequence[Request], token_times_s: Sequence[Sequence[float]]) -> Figures:
    """Compute the rates.

    `prefill_s` ends when the last request has its first token; other requests' tokens until then are a
    by-product of prefill. `decode_tokens_per_s` is the rate of all later tokens, and missing without any.
    """
    prefill_s = max(times[0] for times in token_times_s)
    wall_s = max(times[-1] for times in token_times_s)
    decoded = sum(at_s > prefill_s for times in token_times_s for at_s in times)
    figures = {
        "wall_s": wall_s,
        "prefill_s": prefill_s,
        "tokens_per_s": sum(map(len, token_times_s)) / wall_s,
        "prefill_tokens_per_s": sum(len(request.prompt) for request in requests) / prefill_s,
    }
    return figures | ({"decode_tokens_per_s": decoded / (wall_s - prefill_s)} if decoded else {})
