"""The jobs streams of one partition as its workers read them: who gets which entry.

Nothing here retries. Every call may be made again after an error: that is the scripts' design.
"""

import asyncio
import itertools
import logging
from collections.abc import Awaitable
from dataclasses import replace
from typing import TypeVar

from redis.asyncio import Redis
from redis.exceptions import ResponseError

from ingine.connect.scripts import load_script
from ingine.contract.keys import GROUP, PARKED_PREFIX, RELEASED, WAITING, Keys, Priority, parked
from ingine.worker import last_ids
from ingine.worker.contact import Contact
from ingine.worker.entries import MAX_ENTRY_BYTES, Entry, read_entries, read_entry
from ingine.worker.logs import log_event
from ingine.worker.retry import never_passes
from ingine.worker.served_model import ServedModel

T = TypeVar("T")
logger = logging.getLogger(__name__)

LOW_FIRST_EVERY = 8
"""Each eighth read asks for low priority first, so that a flood of urgent jobs does not starve it."""

MAX_ORDERED, MAX_ORDERINGS = 50, 10
"""New entries that one call puts into the fair order, and calls in a row. A script reads whole jobs, which
can be large, while nobody else is served."""

PENDING_PAGE = 8
"""Entries of each jobs stream in a reply that is bounded by nothing else. An entry may have 8 MiB."""

DEFAULT_MAX_COST = 1 << 20
"""Tokens that a job may cost at most: more than models have. A worker says what its engine's longest is."""

SCRIPTS = ("take", "claim", "unpark", "adopt", *last_ids.SCRIPTS)


