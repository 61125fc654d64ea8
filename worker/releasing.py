"""Release a running job to the queue: any worker may resume it from its log."""

import logging

from redis.exceptions import ResponseError

from ingine.worker.jobs import JobTable, RunningJob
from ingine.worker.logs import log_event
from ingine.worker.retry import until_served

logger = logging.getLogger(__name__)


async def release_job(jobs: JobTable, job: RunningJob, *, died: bool = False) -> None:
    """Release `job`. `died`: count a death, and let the job be taken again only after a pause.

    The job stays in `jobs` until Redis has answered. Otherwise an entry that the server delivers again after
    an outage would be begun here once more, while the release of this attempt is still being retried.
    """
    release = job.queue.delay if died else job.queue.release
    job.is_releasing = True
    try:
        was_ours = await until_served("release", lambda: release(job.entry, job.id, job.attempt))
    except ResponseError as error:  # this never passes: the worker that claims the entry buries it
        log_event(logger, logging.WARNING, "job not released", job_id=job.id, error=error)
        return
    finally:
        job.is_releasing = False
        if jobs.by_seq(job.seq_id) is job:
            jobs.remove(job)
    if not was_ours:  # it was not ours before either, or the reply of an earlier try was lost
        log_event(logger, logging.WARNING, "job not released", job_id=job.id, error="it is not ours")
        return
    log_event(
        logger, logging.INFO, "job released",
        job_id=job.id, attempt=job.attempt, position=job.position, died=died,
    )  # fmt: skip
