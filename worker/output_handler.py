"""Take the engine's messages, steps and failures, commit them in lanes, and give the engine its credits back.

Calls go one way: the engine's host calls `OutputHandler`, which calls the publisher, which calls the queue.
"""

import asyncio
import logging
from collections.abc import Callable

from ingine.errors import InvalidRequest
from ingine.worker.admission import Admission
from ingine.worker.hosting.engine_link import EngineFailure, EngineHost, StepMessage
from ingine.worker.jobs import JobTable
from ingine.worker.lanes import Lanes
from ingine.worker.logs import log_event
from ingine.worker.metrics import Metrics
from ingine.worker.publisher import Publisher
from ingine.worker.releasing import release_job

logger = logging.getLogger(__name__)

MAX_FAILED_COMMITS = 4
"""Number of parts of steps in a row that cannot be committed before the worker takes the fault to be its own
and ends.

A job may have one death less, so no job alone ends a worker. The last failure is counted as a death of no
job, and a job with two deaths runs alone, so a faulty worker fails at most one job."""


class OutputHandler:
    """Commits the messages delivered to it, while `run` runs.

    `failed(error)` is called once nothing more can be computed or committed: the worker must end.
    """

    def __init__(
        self,
        engine: EngineHost,
        jobs: JobTable,
        publisher: Publisher,
        admission: Admission,
        metrics: Metrics,
        *,
        failed: Callable[[Exception], None],
    ):
        self._engine = engine
        self._jobs = jobs
        self._publisher = publisher
        self._admission = admission
        self._metrics = metrics
        self._failed = failed
        self._lanes = Lanes(self._commit, self._committed, self._may_join)
        self._num_failed_commits = 0

    def deliver(self, message: StepMessage) -> None:
        """Enqueue a message of the engine. Call it in the order in which the engine computed."""
        if isinstance(message, EngineFailure):
            self._metrics.engine_failures.inc()
        self._lanes.deliver(message)

    async def run(self) -> None:
        """Commit what is delivered, until cancelled."""
        await self._lanes.run()

    async def join(self) -> None:
        """Wait until all delivered messages are committed."""
        await self._lanes.join()

    async def _commit(self, part: StepMessage) -> None:
        if isinstance(part, EngineFailure):
            await self._give_back(part)
            return
        has_jobs = any(self._jobs.by_seq(output.seq_id) for output in part)
        try:
            await self._publisher.commit(part)
            if has_jobs:
                self._num_failed_commits = 0
        except Exception as error:
            # A fault of the worker that one of these jobs triggers. Their next attempts show which one: each
            # has one death more now, and a job with two of them runs alone.
            log_event(logger, logging.ERROR, "step not committed", sequences=len(part), error=repr(error))
            logger.debug("step not committed", exc_info=error)
            self._num_failed_commits += 1
            seq_ids = list(dict.fromkeys(output.seq_id for output in part))
            for seq_id in seq_ids:
                self._engine.abort(seq_id)
            if self._num_failed_commits >= MAX_FAILED_COMMITS:
                self._failed(error)  # the worker hands all jobs over
            else:
                await self._give_back(EngineFailure(seq_ids, error))

    def _may_join(self, seq_id: str) -> bool:
        """Whether several steps of a sequence may become one event: only in a job's first attempt.

        In a later one the server may have lost events that a consumer has read. An event must then begin
        where the consumer's last one ended, since text and delta of an event cannot be divided.
        """
        job = self._jobs.by_seq(seq_id)
        return job is None or job.attempt == 1

    def _committed(self) -> None:
        """Give the engine a credit: all parts of one message are committed."""
        self._engine.credit()
        self._metrics.observe_engine(self._engine.stats, len(self._jobs))
        self._admission.offer_room()

    async def _give_back(self, failure: EngineFailure) -> None:
        """Release the jobs that a failure concerns, each with one death more, so that a job that breaks every
        engine ends as failed. A request that the engine has refused ends at once."""
        concerned = list(filter(None, map(self._jobs.by_seq, failure.seq_ids)))
        if failure.fatal and not failure.seq_ids:
            concerned = list(self._jobs)  # any of them may be to blame
        if isinstance(failure.error, InvalidRequest):
            giving_back = [self._publisher.refuse(job, failure.error) for job in concerned]
        else:
            giving_back = [release_job(self._jobs, job, died=True) for job in concerned]
        await asyncio.gather(*giving_back)
        if failure.fatal:
            self._failed(failure.error)