class JobStreams:
    """One stream for each priority, and the consumer group that all workers of the queue read in.

    An entry goes to one worker, whose name it is pending under until the job ends. Entries that wait in the
    fair order, are released or are parked for a model are pending under names that no worker has.
    """

    def __init__(
        self,
        keys: Keys,
        worker_id: str,
        redis: Redis,
        model: ServedModel,
        *,
        model_wait_s: float,
        max_cost: int = DEFAULT_MAX_COST,
    ):
        self.keys = keys
        self.worker_id = worker_id
        self.model = model
        self.model_wait_s = model_wait_s
        self.served_elsewhere: frozenset[str] = frozenset()
        """Names and fingerprints that other workers of the queue serve, or did within `model_wait_s`."""
        self.contact = Contact()
        self._redis = redis
        self._max_cost = max_cost
        self._scripts = {name: load_script(redis, name) for name in SCRIPTS}
        self._served = list(Priority)
        """Those whose jobs stream is one."""
        self._num_reads = itertools.count(1)
        self._adopt_after = dict.fromkeys(Priority, "")
        self._may_be_parked = set(Priority)

    async def create_groups(self) -> None:
        """From 0, so that what was queued before the first worker is seen too.

        Where somebody has written something else under a jobs stream's key, the others are served.
        """
        served = []
        for priority in Priority:
            try:
                await self._redis.xgroup_create(self.keys.jobs(priority), GROUP, id="0", mkstream=True)
            except ResponseError as error:
                if never_passes(error):
                    if priority in self._served:
                        log_event(
                            logger, logging.ERROR, "jobs stream not served", priority=priority, error=error
                        )
                    continue
                if "BUSYGROUP" not in str(error):
                    raise
            served.append(priority)
        self._served = served

    async def take(self, count: int) -> list[Entry]:
        """Up to `count` entries that no worker has: most urgent first, then parked ones, then in fair order.

        Does not wait.
        """
        order = list(self._served)
        if next(self._num_reads) % LOW_FIRST_EVERY == 0:
            order.reverse()
        entries: list[Entry] = []
        for priority in order:
            if priority in self._may_be_parked and len(entries) < count:
                entries += await self._unpark(priority, count - len(entries))
            if len(entries) < count:
                entries += await self._take(priority, count - len(entries))
        return entries

    async def _take(self, priority: Priority, count: int) -> list[Entry]:
        keys = self.keys
        touched = [keys.jobs(priority), keys.fair(priority), keys.ends(priority), keys.settings]
        for calls_left in reversed(range(MAX_ORDERINGS)):
            options = [MAX_ORDERED, int(calls_left == 0), self._max_cost, MAX_ENTRY_BYTES]
            args = [GROUP, self.worker_id, count, WAITING, *options]
            taken, more = await self._answered(self._scripts["take"](keys=touched, args=args)) or ([], 0)
            if not more:
                break
        return read_entries(priority, taken)

    async def wait_for_new(self, timeout_s: float) -> list[Entry]:
        """Waits until there is something new, and takes at most one entry of each priority."""
        after = dict.fromkeys(self._served, ">")
        read = await self._read_group(after, waits_s=timeout_s, count=1, block=int(timeout_s * 1000))
        return _present(read)

    async def own_pending(
        self, after: dict[Priority, str] | None = None
    ) -> tuple[list[Entry], dict[Priority, str]]:
        """A page of what was delivered to us already, some of it with a reply that was lost.

        after: what the page before has returned beside its entries. After the last page that is empty.
        """
        read = await self._read_group(after or dict.fromkeys(self._served, "0"), count=PENDING_PAGE)
        full = {priority: page for priority, page in read.items() if len(page) == PENDING_PAGE}
        return _present(read), {priority: page[-1][0].decode() for priority, page in full.items()}

    async def claim_idle(self, min_idle_s: float, count: int) -> list[Entry]:
        """Up to `count` entries whose holders were silent for `min_idle_s`, or have released them."""
        entries: list[Entry] = []
        for priority in self._served:
            if len(entries) < count:
                min_idle_ms, room = int(min_idle_s * 1000), count - len(entries)
                args = [GROUP, self.worker_id, min_idle_ms, room, WAITING, PARKED_PREFIX, MAX_ENTRY_BYTES]
                claiming = self._scripts["claim"](keys=[self.keys.jobs(priority)], args=args)
                entries += read_entries(priority, await self._answered(claiming) or [])
        return entries

    def look_for_parked(self) -> None:
        """Let the next `take` ask for parked entries, and each one after it until there are no more."""
        self._may_be_parked = set(Priority)

    async def _unpark(self, priority: Priority, count: int) -> list[Entry]:
        """Up to `count` entries that are parked for our model, or for one that nobody serves any more."""
        for_us, for_others = self.model.parked, [parked(model) for model in self.served_elsewhere]
        wait_ms = int(self.model_wait_s * 1000)
        args = [GROUP, self.worker_id, count, PARKED_PREFIX, wait_ms, len(for_us), MAX_ENTRY_BYTES]
        args += [*for_us, *for_others]
        unparking = self._scripts["unpark"](keys=[self.keys.jobs(priority)], args=args)
        claimed, abandoned = await self._answered(unparking) or ([], [])
        entries = read_entries(priority, claimed)
        entries += [replace(entry, abandoned=True) for entry in read_entries(priority, abandoned)]
        if len(entries) < count:
            self._may_be_parked.discard(priority)
        return entries

    async def adopt(self) -> tuple[int, bool]:
        """Find entries that nobody has, in one page of each stream, for `waiting` or `released` to have.

        Those whose ids are among the last that there are get others, and wait anew. How many there were of
        both, and whether there are pages left.
        """
        if len(self._served) < len(Priority):
            await self.create_groups()
        num_adopted = 0
        for priority in self._served:
            num_adopted += await self._answered(last_ids.renumber(self._scripts, self.keys, priority)) or 0
            touched = [self.keys.jobs(priority), self.keys.fair(priority)]
            args = [GROUP, self._adopt_after[priority], MAX_ORDERED, WAITING, RELEASED]
            after, number = await self._answered(self._scripts["adopt"](keys=touched, args=args)) or (b"", 0)
            self._adopt_after[priority] = after.decode()
            num_adopted += number
        return num_adopted, any(self._adopt_after.values())

    async def _read_group(
        self, after: dict[Priority, str], *, waits_s: float = 0.0, **options
    ) -> dict[Priority, list]:
        """Ids and fields of the entries, by stream."""
        streams = {self.keys.jobs(priority): start for priority, start in after.items()}
        by_stream = {self.keys.jobs(priority).encode(): priority for priority in after}
        if not streams:
            await asyncio.sleep(waits_s)
            return {}
        reading = self._redis.xreadgroup(GROUP, self.worker_id, streams, **options)
        return {by_stream[stream]: page for stream, page in await self._answered(reading, waits_s) or []}

    async def _answered(self, reading: Awaitable[T], waits_s: float = 0.0) -> T | None:
        """None: the server lost its data, or the queue is new, or a stream is none.

        Nothing to read, but now there are groups, where there can be.
        """
        try:
            answer = await reading
        except ResponseError as error:
            if "NOGROUP" not in str(error) and "no such key" not in str(error) and not never_passes(error):
                raise
            await self.create_groups()
            answer = None
        self.contact.made(waited_s=waits_s)
        return answer


def _present(read: dict[Priority, list]) -> list[Entry]:
    """Without those that were deleted while they were pending: they have no fields."""
    return [
        read_entry(priority, entry_id, fields)
        for priority, page in read.items()
        for entry_id, fields in page
        if fields
    ]
