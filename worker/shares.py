"""Fair shares of the engine: the order of the jobs that a worker holds, within a priority.

The engine orders sequences by arrival and priority. So a job is given a later arrival the more tokens its
tenant's other jobs here have: only the first job of a flood competes with another tenant's first job.
"""

from dataclasses import dataclass

SECONDS_PER_TOKEN = 0.01
"""How much later a job arrives for each token. By default 3,000 tokens outweigh one step of priority."""


@dataclass(slots=True)
class _Share:
    num_jobs: int = 0
    num_tokens: int = 0
    last_arrival: float = 0.0


class Shares:
    """The jobs and tokens that run here, by `RunningJob.share_key`: a tenant's jobs of one priority."""

    def __init__(self) -> None:
        self._shares: dict[tuple[str, str], _Share] = {}

    def enter(self, key: tuple[str, str], num_tokens: int, submitted: float, weight: float) -> float:
        """Count a job in. Returns the time from which it counts as waiting, in seconds since the epoch like
        `submitted`. It is never before an earlier job's of the same key, so that their order is kept.
        """
        share = self._shares.setdefault(key, _Share())
        arrival = max(submitted + share.num_tokens * SECONDS_PER_TOKEN / weight, share.last_arrival)
        share.num_jobs += 1
        share.num_tokens += num_tokens
        share.last_arrival = arrival
        return arrival

    def leave(self, key: tuple[str, str], num_tokens: int) -> None:
        """Count a job out, with the arguments that it entered with."""
        share = self._shares[key]
        share.num_jobs -= 1
        share.num_tokens -= num_tokens
        if not share.num_jobs:
            del self._shares[key]
