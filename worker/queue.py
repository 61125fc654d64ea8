"""One queue as its workers see it: typed calls around the scripts in `scripts/`, and the reads beside them.

Nothing here retries. Every call may be made again after an error: that is the scripts' design.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files

import msgpack
from redis.asyncio import Redis
from redis.exceptions import ResponseError

from ingine.wire import (
    EVENT_FIELD,
    GROUP,
    JOB_FIELD,
    Keys,
    Priority,
    TerminalEvent,
    TokensEvent,
    decode_event,
    encode_event,
)

STALE, CANCELLED = -1, -2
"""What `append`, `finish` and `renew` answer instead of a position."""

LOW_FIRST_EVERY = 8
"""Each eighth read asks for low priority first, so that a flood of urgent jobs does not starve it."""

MAX_SCANS = 200
"""Calls of one sweep in one stream, so that a long list of live leases does not hold up the intake."""


def nudge(command: str, **fields) -> bytes:
    """A message for the control channel."""
    return msgpack.packb({"command": command, **fields})


@cache
def script(name: str) -> str:
    return files("worker").joinpath("scripts", f"{name}.lua").read_text()


@dataclass(frozen=True, slots=True)
class Entry:
    """A delivered entry of a jobs stream. Its id is the server's time of submission."""

    priority: Priority
    id: str
    raw: bytes


@dataclass(frozen=True, slots=True)
class Begun:
    """What `begin` answers. Times are the server's, in ms since 1970."""

    verdict: str
    attempt: int = 0
    position: int = 0
    deaths: int = 0
    cancelled: bool = False
    now: int = 0
    submitted_at: int = 0
    first_token_at: int = 0


@dataclass(frozen=True, slots=True)
class Append:
    job_id: str
    attempt: int
    event: TokensEvent
    publish: bool


@dataclass(frozen=True, slots=True)
class Finish:
    entry: Entry
    attempt: int
    event: TerminalEvent
    reply_to: str | None


