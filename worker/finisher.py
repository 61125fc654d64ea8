"""Write the ends of jobs to Redis: a terminal event or, where none can be written, a dead letter."""

import logging
from typing import Any

from redis.exceptions import ResponseError

from ingine.contract.calls.running import Finish, Refusal
from ingine.contract.entries import Entry
from ingine.errors import ErrorCode
from ingine.worker.jobs import BegunJob
from ingine.worker.logs import log_event
from ingine.worker.metrics import Metrics
from ingine.worker.queue import Queue
from ingine.worker.retry import until_served
from ingine.worker.terminal_events import Outcome, rejection_event

logger = logging.getLogger(__name__)

BAD_RECORD = "the job's keys are not what they should be: {}"


class Finisher:
    """Ends jobs that run, jobs that are rejected, and entries that hold no job.

    Each call returns once Redis has answered, however long the server is away.
    """

    def __init__(self, metrics: Metrics):
        self._metrics = metrics

    async def finish(self, queue: Queue, finish: Finish) -> int | Refusal:
        """Write a terminal event. Returns what `Queue.finish` returns.

        Refusal.BROKEN: the event cannot be written, and the job's entry was moved to the dead letters.
        """
        event = finish.event
        try:
            answer = await until_served("finish", lambda: queue.finish(finish))
        except ResponseError as error:
            reason = BAD_RECORD.format(error)
            of_job = {"job_id": event.job_id, "metadata": event.metadata}
            await self.bury(queue, finish.entry, ErrorCode.BAD_RECORD, reason, **of_job)
            return Refusal.BROKEN
        if answer == event.position:
            self._metrics.ended(event)
            log_event(
                logger, logging.DEBUG, f"job {event.status}",
                job_id=event.job_id, finish_reason=event.finish_reason, code=(event.error or {}).get("code"),
                position=event.position, attempt=finish.attempt, ms=event.timings.get("total_ms"),
            )  # fmt: skip
        return answer

    async def reject(self, job: BegunJob, outcome: Outcome) -> None:
        """End a job that never ran under this attempt."""
        event = rejection_event(job, outcome)
        bury = (outcome.error or {}).get("code") in (ErrorCode.WORKER_LOST, ErrorCode.BAD_RECORD)
        key = job.begun.idempotency_key
        finish = Finish(job.entry, job.begun.attempt, event, job.reply_to, bury, key)
        if await self.finish(job.queue, finish) == event.position and bury:
            self._metrics.dead_letters.inc()

    async def bury(
        self,
        queue: Queue,
        entry: Entry,
        code: ErrorCode,
        reason: str,
        *,
        job_id: str | None = None,
        metadata: dict[str, Any] | None = None,
    ) -> None:
        """Move an entry to the dead letters, since no terminal event can be written under the job's own keys.
        The job's record ends too, if the job has a readable id and the record is valid.

        If the dead letters cannot be written either, the entry stays pending: the worker that claims it after
        a lease tries again.
        """
        of_job = {"job_id": job_id, "metadata": metadata}
        try:
            buried = await until_served("bury", lambda: queue.bury(entry, str(code), reason, **of_job))
        except ResponseError as error:
            log_event(logger, logging.ERROR, "entry not buried", entry=entry.id, code=str(code), error=error)
            return
        if buried:
            self._metrics.dead_letters.inc()
            log_event(logger, logging.WARNING, "entry buried", entry=entry.id, code=str(code), reason=reason)
