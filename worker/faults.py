"""Context managers that end an entry or a job that triggers a fault of the worker or has invalid keys."""

import contextlib
import logging
from collections.abc import AsyncIterator
from typing import Any

from redis.exceptions import RedisError

from ingine.contract.entries import Entry
from ingine.contract.jobs import read_job_id
from ingine.errors import ErrorCode
from ingine.worker.finisher import BAD_RECORD, Finisher
from ingine.worker.jobs import BegunJob
from ingine.worker.logs import log_event
from ingine.worker.queue import Queue
from ingine.worker.retry import never_passes
from ingine.worker.terminal_events import Outcome

logger = logging.getLogger(__name__)


@contextlib.asynccontextmanager
async def burying(
    finisher: Finisher, queue: Queue, entry: Entry, *, metadata: dict[str, Any] | None = None
) -> AsyncIterator[None]:
    """Bury `entry` if its job's keys hold something else, or if it triggers a fault of the worker, as it
    would in the next worker too. Errors of Redis that may pass are raised.

    metadata: the job's, for the reply; None while the job is not decoded.
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
    await finisher.bury(queue, entry, code, reason, job_id=read_job_id(entry.raw), metadata=metadata)


@contextlib.asynccontextmanager
async def ending_faulty(finisher: Finisher, job: BegunJob) -> AsyncIterator[None]:
    """End `job` as failed if it triggers a fault of the worker. This counts as no death, and another worker
    would fail too. The job's error names only the type of the fault. Errors of Redis are raised."""
    try:
        yield
    except (RedisError, OSError):
        raise
    except Exception as error:
        log_event(logger, logging.ERROR, "job not begun", job_id=job.id, error=repr(error))
        logger.debug("job not begun", exc_info=error)
        await finisher.reject(job, Outcome.failed(ErrorCode.ENGINE_ERROR, _own_fault("job", error)))


def _own_fault(at: str, error: Exception) -> str:
    """Describe `error` to the producer by its type alone: its text may hold anything, and is for the log."""
    return f"the worker met a fault of its own at this {at}: {type(error).__name__}"
