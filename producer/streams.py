"""Streams: what a job's consumer gets, in order and exactly once, from a fast lane and a log.

Pub/sub is only the fast lane. It may lose, repeat or delay anything; every rule here leads back to the log:

- a stream reads the log when it starts, and again as soon as its subscription is confirmed, so nothing falls
  between the two. A reconnect subscribes anew, and its confirmations wake every stream the same way;
- a live event that does not start where the stream is, an overflow of what a slow consumer has not read yet,
  or silence, send the stream back to the log;
- what the log has given already is dropped when it comes in live.
"""

import asyncio
import logging
import random
from collections.abc import AsyncIterator
from contextlib import aclosing
from dataclasses import replace
from functools import partial

from ingine.errors import ClientError, JobNotFound, ServerUnavailable
from ingine.keys import Keys
from ingine.wire import Event, JobStatus, TerminalEvent, TokensEvent, decode_event
from producer import arguments
from producer.channels import ChannelHub
from producer.connection import Server
from producer.home import Home
from producer.partitions import Partition, Partitions
from producer.queue_info import num_serving
from producer.results import NO_WORKER
from producer.token_log import UNREADABLE, LogReader, Patience

NO_SUCH_JOB = "no job {}: never submitted, or its result's TTL has passed"
SILENCE_S = 2.0
"""A stream that hears nothing for about this long looks into the log."""
NO_WORKER_AFTER_S = 3.0
"""And after this long, whether there is a worker at all."""
_NOT_ENDED = (JobStatus.QUEUED, JobStatus.RUNNING)

log = logging.getLogger(__name__)


class Streams:
    """All streams of one client: each job's events in order and exactly once."""

    def __init__(self, partitions: Partitions):
        self._partitions = partitions
        self._patience = Patience()
        self._readers: dict[Server, tuple[ChannelHub, LogReader]] = {}
        self._look_at: dict[Keys, float] = {}
        self._told_of: Keys | None = None
        """The partition of which a warning said that no worker serves it."""
        self._closed = False

    async def follow(self, job_id: str, position: int = 0) -> AsyncIterator[Event]:
        """Events after `position`, up to and including the terminal one, which is always the last.

        Raises JobNotFound if there is no record and no log, ServerUnavailable if the server stays away, and
        InvalidArgument for a negative position.
        """
        position = arguments.integer("from_position", position, at_least=0)
        while True:
            partition = await self._patience(lambda: self._partitions.of(job_id))
            try:
                async with aclosing(self._follow(partition, job_id, position)) as events:
                    async for event in events:
                        position = event.position
                        yield event
                return
            except JobNotFound:
                if not await self._patience(partial(self._partitions.moved, job_id, partition)):
                    raise

    def _readers_at(self, server: Server) -> tuple[ChannelHub, LogReader]:
        if self._closed:
            raise ClientError("the client is closed")
        if server not in self._readers:
            self._readers[server] = ChannelHub(server.redis), LogReader(server)
        return self._readers[server]

    async def _follow(self, partition: Partition, job_id: str, position: int) -> AsyncIterator[Event]:
        hub, reader = self._readers_at(partition.server)
        channel, home, clock = partition.keys.channel(job_id), Home(), asyncio.get_running_loop().time
        subscription, heard_at = hub.subscribe(channel), clock()
        try:
            while True:
                if subscription.stale:
                    subscription.stale = False  # before the read: what is published from now on queues up
                    page = await reader.read(partition.keys, job_id, position)
                    events, subscription.stale = page.events, subscription.stale or page.full
                    if not events and page.status is None:
                        raise JobNotFound(NO_SUCH_JOB.format(job_id))
                    if not events and page.status.terminal and page.committed < position:
                        # The caller asked for more than there is: go to where the end is.
                        position, subscription.stale = page.committed, True
                    if not events and page.status in _NOT_ENDED and clock() - heard_at >= NO_WORKER_AFTER_S:
                        await self._look_for_workers(partition)
                elif subscription.events:
                    event = _decode_live(subscription.events.popleft())
                    if event is None or _start(event) > position:
                        subscription.mark_stale()
                        continue
                    events = [event]
                else:
                    await subscription.wait(SILENCE_S * random.uniform(0.75, 1.25))
                    continue
                if events:
                    heard_at = clock()
                for event in events:
                    if isinstance(event, TerminalEvent):
                        yield event
                        return
                    if event.position > position:
                        yield _after(event, position)
                        position = event.position
        finally:
            home.call(partial(hub.unsubscribe, channel, subscription))

    async def _look_for_workers(self, partition: Partition) -> None:
        """Warn once if no worker serves it, and again if that happens another time."""
        now = asyncio.get_running_loop().time()
        if now < self._look_at.get(partition.keys, 0):
            return
        self._look_at[partition.keys] = now + NO_WORKER_AFTER_S
        try:
            number = await partition.call(num_serving)
        except ServerUnavailable:  # it may be away, or refuse to tell us: a stream goes on all the same
            return
        if number:
            self._told_of = None if self._told_of == partition.keys else self._told_of
        elif self._told_of is None:
            self._told_of = partition.keys
            log.warning(NO_WORKER, repr(self._partitions.queue))

    async def aclose(self) -> None:
        self._closed = self._patience.ended = True
        for hub, reader in self._readers.values():
            await hub.aclose()
            await reader.aclose()


def _decode_live(raw: bytes) -> Event | None:
    """None: no event. Anybody can publish anything; that there is something to see is all it means."""
    try:
        return decode_event(raw)
    except UNREADABLE:
        return None


def _start(event: Event) -> int:
    return event.position - len(event.token_ids) if isinstance(event, TokensEvent) else event.position


def _after(event: TokensEvent, position: int) -> TokensEvent:
    """`event` without the tokens up to `position`. Its text is not divisible and stays whole."""
    num_new = event.position - max(position, _start(event))
    logprobs = event.logprobs and event.logprobs[-num_new:]
    return replace(event, token_ids=event.token_ids[-num_new:], logprobs=logprobs)
