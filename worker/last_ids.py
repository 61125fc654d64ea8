"""A jobs stream whose ids somebody has used up: `scripts/renumber.lua` gives it ids again."""

import logging

from redis.asyncio import Redis
from redis.commands.core import AsyncScript

from ingine.keys import GROUP, JOB_FIELD, Keys, Priority
from ingine.wire import read_job_id
from worker.logs import log_event

LAST_MS = 2**64 - 1
"""The last millisecond that an entry's id can have."""
GREATEST_ID = f"{LAST_MS}-{LAST_MS}".encode()
JOBS_PER_READ = 8
"""An entry may have 8 MiB."""

logger = logging.getLogger(__name__)


async def renumber(script: AsyncScript, redis: Redis, keys: Keys, priority: Priority, worker_id: str) -> None:
    """Does nothing while there are ids left. Raises what the dead letters answer, if they take nothing."""
    touched = [keys.jobs(priority), keys.while_renumbered(priority), keys.dead]
    if await script(keys=touched, args=[GROUP, worker_id, 1]) < 0:
        return
    job_ids = await _jobs_of_last_ms(redis, keys.jobs(priority))
    touched += [keys.job(job_id) for job_id in job_ids.values()]
    num_buried = await script(keys=touched, args=[GROUP, worker_id, 0, *job_ids])
    if num_buried >= 0:
        log_event(logger, logging.ERROR, "ids used up", priority=priority, buried=num_buried)


async def _jobs_of_last_ms(redis: Redis, stream: str) -> dict[bytes, str]:
    """Entries with such ids -> the ids of their jobs, where these can be read."""
    job_ids, start = {}, f"{LAST_MS}-0"
    while page := await redis.xrange(stream, min=start, count=JOBS_PER_READ):
        for entry_id, fields in page:
            if job_id := read_job_id(fields.get(JOB_FIELD.encode(), b"")):
                job_ids[entry_id] = job_id
        if page[-1][0] == GREATEST_ID:  # "behind it" is no range
            break
        start = f"({page[-1][0].decode()}"
    return job_ids
