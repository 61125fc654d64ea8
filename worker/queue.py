"""One partition of a queue as its workers see it: typed calls around `scripts/`, and the reads beside them.

Nothing here retries. Every call may be made again after an error: that is the scripts' design.
"""

import asyncio
import itertools
import logging
import math
from collections.abc import Awaitable, Iterable, Sequence
from dataclasses import replace
from functools import partial

import msgpack
from redis.asyncio import Redis
from redis.exceptions import ResponseError

from ingine.errors import ErrorCode, InvalidRequest
from ingine.expiry import expire_due
from ingine.keys import (
    GROUP,
    PARKED_PREFIX,
    RELEASED,
    WAITING,
    Keys,
    Priority,
    parked,
)
from ingine.scripts import read_script
from ingine.wire import UNREADABLE, decode_log, encode_event
from worker.contact import Contact
from worker.entries import MAX_ENTRY_BYTES, Append, Begun, Entry, Finish, read_entries, read_entry
from worker.logs import log_event
from worker.retry import never_passes
from worker.served_model import ServedModel
from worker.trips import Trips

logger = logging.getLogger(__name__)

LOG_PAGE = 256
"""Entries of a token log that are read at a time."""

LOW_FIRST_EVERY = 8
"""Each eighth read asks for low priority first, so that a flood of urgent jobs does not starve it."""

MAX_ORDERED, MAX_ORDERINGS = 50, 10
"""New entries that one call puts into the fair order, and calls in a row. A script reads whole jobs, which
can be large, while nobody else is served."""

DEFAULT_LEASE_S = 15.0
"""As in `worker.settings`."""

DEFAULT_MAX_COST = 1 << 20
"""Tokens that a job may cost at most: more than models have. A worker says what its engine's longest is."""

LOG_PAGE = 128
"""Events of a log that are read at once: with log probabilities 200 kB, and a log may be a thousand times as
long."""

MAX_PROMOTED = 100
"""Delayed jobs that one sweep looks at."""

SUSPECT_DEATHS = 2
"""A job that as many workers died under runs alone from then on: it shall not take others down with it."""

FIRST_PAUSE_S, LONGEST_PAUSE_S = 1.0, 60.0
"""The pause after a step that failed. It doubles with each death of the job."""


def nudge(command: str, **fields) -> bytes:
    """A message for the control channel."""
    return msgpack.packb({"command": command, **fields})


SCRIPTS = (
    "take",
    "claim",
    "promote",
    "begin",
    "append",
    "finish",
    "release",
    "delay",
    "bury",
    "park",
    "unpark",
    "adopt",
    "renumber",
)


script = partial(read_script, "worker")


