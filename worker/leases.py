"""Renew leases, in a thread with its own loop and connections, so that no other work delays it."""

import asyncio
import contextlib
import logging
import threading
from collections.abc import Callable
from concurrent.futures import Future

from redis.asyncio import Redis
from redis.exceptions import RedisError

from ingine.connect.scripts import run_script
from ingine.connect.servers import Servers
from ingine.contract.calls.running import Refusal, renew
from ingine.worker.jobs import JobTable, RunningJob
from ingine.worker.logs import log_event
from ingine.worker.queue import Queue

logger = logging.getLogger(__name__)

RENEWALS_PER_LEASE = 3


class LeaseThread:
    """Renews the lease of every running job until `stop`. Stop it last: it must outlive the jobs.

    `connect` creates the thread's own clients. `answered(job, answer)` is called from this thread with
    Refusal.STALE or Refusal.CANCELLED for each job that was not simply renewed (see renew.lua).
    `failed(error)` is called from it too, if the thread has ended by a fault of the worker: no lease is
    renewed from then on.
    """

    def __init__(
        self,
        connect: Callable[[], Servers],
        worker_id: str,
        jobs: JobTable,
        *,
        lease_s: float,
        answered: Callable[[RunningJob, Refusal], None],
        failed: Callable[[Exception], None],
    ):
        self._connect = connect
        self._worker_id = worker_id
        self._jobs = jobs
        self._interval_s = lease_s / RENEWALS_PER_LEASE
        self._answered = answered
        self._failed = failed
        self._running: Future[tuple[asyncio.AbstractEventLoop, asyncio.Event]] = Future()
        self._thread = threading.Thread(target=self._run_loop, name="leases", daemon=True)

    def start(self, queues: list[Queue]) -> None:
        self._queues = queues
        self._thread.start()

    def stop(self) -> None:
        """End the thread, and wait for it. Does nothing if the thread never started or has ended."""
        if self._thread.is_alive():
            loop, stopped = self._running.result()
            with contextlib.suppress(RuntimeError):  # its loop has just closed
                loop.call_soon_threadsafe(stopped.set)
            self._thread.join()

    def _run_loop(self) -> None:
        try:
            asyncio.run(self._run())
        except* Exception as errors:
            self._failed(errors.exceptions[0])

    async def _run(self) -> None:
        self._stopped = asyncio.Event()
        self._running.set_result((asyncio.get_running_loop(), self._stopped))
        servers = self._connect()
        try:
            async with asyncio.TaskGroup() as group:
                for queue in self._queues:
                    group.create_task(self._renew_until_stopped(queue, servers.client(queue.keys)))
        finally:
            with contextlib.suppress(RedisError, OSError):
                await servers.aclose()

    async def _renew_until_stopped(self, queue: Queue, redis: Redis) -> None:
        """Renew one partition's leases. Each partition has its own task, so that a server that is away costs
        the others no leases."""
        interval_s = self._interval_s
        while not await self._stopped_within(interval_s):
            try:
                await self._renew_all(queue, redis)
                interval_s = self._interval_s
            except (RedisError, OSError) as error:
                if interval_s == self._interval_s:  # log each outage once
                    log_event(logger, logging.WARNING, "leases not renewed", error=error)
                # The lease still runs for two intervals: try again well within them.
                interval_s = self._interval_s / 4

    async def _stopped_within(self, seconds: float) -> bool:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._stopped.wait()
        return self._stopped.is_set()

    async def _renew_all(self, queue: Queue, redis: Redis) -> None:
        jobs = [job for job in self._jobs.leased() if job.queue is queue]
        if not jobs:
            return
        leases = [(job.entry, job.id, job.attempt) for job in jobs]
        call = renew(queue.keys, leases, worker_id=self._worker_id)
        for job, refusal in zip(jobs, await run_script(redis, call), strict=True):
            if refusal is not None:
                self._answered(job, refusal)
