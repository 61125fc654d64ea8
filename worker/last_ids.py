"""Recreate a jobs stream whose ids a client has used up, and give the entries with the last ids new ones."""

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
"""Entries that one call reads and puts back. An entry may have 8 MiB."""

SCRIPTS = ("renumber", "put_back")

logger = logging.getLogger(__name__)


async def renumber(scripts: Mapping[str, Script], keys: Keys, priority: Priority) -> int:
    """Renumber entries of a jobs stream that is out of ids. Returns how many entries were put back, at most
    `MAX_PUT_BACK`: 0 once all entries have ids that can stay.

    It takes two scripts, since a script must name the keys that it touches, and the jobs of the entries are
    known only once the entries are in a stream that nothing is added to. `renumber.lua` sets them aside, and
    `put_back.lua` puts them back one by one. Entries that a dead worker has left aside are put back by the
    next call of any worker.
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
