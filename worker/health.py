"""Whether a worker lives, and whether it takes jobs: what /healthz and /readyz answer."""

import time
from collections.abc import Callable

from worker.engine_link import EngineHost
from worker.partition import Partition
from worker.publisher import Publisher

HEALTHY_POLL_S = 15.0
"""Without an answer for this long a worker is not healthy: a hung reconnect looks like an idle queue. One
server of several makes it no less so: it serves the others, and a new worker would do no better."""

READY_COMMIT_S = 5.0
"""A step that waits for longer than this to be committed: Redis is away, or refuses writes."""


class Health:
    """Answers with what is wrong, in a sentence, or None. Asked from the http thread; only reads."""

    def __init__(
        self,
        engine: EngineHost,
        partitions: list[Partition],
        publisher: Publisher,
        state: Callable[[], str],
    ):
        self._engine = engine
        self._partitions = partitions
        self._publisher = publisher
        self._state = state
        self._start_error: Exception | None = None

    def wait_for(self, error: Exception) -> None:
        """The start waits for this to pass."""
        self._start_error = error

    def unhealthy(self) -> str | None:
        if not self._engine.alive:
            return "the engine is not running"
        last_polls = [partition.intake.last_poll for partition in self._partitions]
        if last_polls and (silent_s := time.monotonic() - max(last_polls)) > HEALTHY_POLL_S:
            return f"no read of Redis has succeeded for {silent_s:.0f} s: {self._last_error()}"
        return None

    def unready(self) -> str | None:
        if fault := self.unhealthy():
            return fault
        if not any(partition.ready.is_set() for partition in self._partitions):
            return f"waiting for Redis: {self._last_error()}"
        since = self._publisher.waiting_since
        if since is not None and (waiting_s := time.monotonic() - since) > READY_COMMIT_S:
            return f"Redis has not taken a step's tokens for {waiting_s:.0f} s"
        state = self._state()
        return None if state == "serving" else f"the worker is {state}"

    def _last_error(self) -> str:
        errors = [partition.intake.last_error for partition in self._partitions if partition.ready.is_set()]
        return str(next(filter(None, errors or [self._start_error]), "it has not answered yet"))
