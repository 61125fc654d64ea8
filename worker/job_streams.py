"""The jobs streams of one partition as its workers read them: which worker gets which entry.

No method retries. Each may be called again after an error, as all scripts are written for that.
"""

import asyncio
import itertools
import logging
from collections.abc import Awaitable
from typing import TypeVar

from redis.asyncio import Redis
from redis.exceptions import ResponseError

from ingine.connect.scripts import run_script
from ingine.contract.calls import delivery, upkeep
from ingine.contract.calls.script_call import ScriptCall
from ingine.contract.entries import Entry, count_choices, read_entry
from ingine.contract.keys import GROUP, Keys, Priority, parked
from ingine.worker.contact import Contact
from ingine.worker.last_ids import renumber
from ingine.worker.logs import log_event
from ingine.worker.retry import never_passes
from ingine.worker.served_model import ServedModel

T = TypeVar("T")
logger = logging.getLogger(__name__)

LOW_FIRST_EVERY = 8
"""Each eighth read begins with the low priority, so that a flood of urgent jobs does not starve it."""

MAX_ORDERED, MAX_ORDERINGS = 50, 10
"""New entries that one call puts into the fair order, and calls in a row. The script reads whole jobs, which
may be large, and the server serves no other client meanwhile."""

PENDING_PAGE = 8
"""Entries of each jobs stream in a reply that has no other bound. An entry may have 8 MiB."""

DEFAULT_MAX_COST = 1 << 20
"""Most tokens that a choice counts for: more than any model's longest sequence. A worker passes that of its
engine."""


