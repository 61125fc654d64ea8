"""Keeping what we hold: in a thread with its own connection, so that nothing else delays it."""

import logging
import threading
from collections.abc import Callable

from redis import Redis
from redis.exceptions import RedisError

from ingine.wire import GROUP, Keys
from worker.jobs import JobTable, RunningJob
from worker.logs import log_event
from worker.queue import script

logger = logging.getLogger(__name__)

RENEWALS_PER_LEASE = 3


class LeaseThread:
    """Renews every running job's lease until `stop`. It outlives what it protects: stop it last.

    `answered(job, answer)` is called from this thread, for each job that was not simply renewed, with STALE
    or CANCELLED (see renew.lua).
    """

    def __init__(
        self,
        redis: Redis,
        keys: Keys,
        worker_id: str,
        jobs: JobTable,
        *,
        lease_s: float,
        answered: Callable[[RunningJob, int], None],
    ):
        self._renew = redis.register_script(script("renew"))
        self._keys = keys
        self._worker_id = worker_id
        self._jobs = jobs
        self._interval_s = lease_s / RENEWALS_PER_LEASE
        self._answered = answered
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="leases", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._stopped.set()
        if self._thread.is_alive():
            self._thread.join()

    def _run(self) -> None:
        interval_s = self._interval_s
        while not self._stopped.wait(interval_s):
            try:
                self._renew_all()
                interval_s = self._interval_s
            except (RedisError, OSError) as error:
                if interval_s == self._interval_s:  # once an outage
                    log_event(logger, logging.WARNING, "leases not renewed", error=error)
                # The lease still runs for two intervals: try again well within them.
                interval_s = self._interval_s / 4

    def _renew_all(self) -> None:
        jobs = list(self._jobs)
        if not jobs:
            return
        keys, args = [], [GROUP, self._worker_id]
        for job in jobs:
            keys += [self._keys.jobs(job.entry.priority), self._keys.job(job.id)]
            args += [job.entry.id, job.attempt]
        for job, answer in zip(jobs, self._renew(keys=keys, args=args), strict=True):
            if answer:
                self._answered(job, answer)
