"""Hand-over: a worker that stops commits what is computed, releases its jobs, and notifies its peers."""

import asyncio
import logging
import time
from collections.abc import Awaitable, Container

from redis.exceptions import RedisError

from ingine.worker.admission import Admission
from ingine.worker.hosting.engine_link import EngineHost
from ingine.worker.jobs import JobTable
from ingine.worker.logs import log_event
from ingine.worker.output_handler import OutputHandler
from ingine.worker.partition import Partition
from ingine.worker.releasing import release_job
from ingine.worker.retry import until_served
from ingine.worker.tasks import cancel_all

logger = logging.getLogger(__name__)

LEAVE_TIMEOUT_S = 2.0


class HandOver:
    """Stops the engine and the intakes, and releases all jobs, within `limit_s` seconds. Removing the worker
    from the queue's list of workers may take `LEAVE_TIMEOUT_S` more.

    No partition waits for another one's server, except for the last step to be committed. A step that hangs
    or a broken publisher costs the uncommitted tokens: the next attempt computes them again. A job that
    cannot be released in time is taken over when its lease has expired.
    """

    def __init__(
        self,
        engine: EngineHost,
        outputs: OutputHandler,
        jobs: JobTable,
        admission: Admission,
        partitions: list[Partition],
        *,
        limit_s: float,
    ):
        self._engine = engine
        self._outputs = outputs
        self._jobs = jobs
        self._admission = admission
        self._partitions = partitions
        self._limit_s = limit_s

    async def run(
        self,
        intakes: dict[Partition, asyncio.Task],
        publisher: asyncio.Task,
        rest: set[asyncio.Task],
        *,
        suspects: Container[str] = (),
    ) -> None:
        """Run the hand-over.

        rest: tasks that go on until all jobs are released. suspects: ids of the sequences whose release
        counts as a death.
        """
        self._suspects = suspects
        started = time.monotonic()
        log_event(logger, logging.INFO, "worker draining", jobs=len(self._jobs))
        self._admission.stopping = True
        for partition in self._partitions:
            partition.intake.wake()
        await _within(self._limit_s / 2, "the last step", self._settle(publisher))
        await asyncio.gather(*(self._leave(partition, intakes[partition]) for partition in self._partitions))
        await cancel_all(rest)
        # Also where no job was taken yet: the answer to a worker's first beat may ask it to drain.
        leaving = [
            partition.heartbeat.leave() for partition in self._partitions if partition.heartbeat.is_known
        ]
        await asyncio.gather(*(_within(LEAVE_TIMEOUT_S, "leaving the queue", each) for each in leaving))
        log_event(logger, logging.INFO, "worker drained", ms=(time.monotonic() - started) * 1000)

    async def _settle(self, publisher: asyncio.Task) -> None:
        """Stop the engine, and wait until all that it has delivered is committed, or never will be."""
        await self._engine.stop()
        committed = asyncio.create_task(self._outputs.join())
        await asyncio.wait({committed, publisher}, return_when=asyncio.FIRST_COMPLETED)
        committed.cancel()

    async def _leave(self, partition: Partition, intake: asyncio.Task) -> None:
        if not partition.ready.is_set():  # it still waits for its server, and holds no jobs there
            intake.cancel()
            return
        what = f"releasing jobs of {partition.name}"
        await _within(self._limit_s / 2, what, self._release_all(partition, intake))

    async def _release_all(self, partition: Partition, intake: asyncio.Task) -> None:
        await self._release_running(partition)
        # The intake may wait for a prompt to be read.
        await self._release_unread(partition)
        # Its last read may still have brought entries, which it releases, or begins at the same moment.
        await asyncio.wait([intake])
        await self._release_unread(partition)
        await self._release_running(partition)

    async def _release_unread(self, partition: Partition) -> None:
        unread = await self._admission.interrupt(partition.queue)
        await asyncio.gather(*(release_job(self._jobs, job) for job in unread))

    async def _release_running(self, partition: Partition) -> None:
        running = [job for job in self._jobs if job.queue is partition.queue]
        # All at once: they share round trips, and a job with foreign keys holds up no other.
        await asyncio.gather(
            *(release_job(self._jobs, job, died=job.seq_id in self._suspects) for job in running)
        )
        await until_served("notifying the peers", partition.queue.tell_released)


async def _within(limit_s: float, what: str, leaving: Awaitable[None]) -> None:
    """Await `leaving` for up to `limit_s` seconds, and log what could not be done."""
    try:
        async with asyncio.timeout(limit_s):
            await leaving
    except TimeoutError:
        log_event(logger, logging.WARNING, "hand-over gave up", on=what, limit_s=limit_s)
    except (RedisError, OSError) as error:
        log_event(logger, logging.WARNING, "hand-over gave up", on=what, error=error)
