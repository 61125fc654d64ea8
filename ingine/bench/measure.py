"""The figures of one run of a workload. Times are in seconds from t = 0, when all requests are present."""

import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from ingine.bench.percentile import percentile


@dataclass(frozen=True)
class Measurement:
    """The figures of one run."""

    num_requests: int
    num_tokens: int
    """Output tokens of all requests."""
    wall_s: float
    tokens_per_s: float
    latency_p50_s: float
    latency_p95_s: float
    first_token_p50_s: float
    first_token_p95_s: float


def median(measurements: Sequence[Measurement]) -> Measurement:
    """The median of each figure."""
    rows = [asdict(measurement) for measurement in measurements]
    return Measurement(
        **{name: type(first)(statistics.median(row[name] for row in rows)) for name, first in rows[0].items()}
    )


class Stopwatch:
    """Measures one run. It starts when created, and counts each request's tokens as they arrive."""

    def __init__(self, num_requests: int):
        self._counts = [0] * num_requests
        self._first: list[float | None] = [None] * num_requests
        self._last = [0.0] * num_requests
        self._start = time.perf_counter()

    def tokens(self, request: int, num_tokens: int) -> None:
        if num_tokens:
            now_s = time.perf_counter() - self._start
            self._counts[request] += num_tokens
            self._last[request] = now_s
            if self._first[request] is None:
                self._first[request] = now_s

    def read(self, *, expected: int) -> Measurement:
        """Return the figures. Raises ValueError unless every request got the `expected` number of tokens."""
        if set(self._counts) != {expected}:
            raise ValueError(f"every request should have {expected} tokens, these have {self._counts}")
        wall_s = max(self._last)
        return Measurement(
            num_requests=len(self._counts),
            num_tokens=sum(self._counts),
            wall_s=wall_s,
            tokens_per_s=sum(self._counts) / wall_s,
            latency_p50_s=percentile(self._last, 50),
            latency_p95_s=percentile(self._last, 95),
            first_token_p50_s=percentile(self._first, 50),
            first_token_p95_s=percentile(self._first, 95),
        )
