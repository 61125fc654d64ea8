"""Health checks: the answers of /healthz and /readyz."""

import time
from collections.abc import Callable

from ingine.worker.hosting.engine_link import EngineHost
from ingine.worker.partition import Partition
from ingine.worker.prompts import PromptReader
from ingine.worker.publisher import Publisher

HEALTHY_ANSWER_S = 15.0
"""Seconds without an answer to any heartbeat after which a worker is not healthy. While one of several
servers answers, the worker is healthy: it serves that one, and a restart would not bring back the others."""

READY_S = 5.0
"""Seconds for which a step cannot be committed, or jobs cannot be taken, before a worker is not ready."""


class Health:
    """Returns what is wrong, as a phrase, or None. Called from the http thread; only reads."""

    def __init__(
        self,
        engine: EngineHost,
        partitions: list[Partition],
        publisher: Publisher,
        prompts: PromptReader,
        state: Callable[[], str],
    ):
        self._engine = engine
        self._partitions = partitions
        self._publisher = publisher
        self._prompts = prompts
        self._state = state
        self._start_error: Exception | None = None

    def wait_for(self, error: Exception) -> None:
        """Remember the error that the worker's start waits out."""
        self._start_error = error

    def unhealthy(self) -> str | None:
        """Why the worker should be restarted; None if it should not."""
        if not self._engine.alive:
            return "the engine is not running"
        answers = [partition.heartbeat.last_answer for partition in self._partitions]
        if answers and (silent_s := time.monotonic() - max(answers)) > HEALTHY_ANSWER_S:
            return f"Redis has not answered a heartbeat for {silent_s:.0f} s: {self._last_error()}"
        return None

    def unready(self) -> str | None:
        """Why the worker takes no jobs; None if it takes them."""
        if fault := self.unhealthy():
            return fault
        if not any(partition.ready.is_set() for partition in self._partitions):
            return f"waiting for Redis: {self._last_error()}"
        now = time.monotonic()
        since = self._publisher.waiting_since
        if since is not None and now - since > READY_S:
            return f"Redis has not taken a step's tokens for {now - since:.0f} s"
        served = [partition for partition in self._partitions if partition.ready.is_set()]
        failing = [partition.intake.failing_since for partition in served]
        if all(failing) and now - max(failing) > READY_S:
            return f"jobs could not be taken for {now - max(failing):.0f} s: {self._last_error()}"
        if error := self._prompts.start_error:
            return f"no process to read prompts can be started: {error}"
        state = self._state()
        return None if state == "serving" else f"the worker is {state}"

    def _last_error(self) -> str:
        errors = [partition.intake.last_error for partition in self._partitions if partition.ready.is_set()]
        return str(next(filter(None, errors or [self._start_error]), "it has not answered yet"))