class Queue:
    def __init__(self, keys: Keys, worker_id: str, redis: Redis, blocking: Redis, *, result_ttl_s: float):
        self.keys = keys
        self.worker_id = worker_id
        self._redis = redis
        self._blocking = blocking
        self._result_ttl_ms = int(result_ttl_s * 1000)
        self._scripts = {
            name: redis.register_script(script(name))
            for name in ("begin", "append", "finish", "release", "bury")
        }
        self._num_reads = itertools.count(1)
        self._cursors = dict.fromkeys(Priority, "0-0")

    # ------------------------------------------------------------------------------------ intake

    async def create_groups(self) -> None:
        """From 0, so that what was queued before the first worker is seen too."""
        for stream in self.keys.all_jobs:
            try:
                await self._redis.xgroup_create(stream, GROUP, id="0", mkstream=True)
            except ResponseError as error:
                if "BUSYGROUP" not in str(error):
                    raise

    async def read_new(self, count: int) -> list[Entry]:
        """Up to `count` entries that no worker has seen, most urgent first. Does not wait."""
        order = list(Priority)
        if next(self._num_reads) % LOW_FIRST_EVERY == 0:
            order.reverse()
        entries: list[Entry] = []
        for priority in order:
            if len(entries) < count:
                entries += await self._read(self._redis, [priority], ">", count=count - len(entries))
        return entries

    async def wait_for_new(self, timeout_s: float) -> list[Entry]:
        """Waits until there is something new, and takes at most one entry of each priority."""
        return await self._read(self._blocking, list(Priority), ">", count=1, block=int(timeout_s * 1000))

    async def read_own_pending(self) -> list[Entry]:
        """What was delivered to us already, among it entries whose delivery was lost with a connection."""
        return await self._read(self._redis, list(Priority), "0", count=None)

    async def claim_idle(self, min_idle_s: float, count: int) -> list[Entry]:
        """Up to `count` entries whose holders were silent for `min_idle_s`, or have released them.

        The cursor is kept from call to call, so a wall of live leases at a stream's front hides nothing.
        """
        entries: list[Entry] = []
        for priority in Priority:
            if len(entries) < count:
                entries += await self._claim(priority, int(min_idle_s * 1000), count - len(entries))
        return entries

    async def _claim(self, priority: Priority, min_idle_ms: int, count: int) -> list[Entry]:
        """One call looks at ten entries for each it may claim; so look on until one is found, or the end."""
        for _ in range(MAX_SCANS):
            cursor, claimed, *_ = await self._redis.xautoclaim(
                self.keys.jobs(priority),
                GROUP,
                self.worker_id,
                min_idle_ms,
                start_id=self._cursors[priority],
                count=count,
            )
            self._cursors[priority] = cursor
            if claimed or cursor == b"0-0":
                break
        return self._entries(priority, claimed)

    async def _read(self, redis: Redis, priorities: list[Priority], after: str, **options) -> list[Entry]:
        streams = {self.keys.jobs(priority): after for priority in priorities}
        try:
            replies = await redis.xreadgroup(GROUP, self.worker_id, streams, **options)
        except ResponseError as error:
            # The server lost its data, or the stream is new: nothing to read yet, but the group must exist.
            if not str(error).startswith("NOGROUP"):
                raise
            await self.create_groups()
            return []
        by_stream = {self.keys.jobs(priority).encode(): priority for priority in priorities}
        return [
            entry for stream, entries in replies or [] for entry in self._entries(by_stream[stream], entries)
        ]

    @staticmethod
    def _entries(priority: Priority, replies) -> list[Entry]:
        # An entry that was deleted while pending comes without fields. One with a foreign field is
        # delivered with no bytes, which is no msgpack: it ends in the dead letters.
        return [
            Entry(priority, entry_id.decode(), fields.get(JOB_FIELD.encode(), b""))
            for entry_id, fields in replies
            if fields
        ]

    # ----------------------------------------------------------------------------------- scripts

    async def begin(self, entry: Entry, job_id: str, reply_to: str | None) -> Begun:
        verdict, *fields = await self._scripts["begin"](
            keys=[self.keys.jobs(entry.priority), self.keys.job(job_id)],
            args=[GROUP, self.worker_id, entry.id, entry.priority, reply_to or ""],
        )
        if not fields:
            return Begun(verdict.decode())
        attempt, position, deaths, cancel, now, submitted_at, first_token_at = fields
        return Begun("run", attempt, position, deaths, bool(cancel), now, submitted_at, first_token_at)

    async def append(self, appends: Sequence[Append]) -> list[int]:
        """Commit a step's tokens in one call. A position, STALE or CANCELLED for each, see append.lua."""
        keys, args = [], [self.worker_id]
        for append in appends:
            event = append.event
            keys += [self.keys.job(append.job_id), self.keys.tokens(append.job_id)]
            start = event.position - len(event.token_ids)
            channel = self.keys.channel(append.job_id) if append.publish else ""
            args += [append.attempt, start, event.position, encode_event(event), channel]
        return await self._scripts["append"](keys=keys, args=args)

    async def finish(self, finish: Finish) -> int:
        """End a job. A position or STALE, see finish.lua."""
        event, stream = finish.event, self.keys.jobs(finish.entry.priority)
        keys = [stream, self.keys.job(event.job_id), self.keys.tokens(event.job_id)]
        if finish.reply_to:
            keys.append(self.keys.replies(finish.reply_to))
        return await self._scripts["finish"](
            keys=keys,
            args=[
                GROUP,
                finish.entry.id,
                finish.attempt,
                event.position,
                event.status,
                encode_event(event),
                self.keys.channel(event.job_id),
                self._result_ttl_ms,
                int(finish.reply_to is not None),
                self.worker_id,
            ],
        )

    async def release(self, entry: Entry, job_id: str, attempt: int, *, died: bool = False) -> bool:
        """Hand a job over. With attempt 0: an entry that was delivered but never begun."""
        return bool(
            await self._scripts["release"](
                keys=[self.keys.jobs(entry.priority), self.keys.job(job_id)],
                args=[GROUP, self.worker_id, entry.id, attempt, int(died)],
            )
        )

    async def tell_released(self) -> None:
        """Spare the peers waiting for their next sweep."""
        await self._redis.publish(self.keys.control, nudge("released"))

    async def bury(self, entry: Entry, code: str, reason: str) -> bool:
        return bool(
            await self._scripts["bury"](
                keys=[self.keys.jobs(entry.priority), self.keys.dead],
                args=[GROUP, self.worker_id, entry.id, entry.raw, code, reason],
            )
        )

    # ------------------------------------------------------------------------------------- reads

    async def committed(self, job_id: str) -> list[int]:
        """The output token ids in a job's log. Read after `begin`: from then on nobody else can write."""
        entries = await self._redis.xrange(self.keys.tokens(job_id))
        events = [decode_event(fields[EVENT_FIELD.encode()]) for _, fields in entries]
        return [token_id for event in events for token_id in event.token_ids]

    async def is_cancelled(self, job_id: str) -> bool:
        return await self._redis.hget(self.keys.job(job_id), "cancel") == b"1"
