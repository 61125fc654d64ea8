"""From a partition's streams to admission: read no more than there is room for."""

import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable
from typing import TypeVar

from redis.exceptions import RedisError, ResponseError

from ingine.contract.jobs import DEFAULT_MAX_JOB_BYTES
from ingine.worker.admission import Admission
from ingine.worker.entries import Entry
from ingine.worker.leases import RENEWALS_PER_LEASE
from ingine.worker.logs import log_event
from ingine.worker.queue import Queue
from ingine.worker.retry import Backoff, never_passes

T = TypeVar("T")
logger = logging.getLogger(__name__)

BLOCK_S = 0.25
"""How long one read waits for new entries. Short, since a hand-over waits for it, at either end."""

SWEEP_INTERVAL_S = 1.0
ADOPTION_INTERVAL_S = 10.0

ENTRIES_AT_ONCE = 64
"""Entries whose begins share a round trip. Not more, so that the first one need not wait for all."""


class Intake:
    """Takes jobs of one partition while there is room, those of dead or stopping workers before new ones.

    `paused` and `max_job_bytes` are set from the partition's settings by the heartbeat.
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
        """Since when (`time.monotonic`) no turn has gone well."""
        self.last_error: Exception | None = None
        """Why none has since."""
        admission.on_room(self.wake)

    @property
    def _room(self) -> int:
        """Our share of what room there is, so that a partition whose server hangs holds up no other."""
        return 0 if self.paused else -(-self._admission.room // self._num_partitions)

    def wake(self) -> None:
        """There may be room now, or a reason to stop."""
        self._woken.set()

    def sweep_soon(self) -> None:
        """A peer has released jobs: look for them before the next sweep is due."""
        self._next_sweep = 0.0
        self.wake()

    async def run(self) -> None:
        """Until the admission is `stopping`. A server that is away is waited for."""
        backoff = Backoff(f"intake of {self._queue.keys.prefix}")
        while not self._admission.stopping:
            try:
                await self._turn()
            except (RedisError, OSError) as error:
                # A suspect that waits must not keep the others waiting too; it is delivered to us anew.
                self._forget_suspect()
                self._lost_delivery = True
                self.failing_since = self.failing_since or time.monotonic()
                self.last_error = error
                await backoff.sleep(error)
            else:
                self.failing_since = self.last_error = None
                backoff.reset()
        with contextlib.suppress(RedisError, OSError):  # else it waits until the lease has run out
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
        """Room or not, paused or not: a deadline is the producer's, and holds for jobs that wait too."""
        if time.monotonic() >= self._next_expiry:
            more = await self._unless_foreign(self._queue.expire_due(), False)
            self._next_expiry = 0.0 if more else time.monotonic() + SWEEP_INTERVAL_S

    async def _adopt(self) -> None:
        """What an operator's command has taken from whoever had it: on start, and now and then."""
        if time.monotonic() >= self._next_adoption:
            num_adopted, more = await self._unless_foreign(self._queue.adopt(), (0, False))
            self._next_adoption = time.monotonic() + (SWEEP_INTERVAL_S if more else ADOPTION_INTERVAL_S)
            if num_adopted:
                self._next_adoption = 0.0
                log_event(logger, logging.WARNING, "entries adopted", entries=num_adopted)

    async def _unless_foreign(self, chore: Awaitable[T], otherwise: T) -> T:
        """A key of another type, which somebody has written, shall not keep us from taking jobs."""
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
        """What was delivered, though the reply was lost. It is ours, room or not."""
        after = None
        while after is None or after:
            entries, after = await self._queue.own_pending(after)
            with self._admission.reserve(len(entries)):
                await self._admit_all(entries)
        self._lost_delivery = False

    async def _take(self) -> bool:
        """Whether anything came. What others left behind comes first: it is mid-sentence, and older."""
        if time.monotonic() >= self._next_sweep:
            self._next_sweep = time.monotonic() + SWEEP_INTERVAL_S
            await self._sweep()
        with self._admission.reserve(self._room) as room:
            if not room:
                return True
            entries = await self._queue.take(room)
            if entries:
                self._admission.served(self.wake)
            await self._admit_all(entries)
            return bool(entries)

    async def _sweep(self) -> None:
        if await self._unless_foreign(self._queue.promote(), False):
            self._next_sweep = 0.0
        lease_s = self._lease_s
        if self._queue.contact.returned(after_s=lease_s / 2, within_s=lease_s / RENEWALS_PER_LEASE):
            # Nobody could renew while the server was away. Whoever still runs its jobs does so as soon as it
            # is back, which must come before we take them for left behind.
            return
        self._queue.look_for_parked()
        with self._admission.reserve(self._room) as room:
            if room:
                entries = await self._queue.claim_idle(lease_s, room)
                if len(entries) == room:
                    self._next_sweep = 0.0
                await self._admit_all(entries)

    async def _admit_surplus(self, entries: list[Entry]) -> None:
        """A waiting read brings up to one of each priority, and others may have taken the room meanwhile."""
        with self._admission.reserve(min(self._room, len(entries))) as room:
            await self._admit_all(entries[:room])
        for surplus in entries[room:]:
            await self._admission.release(self._queue, surplus)

    async def _admit_all(self, entries: list[Entry]) -> None:
        for start in range(0, len(entries), ENTRIES_AT_ONCE):
            admitting = [self._admit(entry) for entry in entries[start : start + ENTRIES_AT_ONCE]]
            # All come to their end, so that none is left half admitted, and then the first error counts.
            for error in filter(None, await asyncio.gather(*admitting, return_exceptions=True)):
                raise error
        await self._queue.tell_parked()

    async def _admit(self, entry: Entry) -> None:
        """Every entry passes here, so a worker that is paused or stopping begins none, nor does one that a
        suspect has to itself: what a lost reply has delivered to another partition is left to others then."""
        if self._admission.holds(entry) or entry == self._suspect:
            return
        if self._admission.stopping or self.paused or self._admission.is_for_one_alone:
            await self._admission.release(self._queue, entry)
        elif not await self._admission.admit(self._queue, entry, self.max_job_bytes):
            await self._keep_suspect(entry)

    async def _keep_suspect(self, entry: Entry) -> None:
        """One at a time, which waits for us to have nothing else to do. Others may have an idle worker."""
        if self._admission.num_suspects:
            await self._admission.release(self._queue, entry)
        else:
            self._suspect = entry
            self._admission.num_suspects += 1

    async def _serve_suspect(self, entry: Entry) -> None:
        """Begin it if the worker has nothing else to do; else keep it until it has."""
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
        """What we have and have not begun, or do not know to have begun."""
        if self._suspect:
            await self._release_suspect()
        if self._lost_delivery:
            await self._admit_lost()
