"""What ends an entry or a job that sets off a fault, be it ours or of what lies under its keys."""

import contextlib
import logging
from collections.abc import AsyncIterator
from typing import Any

from redis.exceptions import RedisError

from ingine.contract.jobs import Job, read_job_id
from ingine.contract.record import JobStatus
from ingine.errors import ErrorCode, InvalidJob
from ingine.worker.entries import Begun, Entry
from ingine.worker.logs import log_event
from ingine.worker.publisher import BAD_RECORD, Publisher
from ingine.worker.queue import Queue
from ingine.worker.retry import never_passes

logger = logging.getLogger(__name__)


@contextlib.asynccontextmanager
async def burying(
    publisher: Publisher, queue: Queue, entry: Entry, *, metadata: dict[str, Any] | None = None
) -> AsyncIterator[None]:
    """An entry under whose job's keys lies what is no job's, or that sets off a fault of ours, which it
    would in the next worker too.

    metadata: of its job, for the reply; None while the job is not decoded.
    """
    try:
        yield
        return
    except (RedisError, OSError) as error:
        if not never_passes(error):
            raise
        code, reason = ErrorCode.BAD_RECORD, BAD_RECORD.format(error)
    except Exception as error:
        log_event(logger, logging.ERROR, "entry not read", entry=entry.id, error=repr(error))
        logger.debug("entry not read", exc_info=error)
        code, reason = ErrorCode.ENGINE_ERROR, _own_fault("entry", error)
    await publisher.bury(queue, entry, code, reason, job_id=read_job_id(entry.raw), metadata=metadata)


@contextlib.asynccontextmanager
async def ending_faulty(
    publisher: Publisher, queue: Queue, entry: Entry, job: Job | InvalidJob, job_id: str, begun: Begun
) -> AsyncIterator[None]:
    """A fault of ours that this job sets off. Nobody died, and another worker would do no better: the job
    ends, with the type of the fault."""
    try:
        yield
    except (RedisError, OSError):
        raise
    except Exception as error:
        log_event(logger, logging.ERROR, "job not begun", job_id=job_id, error=repr(error))
        logger.debug("job not begun", exc_info=error)
        own_fault = {"code": str(ErrorCode.ENGINE_ERROR), "message": _own_fault("job", error)}
        metadata = job.metadata if isinstance(job, Job) else None
        await publisher.reject(
            queue, entry, job_id, job.reply_to, begun, JobStatus.FAILED, own_fault, metadata
        )


def _own_fault(at: str, error: Exception) -> str:
    """For whoever may read the job's end. What the error says is for the log: anything may be in it."""
    return f"the worker met a fault of its own at this {at}: {type(error).__name__}"
