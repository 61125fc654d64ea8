"""A jobs stream whose ids somebody has used up: it is made anew, and what had the last ids gets others."""

import logging
from collections.abc import Mapping

from ingine.connect.scripts import Script
from ingine.contract.jobs import read_job_id
from ingine.contract.keys import GROUP, Keys, Priority
from ingine.worker.entries import MAX_ENTRY_BYTES, read_entries
from ingine.worker.logs import log_event

LAST_MS = 2**64 - 1
"""The last millisecond that an entry's id can have."""
MAX_PUT_BACK = 8
"""Entries that one call puts back, which it reads at once. An entry may have 8 MiB."""

SCRIPTS = ("renumber", "put_back")

logger = logging.getLogger(__name__)


async def renumber(scripts: Mapping[str, Script], keys: Keys, priority: Priority) -> int:
    """How many entries were put back, at most `MAX_PUT_BACK`: 0 once all have ids that can stay.

    In two steps, since a script names the keys that it touches, and which jobs these are is known only once
    the entries lie where nothing is added: `renumber.lua` sets them aside, and `put_back.lua` takes one after
    the other. What a worker leaves aside when it dies, the next call of any worker puts back.
    """
    jobs, aside = keys.jobs(priority), keys.set_aside(priority)
    touched, args = [jobs, keys.while_renumbered(priority), aside], [GROUP, MAX_PUT_BACK, MAX_ENTRY_BYTES]
    made_anew, page = await scripts["renumber"](keys=touched, args=args)
    if made_anew:
        log_event(logger, logging.ERROR, "ids used up", priority=priority)
    num_put_back = 0
    for entry in read_entries(priority, page):
        touched = [aside, jobs, keys.job(read_job_id(entry.raw) or "")]
        num_put_back += await scripts["put_back"](keys=touched, args=[entry.id])
    return num_put_back
