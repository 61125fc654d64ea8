"""Rates and latencies, computed from the snapshots of the last seconds."""

from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from ingine.producer.watch import RunningJob, Snapshot

RATE_WINDOW_S = 10.0
LATENCY_WINDOW_S = 60.0


@dataclass(frozen=True, slots=True)
class Percentiles:
    p50: float
    p95: float


@dataclass(frozen=True, slots=True)
class Figures:
    """Rates are None until there are two values to compare."""

    tokens_per_s: float | None = None
    """Output tokens of all workers."""
    ended_per_s: float | None = None
    """Jobs that ended, on all workers."""
    worker_tokens_per_s: Mapping[str, float] = field(default_factory=dict)
    job_tokens_per_s: Mapping[str, float] = field(default_factory=dict)
    wait_s: Percentiles | None = None
    """From submission to the first begin, of the jobs that were seen running within LATENCY_WINDOW_S."""
    first_token_s: Percentiles | None = None
    """From submission to the first token, of the same jobs."""


class _Series:
    """Values of growing totals within a window, and their rate."""

    def __init__(self):
        self._values: deque[tuple[float, float]] = deque()

    def add(self, at_s: float, total: float) -> None:
        """Add a total. A smaller one than the last starts afresh: what it counts has begun again."""
        if self._values and (total < self._values[-1][1] or at_s < self._values[-1][0]):
            self._values.clear()
        if self._values and at_s == self._values[-1][0]:
            return
        self._values.append((at_s, total))
        while at_s - self._values[0][0] > RATE_WINDOW_S:
            self._values.popleft()

    @property
    def rate(self) -> float | None:
        """Growth per second. None with fewer than two values."""
        if len(self._values) < 2:
            return None
        (first_s, first), (last_s, last) = self._values[0], self._values[-1]
        return (last - first) / (last_s - first_s)


class History:
    """Remembers what snapshots have said of workers and jobs."""

    def __init__(self):
        self._tokens: dict[str, _Series] = {}
        self._ended: dict[str, _Series] = {}
        self._positions: dict[str, _Series] = {}
        self._seen: dict[str, tuple[float, RunningJob]] = {}

    def add(self, snapshot: Snapshot, now_s: float) -> Figures:
        """Add a snapshot that was read at `now_s` of a monotonic clock. Returns the figures up to then."""
        beats = snapshot.info.workers
        self._tokens = {worker: self._tokens.get(worker) or _Series() for worker in beats}
        self._ended = {worker: self._ended.get(worker) or _Series() for worker in beats}
        for worker, beat in beats.items():
            for series, name in ((self._tokens, "num_output_tokens"), (self._ended, "num_ended")):
                if (total := number(beat.get(name))) is not None:
                    # An integer of the server's clock: two reads of one heartbeat count once.
                    series[worker].add(number(beat.get("at_s")) or 0.0, total)
        jobs = {job.job_id: job for job in snapshot.jobs}
        self._positions = {job_id: self._positions.get(job_id) or _Series() for job_id in jobs}
        for job_id, job in jobs.items():
            self._positions[job_id].add(now_s, job.position)
            self._seen[job_id] = now_s, job
        self._seen = {
            job_id: seen for job_id, seen in self._seen.items() if now_s - seen[0] <= LATENCY_WINDOW_S
        }
        alive = {worker for worker, beat in beats.items() if beat.get("state") not in ("silent", "lost")}
        recent = [job for _, job in self._seen.values()]
        return Figures(
            tokens_per_s=_sum(self._tokens[worker].rate for worker in alive),
            ended_per_s=_sum(self._ended[worker].rate for worker in alive),
            worker_tokens_per_s=_rates({worker: self._tokens[worker] for worker in alive}),
            job_tokens_per_s=_rates(self._positions),
            wait_s=_percentiles((job.began_at_ms, job.submitted_at_ms) for job in recent if job.attempt <= 1),
            first_token_s=_percentiles((job.first_token_at_ms, job.submitted_at_ms) for job in recent),
        )


def number(value: Any) -> float | None:
    """A number of a heartbeat, which any client may have written; None if it is not one."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return float(value) if is_number and abs(value) < 1e15 else None


def _rates(series: Mapping[str, _Series]) -> dict[str, float]:
    return {name: rate for name, one in series.items() if (rate := one.rate) is not None}


def _sum(rates: Iterable[float | None]) -> float | None:
    known = [rate for rate in rates if rate is not None]
    return sum(known) if known else None


def _percentiles(times_ms: Iterable[tuple[int | None, int | None]]) -> Percentiles | None:
    """Percentiles of the time between two moments in ms, by nearest rank, in seconds."""
    taken = sorted((end - start) / 1000 for end, start in times_ms if end is not None and start is not None)
    if not taken:
        return None
    return Percentiles(p50=taken[(len(taken) - 1) // 2], p95=taken[-(-len(taken) * 95 // 100) - 1])
