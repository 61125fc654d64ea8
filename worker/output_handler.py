"""What the engine delivers, on its way to Redis: steps and failures, in lanes, and room for the next ones.

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
"""Parts of steps in a row that cannot be committed before the worker takes the fault for its own and ends.

A job has one death less, so no job alone ends a worker. The last failure counts for no job, and a job with
two deaths runs alone, so a worker at fault fails at most one job."""


class OutputHandler:
    """Commits what is delivered to it, while `run` runs.

    `failed(error)` is called once nothing more can be computed or committed: the worker has to end.
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
        """From the engine, in the order in which it computed."""
        if isinstance(message, EngineFailure):
            self._metrics.engine_failures.inc()
        self._lanes.deliver(message)

    async def run(self) -> None:
        """Never returns."""
        await self._lanes.run()

    async def join(self) -> None:
        """Until all that was delivered is committed."""
        await self._lanes.join()

    async def _commit(self, part: StepMessage) -> None:
        if isinstance(part, EngineFailure):
            await self._give_back(part)
            return
        is_some_job_s = any(self._jobs.by_seq(output.seq_id) for output in part)
        try:
            await self._publisher.commit(part)
            if is_some_job_s:
                self._num_failed_commits = 0
        except Exception as error:
            # A fault of ours that one of these jobs has set off. Which one, their next attempts tell: each
            # has a death now, and what has two of them runs alone.
            log_event(logger, logging.ERROR, "step not committed", sequences=len(part), error=repr(error))
            logger.debug("step not committed", exc_info=error)
            self._num_failed_commits += 1
            seq_ids = [output.seq_id for output in part]
            for seq_id in seq_ids:
                self._engine.abort(seq_id)
            if self._num_failed_commits >= MAX_FAILED_COMMITS:
                self._failed(error)  # which hands all jobs over
            else:
                await self._give_back(EngineFailure(seq_ids, error))

    def _may_join(self, seq_id: str) -> bool:
        """Not what a later attempt makes: the server may have lost what the first one had written, and a
        consumer may have read it. Then an event has to begin where that ended, since no text is divisible."""
        job = self._jobs.by_seq(seq_id)
        return job is None or job.attempt == 1

    def _committed(self) -> None:
        """Of one message: all parts."""
        self._engine.credit()
        self._metrics.observe_engine(self._engine.stats, len(self._jobs))
        self._admission.offer_room()

    async def _give_back(self, failure: EngineFailure) -> None:
        """Jobs go back as if we had died with them: one that breaks every engine ends as failed."""
        concerned = list(filter(None, map(self._jobs.by_seq, failure.seq_ids)))
        if failure.fatal and not failure.seq_ids:
            concerned = list(self._jobs)  # it may have been any of them
        if isinstance(failure.error, InvalidRequest):
            giving_back = [self._publisher.refuse(job, failure.error) for job in concerned]
        else:
            giving_back = [release_job(self._jobs, job, died=True) for job in concerned]
        await asyncio.gather(*giving_back)
        if failure.fatal:
            self._failed(failure.error)
