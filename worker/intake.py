"""Read entries of a partition's streams, no more than there is room for, and have them admitted."""

import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable
from typing import TypeVar

from redis.exceptions import RedisError, ResponseError

from ingine.contract.entries import Entry, count_choices
from ingine.contract.jobs import DEFAULT_MAX_JOB_BYTES
from ingine.worker.admission import Admission
from ingine.worker.leases import RENEWALS_PER_LEASE
from ingine.worker.logs import log_event
from ingine.worker.queue import Queue
from ingine.worker.retry import Backoff, never_passes

T = TypeVar("T")
logger = logging.getLogger(__name__)

BLOCK_S = 0.25
"""How long one read waits for new entries. Short, since a hand-over waits for it, both in the worker that
stops and in the one that takes over."""

SWEEP_INTERVAL_S = 1.0
ADOPTION_INTERVAL_S = 10.0

ENTRIES_AT_ONCE = 64
"""Entries whose begins share a round trip. No more, so that the first entry need not wait for many others."""


class Intake:
    """Takes jobs of one partition while there is room, jobs of dead or stopping workers before new ones.

    The heartbeat sets `paused` and `max_job_bytes` from the partition's settings.
    """

    def __init__(self, queue: Queue, admission: Admission, *, lease_s: float, num_partitions: int):
        self._queue = queue
        self._admission = admission
        self._lease_s = lease_s
        self._num_partitions = num_partitions
        self._woken = asyncio.Event()
        self._next_sweep = 0.0
        self._next_expiry = 0.0
        self._next_adoption = 0.0
        self._lost_delivery = False
        self._suspect: Entry | None = None
        self._renew_suspect_at = 0.0
        self.paused = False
        self.max_job_bytes = DEFAULT_MAX_JOB_BYTES
        self.failing_since: float | None = None
        """When (`time.monotonic`) the first of the latest failed turns failed; None after a good turn."""
        self.last_error: Exception | None = None
        """Why the latest turn failed; None after a good one."""
        admission.on_room(self.wake)

    @property
    def _room(self) -> int:
        """This partition's share of the room, so that a partition whose server hangs holds up no other."""
        return 0 if self.paused else -(-self._admission.room // self._num_partitions)

    def wake(self) -> None:
        """End a wait for room: there may be room now, or a reason to stop."""
        self._woken.set()

    def sweep_soon(self) -> None:
        """Look for jobs that a peer has released before the next sweep is due."""
        self._next_sweep = 0.0
        self.wake()

    async def run(self) -> None:
        """Take jobs until the admission is `stopping`. Waits for a server that is away."""
        backoff = Backoff(f"intake of {self._queue.keys.prefix}")
        while not self._admission.stopping:
            try:
                await self._turn()
            except (RedisError, OSError) as error:
                # A suspect that waits must not hold up the other partitions; it is read again later.
                self._forget_suspect()
                self._lost_delivery = True
                self.failing_since = self.failing_since or time.monotonic()
                self.last_error = error
                await backoff.sleep(error)
            else:
                self.failing_since = self.last_error = None
                backoff.reset()
        with contextlib.suppress(
            RedisError, OSError
        ):  # else the entries wait until their leases have expired
            await self._leave_to_peers()

    async def _turn(self) -> None:
        if self._lost_delivery:
            await self._admit_lost()
        if self._suspect and self.paused:
            await self._release_suspect()
        elif self._suspect:
            await self._serve_suspect(self._suspect)
        await self._expire_due()
        await self._adopt()
        if not self._room:
            await self._wait_for_room()
        elif not await self._take():
            self._admission.offer_room()
            await self._admit_surplus(await self._queue.wait_for_new(BLOCK_S))

    async def _expire_due(self) -> None:
        """End waiting jobs whose deadline has passed, also without room and while paused: the deadline is the
        producer's, and holds for waiting jobs too."""
        if time.monotonic() >= self._next_expiry:
            more = await self._unless_foreign(self._queue.expire_due(), False)
            self._next_expiry = 0.0 if more else time.monotonic() + SWEEP_INTERVAL_S

    async def _adopt(self) -> None:
        """Take back entries that no consumer has after an operator's command such as XGROUP DELCONSUMER: on
        start, and then every `ADOPTION_INTERVAL_S`."""
        if time.monotonic() >= self._next_adoption:
            num_adopted, more = await self._unless_foreign(self._queue.adopt(), (0, False))
            self._next_adoption = time.monotonic() + (SWEEP_INTERVAL_S if more else ADOPTION_INTERVAL_S)
            if num_adopted:
                self._next_adoption = 0.0
                log_event(logger, logging.WARNING, "entries adopted", entries=num_adopted)

    async def _unless_foreign(self, chore: Awaitable[T], otherwise: T) -> T:
        """The result of `chore`; `otherwise` if one of its keys has another type. Any client may have written
        that, and it must not keep this worker from taking jobs."""
        try:
            return await chore
        except ResponseError as error:
            if not never_passes(error):
                raise
            log_event(logger, logging.ERROR, "foreign key", error=error)
            return otherwise

    async def _wait_for_room(self) -> None:
        self._woken.clear()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(BLOCK_S):
                await self._woken.wait()

    async def _admit_lost(self) -> None:
        """Admit the entries of a lost reply: they were delivered to us, whether there is room or not."""
        after = None
        while after is None or after:
            entries, after = await self._queue.own_pending(after)
            with self._admission.reserve(count_choices(entries)):
                await self._admit_all(entries)
        self._lost_delivery = False

    async def _take(self) -> bool:
        """Take entries while there is room. Returns False if there was room and no entry. Abandoned jobs come
        first: they are older, and their consumers have part of the output."""
        if time.monotonic() >= self._next_sweep:
            self._next_sweep = time.monotonic() + SWEEP_INTERVAL_S
            await self._sweep()
        with self._admission.reserve(self._room) as room:
            if not room:
                return True
            entries = await self._queue.take(room)
            if entries:
                self._admission.served(self.wake)
            await self._admit_taken(entries, room)
            return bool(entries)

    async def _sweep(self) -> None:
        if await self._unless_foreign(self._queue.promote(), False):
            self._next_sweep = 0.0
        lease_s = self._lease_s
        if self._queue.contact.returned(after_s=lease_s / 2, within_s=lease_s / RENEWALS_PER_LEASE):
            # No worker could renew its leases while the server was away. Those that still run do so as soon
            # as it is back, which must come before their jobs are taken to be abandoned.
            return
        self._queue.look_for_parked()
        with self._admission.reserve(self._room) as room:
            if room:
                entries = await self._queue.claim_idle(lease_s, room)
                if count_choices(entries) >= room:
                    self._next_sweep = 0.0
                await self._admit_taken(entries, room)

    async def _admit_taken(self, entries: list[Entry], num_reserved: int) -> None:
        """Admit entries for which `num_reserved` places are reserved. The last may have more choices."""
        with self._admission.reserve(max(0, count_choices(entries) - num_reserved)):
            await self._admit_all(entries)

    async def _admit_surplus(self, entries: list[Entry]) -> None:
        """Admit what there is room for, and release the rest. A waiting read returns up to one entry of each
        priority, and the other partitions may have taken the room meanwhile."""
        room, num_admitted = self._room, 0
        while num_admitted < len(entries) and count_choices(entries[:num_admitted]) < room:
            num_admitted += 1
        with self._admission.reserve(count_choices(entries[:num_admitted])):
            await self._admit_all(entries[:num_admitted])
        for surplus in entries[num_admitted:]:
            await self._admission.release(self._queue, surplus)

    async def _admit_all(self, entries: list[Entry]) -> None:
        for start in range(0, len(entries), ENTRIES_AT_ONCE):
            admitting = [self._admit(entry) for entry in entries[start : start + ENTRIES_AT_ONCE]]
            # All are awaited, so that no entry is left half admitted. Then the first error is raised.
            for error in filter(None, await asyncio.gather(*admitting, return_exceptions=True)):
                raise error
        await self._queue.tell_parked()

    async def _admit(self, entry: Entry) -> None:
        """Admit or release one entry. Every entry passes here, so a worker that is paused or stopping begins
        none, and neither does one that runs a suspect alone: entries that a lost reply has delivered to
        another partition are released then."""
        if self._admission.holds(entry) or entry == self._suspect:
            return
        if self._admission.stopping or self.paused or self._admission.is_for_one_alone:
            await self._admission.release(self._queue, entry)
        elif not await self._admission.admit(self._queue, entry, self.max_job_bytes):
            await self._keep_suspect(entry)

    async def _keep_suspect(self, entry: Entry) -> None:
        """Keep one suspect, until this worker has no other job. Further ones are released, since another
        worker may be idle."""
        if self._admission.num_suspects:
            await self._admission.release(self._queue, entry)
        else:
            self._suspect = entry
            self._admission.num_suspects += 1

    async def _serve_suspect(self, entry: Entry) -> None:
        """Begin the suspect if this worker has no other job; else keep it, and renew its lease."""
        if self._admission.idle:
            with self._admission.reserve_all():
                await self._admission.admit(self._queue, entry, self.max_job_bytes, alone=True)
            self._forget_suspect()
        elif time.monotonic() >= self._renew_suspect_at:
            self._renew_suspect_at = time.monotonic() + self._lease_s / RENEWALS_PER_LEASE
            if await self._admission.admit(self._queue, entry, self.max_job_bytes):
                self._forget_suspect()

    def _forget_suspect(self) -> None:
        if self._suspect:
            self._suspect = None
            self._admission.num_suspects -= 1

    async def _release_suspect(self) -> None:
        entry = self._suspect
        self._forget_suspect()
        await self._admission.release(self._queue, entry)

    async def _leave_to_peers(self) -> None:
        """Release the entries that are ours and not begun, or not known to be begun."""
        if self._suspect:
            await self._release_suspect()
        if self._lost_delivery:
            await self._admit_lost()
