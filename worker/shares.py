"""Fair shares of the engine: which of the jobs that a worker holds goes first, within a priority.

The engine orders sequences by arrival and priority. So for the engine a job arrives as much later as its
tenant has tokens under way here already: of a flood only the first competes with another tenant's first.
"""

from dataclasses import dataclass

SECONDS_PER_TOKEN = 0.01
"""How much later for each token. By default 3,000 tokens outweigh one step of priority."""


@dataclass(slots=True)
class _Share:
    num_jobs: int = 0
    num_tokens: int = 0
    last_arrival: float = 0.0


class Shares:
    """What is under way here, by key (`RunningJob.share_key`): a tenant's jobs of one priority."""

    def __init__(self) -> None:
        self._shares: dict[tuple[str, str], _Share] = {}

    def enter(self, key: tuple[str, str], num_tokens: int, submitted: float, weight: float) -> float:
        """Since when this job counts as waiting, in seconds since the epoch, as `submitted` is.

        Never before an earlier one of the same, so that their order stays.
        """
        share = self._shares.setdefault(key, _Share())
        arrival = max(submitted + share.num_tokens * SECONDS_PER_TOKEN / weight, share.last_arrival)
        share.num_jobs += 1
        share.num_tokens += num_tokens
        share.last_arrival = arrival
        return arrival

    def leave(self, key: tuple[str, str], num_tokens: int) -> None:
        share = self._shares[key]
        share.num_jobs -= 1
        share.num_tokens -= num_tokens
        if not share.num_jobs:
            del self._shares[key]
