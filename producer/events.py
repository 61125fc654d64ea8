"""One job as a whole: its events, as it was submitted, and its deletion. For gateways to other protocols."""

from collections.abc import AsyncGenerator
from contextlib import aclosing

from ingine.connect.scripts import run_script
from ingine.contract.calls.producing import delete
from ingine.contract.events import Event
from ingine.contract.jobs import MAX_JOB_BYTES, Job, decode_job
from ingine.contract.keys import JOB_FIELD, Priority
from ingine.contract.record import JobStatus
from ingine.errors import InvalidJob
from ingine.producer.client import AsyncClient


async def follow_events(client: AsyncClient, job_id: str, position: int = 0) -> AsyncGenerator[Event, None]:
    """Yield the events of a job after `position` output tokens, each once and in order, up to and including
    the terminal event, which is always the last.

    Reads no further page of the log before the caller has taken the events of the last one. Close the
    generator if you leave it early. Raises JobNotFound, BadRecord and ServerUnavailable as
    `AsyncJobHandle.stream` does; a job that has failed raises nothing.
    """
    async with aclosing(client._session.streams.follow(job_id, position)) as events:
        async for event in events:
            yield event


async def submitted_job(client: AsyncClient, job_id: str) -> Job | None:
    """Return a job as it was submitted, while it waits or runs. None once it has ended, or moved on between
    two reads, and for a job that this version cannot read.

    Raises JobNotFound, BadRecord and ServerUnavailable.
    """
    partition, info = await client._find(job_id)
    raw = None
    if info.status is JobStatus.DELAYED:
        raw = await partition.call(lambda redis, keys: redis.hget(keys.job(job_id), "raw"))
    elif not info.status.terminal and info.priority in list(Priority) and (entry := info.entry):
        entries = await partition.call(
            lambda redis, keys: redis.xrange(keys.jobs(Priority(info.priority)), min=entry, max=entry)
        )
        raw = entries[0][1].get(JOB_FIELD.encode()) if entries else None
    try:
        return decode_job(raw, max_bytes=MAX_JOB_BYTES) if raw else None
    except InvalidJob:
        return None


async def delete_job(client: AsyncClient, job_id: str) -> str:
    """Delete the record and the log of a job that has ended, before its result's TTL.

    Returns `deleted`, or the status of a job that has not ended, which stays as it is. Raises JobNotFound.
    """
    partition, _ = await client._find(job_id)
    outcome = await partition.call(lambda redis, keys: run_script(redis, delete(keys, job_id)))
    return "deleted" if outcome == "unknown" else outcome  # it was there: the reply of a first call was lost
