"""Replies streams: how the jobs that named one ended, for whoever waits for many jobs and follows none."""

import asyncio
from collections import defaultdict
from collections.abc import AsyncIterator
from dataclasses import dataclass
from functools import partial
from typing import Any

from ingine.errors import ClientError
from ingine.wire import EVENT_FIELD, JobStatus, decode_event
from producer.connection import Server
from producer.partitions import Partitions
from producer.token_log import UNREADABLE, Patience

BLOCK_MS = 2000
ENTRIES_PER_READ = 256


@dataclass(frozen=True, slots=True)
class Reply:
    """The end of one job. Its output is where it always is: `attach(job_id).result()`."""

    job_id: str
    status: JobStatus
    finish_reason: str | None
    """stop, length, abort or error."""
    error: dict[str, Any] | None
    """{code, message} where status is failed or expired."""
    usage: dict[str, int]
    metadata: dict[str, Any] | None
    position: str
    """Give it to `replies` to go on after this one."""


async def follow_replies(partitions: Partitions, name: str, position: str) -> AsyncIterator[Reply]:
    """See `AsyncClient.replies`."""
    places = await partitions.all()
    last_ids = position.split(",") if position else ["0"] * len(places)
    if len(last_ids) != len(places):
        raise ValueError(f"this position is of {len(last_ids)} partitions, and the queue has {len(places)}")
    numbers: dict[Server, dict[bytes, int]] = defaultdict(dict)
    for number, place in enumerate(places):
        numbers[place.server][place.keys.replies(name).encode()] = number
    arrived: asyncio.Queue[tuple[int, bytes, dict] | Exception] = asyncio.Queue(maxsize=ENTRIES_PER_READ)

    async def read(server: Server, number_of: dict[bytes, int]) -> None:
        patience, after = Patience(), {stream: last_ids[number] for stream, number in number_of.items()}
        try:
            while True:
                xread = partial(server.redis.xread, after, block=BLOCK_MS, count=ENTRIES_PER_READ)
                for stream, entries in await patience(partial(server.call, xread)):
                    for entry_id, fields in entries:
                        await arrived.put((number_of[stream], entry_id, fields))
                        after[stream] = entry_id
        except Exception as error:
            await arrived.put(error)

    readers = [asyncio.create_task(read(*streams)) for streams in numbers.items()]
    try:
        while True:
            arrival = await arrived.get()
            if isinstance(arrival, Exception):
                raise arrival
            number, entry_id, fields = arrival
            last_ids[number] = entry_id.decode()
            yield _reply(fields, ",".join(last_ids))
    finally:
        for reader in readers:
            reader.cancel()
        await asyncio.gather(*readers, return_exceptions=True)


def _reply(fields: dict[bytes, bytes], position: str) -> Reply:
    try:
        end = decode_event(fields[EVENT_FIELD.encode()])
        return Reply(
            job_id=end.job_id,
            status=end.status,
            finish_reason=end.finish_reason,
            error=end.error,
            usage=end.usage,
            metadata=end.metadata,
            position=position,
        )
    except UNREADABLE as error:
        raise ClientError(
            f"the replies stream has an entry before {position} that is no event: {error!r}"
        ) from None
