"""Recreate a jobs stream whose ids a client has used up, and give the entries with the last ids new ones."""

import logging

from redis.asyncio import Redis

from ingine.connect.scripts import run_script
from ingine.contract.calls import upkeep
from ingine.contract.jobs import read_job_id
from ingine.contract.keys import Keys, Priority
from ingine.worker.logs import log_event

LAST_MS = 2**64 - 1
"""The last millisecond that an entry's id can have."""
MAX_PUT_BACK = 8
"""Entries that one call reads and puts back. An entry may have 8 MiB."""

logger = logging.getLogger(__name__)


async def renumber(redis: Redis, keys: Keys, priority: Priority) -> int:
    """Renumber entries of a jobs stream that is out of ids. Returns how many entries were put back, at most
    `MAX_PUT_BACK`: 0 once all entries have ids that can stay.

    It takes two scripts, since a script must name the keys that it touches, and the jobs of the entries are
    known only once the entries are in a stream that nothing is added to. `renumber.lua` sets them aside, and
    `put_back.lua` puts them back one by one. Entries that a dead worker has left aside are put back by the
    next call of any worker.
    """
    renumbered = await run_script(redis, upkeep.renumber(keys, priority, count=MAX_PUT_BACK))
    if renumbered.rebuilt:
        log_event(logger, logging.ERROR, "ids used up", priority=priority)
    num_put_back = 0
    for entry in renumbered.set_aside:
        call = upkeep.put_back(keys, priority, aside_id=entry.id, job_id=read_job_id(entry.raw))
        num_put_back += await run_script(redis, call)
    return num_put_back