class JobStreams:
    """A stream for each priority, which all workers of the queue read in one consumer group.

    An entry is delivered to one worker, and is pending under its name until the job ends. Entries that wait
    in the fair order, are released, or are parked for a model are pending under names that no worker has.

    Each choice of a job takes one place: `take` and `claim_idle` return entries while one of `num_places` is
    free, so the last entry may have more choices than are free.
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
        """Names and fingerprints of the models that other workers of the queue have served within
        `model_wait_s`."""
        self.contact = Contact()
        self._redis = redis
        self._max_cost = max_cost
        self._served = list(Priority)
        """The priorities whose key holds a stream."""
        self._num_reads = itertools.count(1)
        self._adopt_after = dict.fromkeys(Priority, "")
        self._may_be_parked = set(Priority)

    async def create_groups(self) -> None:
        """Create the consumer group of each jobs stream, at 0: the first worker sees jobs queued before it.

        A jobs stream whose key holds another type is not served; the others are.
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

    async def take(self, num_places: int) -> list[Entry]:
        """Take entries that no worker has, without waiting.

        The most urgent priority comes first; within one, parked entries, then the fair order.
        """
        order = list(self._served)
        if next(self._num_reads) % LOW_FIRST_EVERY == 0:
            order.reverse()
        entries: list[Entry] = []
        for priority in order:
            if priority in self._may_be_parked and (left := num_places - count_choices(entries)) > 0:
                entries += await self._unpark(priority, left)
            if (left := num_places - count_choices(entries)) > 0:
                entries += await self._take(priority, left)
        return entries

    async def _take(self, priority: Priority, num_places: int) -> list[Entry]:
        for calls_left in reversed(range(MAX_ORDERINGS)):
            call = delivery.take(
                self.keys,
                priority,
                worker_id=self.worker_id,
                num_places=num_places,
                max_ordered=MAX_ORDERED,
                take_anyway=calls_left == 0,
                max_cost=self._max_cost,
            )
            taken = await self._answered(self._run(call))
            if taken is None or not taken.more:
                break
        return [] if taken is None else taken.entries

    async def wait_for_new(self, timeout_s: float) -> list[Entry]:
        """Wait until there is a new entry, and take at most one of each priority."""
        after = dict.fromkeys(self._served, ">")
        read = await self._read_group(after, waits_s=timeout_s, count=1, block=int(timeout_s * 1000))
        return _present(read)

    async def own_pending(
        self, after: dict[Priority, str] | None = None
    ) -> tuple[list[Entry], dict[Priority, str]]:
        """Read a page of the entries that are pending with us. The reply that brought one may have been lost.

        after: the second value that the call for the page before returned. It is empty after the last page.
        """
        read = await self._read_group(after or dict.fromkeys(self._served, "0"), count=PENDING_PAGE)
        full = {priority: page for priority, page in read.items() if len(page) == PENDING_PAGE}
        return _present(read), {priority: page[-1][0].decode() for priority, page in full.items()}

    async def claim_idle(self, min_idle_s: float, num_places: int) -> list[Entry]:
        """Claim entries that are released, or whose holders were silent for `min_idle_s`."""
        entries: list[Entry] = []
        for priority in self._served:
            if (left := num_places - count_choices(entries)) > 0:
                call = delivery.claim(
                    self.keys,
                    priority,
                    worker_id=self.worker_id,
                    min_idle_ms=int(min_idle_s * 1000),
                    num_places=left,
                )
                entries += await self._answered(self._run(call)) or []
        return entries

    def look_for_parked(self) -> None:
        """Let `take` ask for parked entries from the next call on, until there are none left."""
        self._may_be_parked = set(Priority)

    async def _unpark(self, priority: Priority, num_places: int) -> list[Entry]:
        """Claim entries that are parked for our model, or for one that no worker serves."""
        call = delivery.unpark(
            self.keys,
            priority,
            worker_id=self.worker_id,
            num_places=num_places,
            abandoned_after_ms=int(self.model_wait_s * 1000),
            ours=self.model.parked,
            others=[parked(model) for model in self.served_elsewhere],
        )
        entries = await self._answered(self._run(call)) or []
        if count_choices(entries) < num_places:
            self._may_be_parked.discard(priority)
        return entries

    async def adopt(self) -> tuple[int, bool]:
        """Find entries that no worker would read, in one page of each stream, and make them available again.

        Entries with ids among the last possible ones get new ids. Returns how many entries there were of both
        kinds, and whether there are pages left.
        """
        if len(self._served) < len(Priority):
            await self.create_groups()
        num_adopted = 0
        for priority in self._served:
            num_adopted += await self._answered(renumber(self._redis, self.keys, priority)) or 0
            after = self._adopt_after[priority]
            call = upkeep.adopt(self.keys, priority, after=after, max_entries=MAX_ORDERED)
            adopted = await self._answered(self._run(call))
            self._adopt_after[priority] = adopted.after if adopted else ""
            num_adopted += adopted.num_adopted if adopted else 0
        return num_adopted, any(self._adopt_after.values())

    async def _run(self, call: ScriptCall[T]) -> T:
        return await run_script(self._redis, call)

    async def _read_group(
        self, after: dict[Priority, str], *, waits_s: float = 0.0, **options
    ) -> dict[Priority, list]:
        """Read entries with XREADGROUP: pairs of an id and a map of fields, by priority."""
        streams = {self.keys.jobs(priority): start for priority, start in after.items()}
        by_stream = {self.keys.jobs(priority).encode(): priority for priority in after}
        if not streams:
            await asyncio.sleep(waits_s)
            return {}
        reading = self._redis.xreadgroup(GROUP, self.worker_id, streams, **options)
        return {by_stream[stream]: page for stream, page in await self._answered(reading, waits_s) or []}

    async def _answered(self, reading: Awaitable[T], waits_s: float = 0.0) -> T | None:
        """Await a reply. Returns None if a stream or its group is missing, or its key holds another type.

        That is so when the queue is new, or the server has lost its data. The groups are created then.
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
    """Decode these entries, without those that were deleted while they were pending: they have no fields."""
    return [
        read_entry(priority, entry_id, fields)
        for priority, page in read.items()
        for entry_id, fields in page
        if fields
    ]