class Queue:
    def __init__(
        self,
        keys: Keys,
        worker_id: str,
        redis: Redis,
        model: ServedModel,
        *,
        result_ttl_s: float,
        max_deaths: int,
        model_wait_s: float,
        lease_s: float = DEFAULT_LEASE_S,
        max_cost: int = DEFAULT_MAX_COST,
    ):
        self.keys = keys
        self.worker_id = worker_id
        self.model = model
        self._redis = redis
        self.model_wait_s = model_wait_s
        self._result_ttl_s = result_ttl_s
        self._lease_ms = int(lease_s * 1000)
        self._max_cost = max_cost
        self._served = list(Priority)
        """Those whose jobs stream is one."""
        self._adopt_after = dict.fromkeys(Priority, "")
        self._max_deaths = max_deaths
        self._scripts = {name: redis.register_script(script(name)) for name in SCRIPTS}
        self._trips = Trips(redis)
        self._num_reads = itertools.count(1)
        self.weights: dict[str, float] = {}
        """Of tenants, where they are not 1."""
        self.served_elsewhere: frozenset[str] = frozenset()
        """Names and fingerprints that other workers of the queue serve, or did within `model_wait_s`."""
        self._may_be_parked = set(Priority)
        self._has_parked = False
        self.contact = Contact()

    # ------------------------------------------------------------------------------------ intake

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
        return await self._read_group(">", waits_s=timeout_s, count=1, block=int(timeout_s * 1000))

    async def own_pending(self) -> list[Entry]:
        """What was delivered to us already, among it entries whose delivery was lost with a connection."""
        return await self._read_group("0", count=None)

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

    async def promote(self) -> bool:
        """Put the delayed jobs whose time has come into their streams. Whether there may be more of them."""
        delayed, prefix = self.keys.delayed, self.keys.job("").encode()
        job_ids = await self._redis.zrange(delayed, 0, MAX_PROMOTED - 1)
        if not job_ids:
            return False
        touched = [delayed, *self.keys.all_jobs, *(prefix + job_id for job_id in job_ids)]
        return await self._scripts["promote"](keys=touched, args=job_ids) == MAX_PROMOTED

    async def expire_due(self) -> bool:
        """End what nobody runs and whose deadline has passed. Whether there may be more of it."""
        return await expire_due(self._redis, self.keys, result_ttl_s=self._result_ttl_s)

    async def adopt(self) -> tuple[int, bool]:
        """Find entries that nobody has, in one page of each stream, for `waiting` or `released` to have.

        How many there were, and whether there are pages left.
        """
        if len(self._served) < len(Priority):
            await self.create_groups()
        num_adopted, failed = 0, None
        for priority in self._served:
            if not self._adopt_after[priority]:
                try:
                    await self._renumber(priority)
                except ResponseError as error:  # of the dead letters: no reason to leave the other streams
                    failed = error
            touched = [self.keys.jobs(priority), self.keys.fair(priority)]
            args = [GROUP, self._adopt_after[priority], MAX_ORDERED, WAITING, RELEASED]
            after, number = await self._answered(self._scripts["adopt"](keys=touched, args=args)) or (b"", 0)
            self._adopt_after[priority] = after.decode()
            num_adopted += number
        if failed:
            raise failed
        return num_adopted, any(self._adopt_after.values())

    async def _renumber(self, priority: Priority) -> None:
        """Somebody may have used up the ids of a jobs stream: then nobody can add a job any more."""
        touched = [self.keys.jobs(priority), self.keys.while_renumbered(priority), self.keys.dead]
        num_buried = await self._scripts["renumber"](keys=touched, args=[GROUP, self.worker_id])
        if num_buried >= 0:
            log_event(logger, logging.ERROR, "ids used up", priority=priority, buried=num_buried)

    async def _read_group(self, after: str, *, waits_s: float = 0.0, **options) -> list[Entry]:
        streams = {self.keys.jobs(priority): after for priority in self._served}
        by_stream = {self.keys.jobs(priority).encode(): priority for priority in self._served}
        if not streams:
            await asyncio.sleep(waits_s)
            return []
        reading = self._redis.xreadgroup(GROUP, self.worker_id, streams, **options)
        return [
            read_entry(by_stream[stream], entry_id, fields)
            for stream, entries in await self._answered(reading, waits_s) or []
            for entry_id, fields in entries
            if fields  # without any: deleted while it was pending
        ]

    async def _answered(self, reading: Awaitable[list], waits_s: float = 0.0) -> list | None:
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

    # ----------------------------------------------------------------------------------- scripts

    async def begin(
        self, entry: Entry, job_id: str, reply_to: str | None, *, alone: bool = True, model: str | None = None
    ) -> Begun:
        """alone: we have no other job, so may have one that workers died under.

        model: what the job names.
        """
        only_elsewhere = model in self.served_elsewhere and model not in self.model.names
        verdict, *fields = await self._trips.call(
            self._scripts["begin"],
            keys=[self.keys.jobs(entry.priority), self.keys.job(job_id), self.keys.tokens(job_id)],
            args=[
                GROUP,
                self.worker_id,
                entry.id,
                entry.priority,
                reply_to or "",
                SUSPECT_DEATHS,
                self._max_deaths,
                int(alone),
                self._lease_ms,
                self.model.fingerprint,
                int(entry.abandoned),
                model if only_elsewhere else "",
            ],
        )
        match verdict, fields:
            case b"run", [attempt, position, deaths, cancel, *times, idempotency_key, model]:
                key = _text(idempotency_key) or None
                return Begun("run", attempt, position, deaths, bool(cancel), *times, key, _text(model))
            case b"other_model", [model]:
                return Begun("other_model", fingerprint=_text(model))
        return Begun(verdict.decode())

    async def append(self, appends: Sequence[Append]) -> list[int]:
        """Commit a step's tokens in one call. For each a position, STALE, CANCELLED or BROKEN: append.lua."""
        keys, args = [], [self.worker_id]
        for append in appends:
            keys += [self.keys.job(append.job_id), self.keys.tokens(append.job_id)]
            channel = self.keys.channel(append.job_id) if append.publish else ""
            args += [append.attempt, append.start, append.position, append.raw, channel]
        answers = await self._scripts["append"](keys=keys, args=args)
        self.contact.made()
        return answers

    async def finish(self, finish: Finish) -> int:
        """End a job. A position or STALE, see finish.lua."""
        event, keys = finish.event, self.keys
        stream = keys.jobs(finish.entry.priority)
        touched = [stream, keys.job(event.job_id), keys.tokens(event.job_id), keys.bytes, keys.dead]
        touched += [
            keys.deadlines,
            keys.replies(finish.reply_to or ""),
            keys.idem(finish.idempotency_key or ""),
        ]
        error = (event.error or {}) if finish.bury else {}
        return await self._trips.call(
            self._scripts["finish"],
            keys=touched,
            args=[
                GROUP,
                finish.entry.id,
                finish.attempt,
                event.position,
                event.status,
                encode_event(event),
                keys.channel(event.job_id),
                int(self._result_ttl_s * 1000),
                int(finish.reply_to is not None),
                self.worker_id,
                error.get("code", ""),
                error.get("message", ""),
                event.job_id,
                int(finish.idempotency_key is not None),
            ],
        )

    async def release(self, entry: Entry, job_id: str, attempt: int) -> bool:
        """Hand a job over. With attempt 0: an entry that was delivered to us and does not run here."""
        return bool(
            await self._trips.call(
                self._scripts["release"],
                keys=[self.keys.jobs(entry.priority), self.keys.job(job_id)],
                args=[GROUP, self.worker_id, entry.id, attempt, RELEASED],
            )
        )

    async def park(self, entry: Entry, job_id: str, model: str) -> bool:
        """Leave an entry to the workers of `model`, a name or a fingerprint. `tell_parked` tells them."""
        done = await self._trips.call(
            self._scripts["park"],
            keys=[self.keys.jobs(entry.priority), self.keys.job(job_id)],
            args=[GROUP, self.worker_id, entry.id, parked(model)],
        )
        self._has_parked = self._has_parked or bool(done)
        return bool(done)

    async def tell_parked(self) -> None:
        """Spare workers of other models waiting for their next sweep."""
        if self._has_parked:
            self._has_parked = False
            await self.tell_released()

    async def delay(self, entry: Entry, job_id: str, attempt: int, pause_s: float | None = None) -> bool:
        """Put a begun job off by `pause_s`. None: after a failure, for a pause that grows with each death."""
        died = pause_s is None
        first_s = FIRST_PAUSE_S if died else pause_s
        pauses_ms = [math.ceil(first_s * 1000), int(died), int(LONGEST_PAUSE_S * 1000)]
        return bool(
            await self._trips.call(
                self._scripts["delay"],
                keys=[self.keys.jobs(entry.priority), self.keys.job(job_id), self.keys.delayed],
                args=[GROUP, self.worker_id, entry.id, attempt, job_id, *pauses_ms, RELEASED],
            )
        )

    async def tell_released(self) -> None:
        """Spare the peers waiting for their next sweep."""
        await self._redis.spublish(self.keys.control, nudge("released"))

    async def bury(self, entry: Entry, code: str, reason: str, *, job_id: str | None = None) -> bool:
        """Of an entry that has no job, the dead letter has a msgpack map of its first fields.

        job_id: whose record ends too, if it is this entry's.
        """
        raw = msgpack.packb(dict(entry.foreign)) if entry.foreign else entry.raw
        keys, job_id = self.keys, job_id or ""
        touched = [keys.jobs(entry.priority), keys.dead, keys.job(job_id), keys.tokens(job_id)]
        args = [GROUP, self.worker_id, entry.id, raw, code, reason, job_id, int(self._result_ttl_s * 1000)]
        return bool(await self._scripts["bury"](keys=[*touched, keys.deadlines, keys.bytes], args=args))

    # ------------------------------------------------------------------------------------- reads

    async def committed(self, job_id: str) -> list[int]:
        """The output token ids in a job's log. Read after `begin`: from then on no other worker can write.

        Raises InvalidRequest for a log that is none: whoever goes on behind it would say something else.
        """
        token_ids: list[int] = []
        start = "-"
        while page := await self._redis.xrange(self.keys.tokens(job_id), min=start, count=LOG_PAGE):
            try:
                for event in decode_log(job_id, len(token_ids), page):
                    token_ids += event.token_ids
            except UNREADABLE as error:
                raise InvalidRequest(ErrorCode.BAD_RECORD, f"its token log is none: {error!r}") from None
            start = f"({page[-1][0].decode()}"
        return token_ids

    async def cancelled_among(self, job_ids: Iterable[str]) -> list[str]:
        """Those of `job_ids` whose records say that they are to end."""
        asked = list(job_ids)
        pipe = self._redis.pipeline(transaction=False)
        for job_id in asked:
            pipe.hget(self.keys.job(job_id), "cancel")
        answers = await pipe.execute(raise_on_error=False)
        return [job_id for job_id, answer in zip(asked, answers, strict=True) if answer == b"1"]


def _text(raw: bytes) -> str:
    """From a record, into which anybody may have written anything."""
    return raw.decode(errors="replace")
