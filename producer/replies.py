"""Replies streams: the ends of the jobs that name one, for a consumer of many jobs that streams none."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from redis.asyncio import ConnectionPool, Redis
from redis.exceptions import RedisError

from ingine.contract.events import UNREADABLE, decode_event
from ingine.contract.expiry import expire_due
from ingine.contract.jobs import DEFAULT_RESULT_TTL_S
from ingine.contract.keys import EVENT_FIELD, Keys
from ingine.contract.record import JobStatus, unknown_status
from ingine.errors import BadRecord, ClientError, InvalidArgument, UnknownStatus
from ingine.producer.arguments import ENTRY_ID
from ingine.producer.connection import Server
from ingine.producer.home import Home, end_tasks
from ingine.producer.partitions import Partition, Partitions
from ingine.producer.token_log import Retry, by_stream

BLOCK_MS = 2000
ENTRIES_PER_READ = 256
MANY = 1 << 31
"""Limit of connections, one for each followed stream: redis-py requires a limit."""


@dataclass(frozen=True, slots=True)
class Reply:
    """The end of one job. `attach(job_id).result()` returns its output."""

    job_id: str
    status: JobStatus
    finish_reason: str | None
    """stop, tool_calls, length, abort or error."""
    error: dict[str, Any] | None
    """{code, message} where status is failed or expired."""
    usage: dict[str, int]
    metadata: dict[str, Any] | None
    position: str
    """Pass it to `replies` to continue after this reply."""
    stop_reason: int | str | None = None
    """The stop string or the id of the stop token that ended the output; None for any other end, and for a
    job of several choices.
    """


class _Positions:
    """A follower's position in the replies stream of each partition: the id of the last entry it received.

    As text, in `Reply.position`, it is those ids in partition order, joined by commas.
    """

    def __init__(self, text: str, num_partitions: int):
        """text: '' for the beginning. Raises InvalidArgument if it is not a position in `num_partitions`."""
        self._last_ids = text.split(",") if text else ["0"] * num_partitions
        if not all(ENTRY_ID.fullmatch(last_id) for last_id in self._last_ids):
            raise InvalidArgument(f"position must be one that a reply has, not {text[:100]!r}")
        if len(self._last_ids) != num_partitions:
            raise InvalidArgument(
                f"this position is of {len(self._last_ids)} partitions, and the queue has {num_partitions}"
            )

    def __getitem__(self, partition: int) -> str:
        return self._last_ids[partition]

    def __str__(self) -> str:
        return ",".join(self._last_ids)

    def advance(self, partition: int, entry_id: bytes) -> None:
        self._last_ids[partition] = entry_id.decode()


@dataclass(slots=True)
class _Source:
    """The replies streams of one name on one server. One command reads all of them."""

    server: Server
    keys: list[Keys] = field(default_factory=list)
    """Keys of the partitions there."""
    numbers: dict[bytes, int] = field(default_factory=dict)
    """The number of each stream's partition."""


def _sources(partitions: Sequence[Partition], name: str) -> list[_Source]:
    """One source for each server."""
    sources: dict[Server, _Source] = {}
    for number, partition in enumerate(partitions):
        source = sources.setdefault(partition.server, _Source(partition.server))
        source.keys.append(partition.keys)
        source.numbers[partition.keys.replies(name).encode()] = number
    return list(sources.values())


class Replies:
    """All replies streams that a client follows. Each has a connection of its own to each server."""

    def __init__(self, partitions: Partitions):
        self._partitions = partitions
        self._own: dict[Server, Redis] = {}
        self._reads: set[asyncio.Task] = set()
        self._retry = Retry()
        self._closed = False

    async def follow(self, name: str, position: str) -> AsyncIterator[Reply]:
        """See `AsyncClient.replies`."""
        partitions = await self._retry(self._partitions.latest)
        positions = _Positions(position, len(partitions))
        reads: dict[asyncio.Task, _Source] = {}
        home = Home()
        try:
            for source in _sources(partitions, name):
                reads[self._read(source, positions)] = source
            while True:
                done, _ = await asyncio.wait(reads, return_when=asyncio.FIRST_COMPLETED)
                for read in done:
                    source, streams = reads.pop(read), by_stream(self._result(read))
                    if not streams:
                        await _end_overdue(source)
                        await self._check_number(len(partitions))
                    for stream, entries in streams.items():
                        for entry_id, fields in entries:
                            positions.advance(source.numbers[stream], entry_id)
                            yield _reply(fields, str(positions))
                    reads[self._read(source, positions)] = source
        finally:
            if home.is_here():
                await end_tasks(reads)
            else:
                home.call(lambda: [read.cancel() for read in reads])

    async def _check_number(self, number: int) -> None:
        """Raise ClientError if the number of the queue's partitions is no longer `number`."""
        if len(await self._retry(self._partitions.latest)) != number:
            raise ClientError(
                f"queue {self._partitions.queue!r} has another number of partitions now: all "
                "replies of before have been given, begin anew without a position"
            )

    def _read(self, source: _Source, positions: _Positions) -> asyncio.Task:
        """Start one blocking read, which returns entries, or nothing after BLOCK_MS."""
        if self._closed:
            raise ClientError("the client is closed")
        after = {stream: positions[number] for stream, number in source.numbers.items()}
        redis = self._own_client(source.server)
        xread = partial(redis.xread, after, block=BLOCK_MS, count=ENTRIES_PER_READ)
        read = asyncio.create_task(_read_with_retry(source.server, xread))
        self._reads.add(read)
        read.add_done_callback(self._reads.discard)
        return read

    def _own_client(self, server: Server) -> Redis:
        if server not in self._own:
            pool = server.redis.connection_pool
            options = pool.connection_kwargs
            own = ConnectionPool(connection_class=pool.connection_class, max_connections=MANY, **options)
            self._own[server] = Redis.from_pool(own)
        return self._own[server]

    def _result(self, read: asyncio.Task) -> list | dict:
        if self._closed or read.cancelled():
            raise ClientError("the client is closed")
        return read.result()

    async def aclose(self) -> None:
        self._closed = self._retry.ended = True
        await end_tasks(self._reads)
        for redis in self._own.values():
            await redis.aclose()


async def _end_overdue(source: _Source) -> None:
    """Expire overdue jobs that no worker runs, so that they send replies. A later call retries failures."""
    server = source.server
    for keys in source.keys:
        with suppress(ClientError):
            await server.call(partial(expire_due, server.redis, keys, result_ttl_s=DEFAULT_RESULT_TTL_S))


async def _read_with_retry(server: Server, xread: Callable[[], Awaitable[list | dict]]) -> list | dict:
    # Not with `server.call`, which lets a cancelled command run to its end: no other call uses this
    # connection, so its reply need not be read.
    try:
        return await Retry()(xread)
    except RedisError as error:
        raise server.unavailable(error) from error


def _reply(fields: dict[bytes, bytes], position: str) -> Reply:
    try:
        end = decode_event(fields[EVENT_FIELD.encode()])
        if not isinstance(end.status, JobStatus):
            reason = unknown_status(end.job_id, end.status)
            raise UnknownStatus(f"{reason}, or go on behind this reply with the position {position!r}")
        return Reply(
            job_id=end.job_id,
            status=end.status,
            finish_reason=end.finish_reason,
            stop_reason=end.stop_reason,
            error=end.error,
            usage=end.usage,
            metadata=end.metadata,
            position=position,
        )
    except UNREADABLE as error:
        raise BadRecord(
            f"the replies stream has an entry that is no event ({repr(error)[:200]}): "
            f"go on behind it with the position {position!r}"
        ) from None
