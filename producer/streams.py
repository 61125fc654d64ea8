"""Streams: the events of a job for its consumer, in order and exactly once. All of them come from the log.

The job's channel only wakes a stream. Any client may publish there, and pub/sub loses, repeats and delays:

- a stream reads the log when it starts, and again as soon as its subscription is confirmed, so nothing falls
  between the two. A reconnect subscribes again, and its confirmations wake every stream in the same way;
- a message makes the stream read the log if it says that the log goes further than the stream has read;
- silence makes it read the log too, and then also the job's record: whether the job exists, and has ended;
- reads that bring nothing are spaced out, so a flood of messages does not become a flood of reads.
"""

import asyncio
import logging
import random
from collections.abc import AsyncIterator
from contextlib import aclosing
from functools import partial

from ingine.contract.events import Event, TerminalEvent, TokensEvent
from ingine.contract.keys import Keys
from ingine.contract.record import JobStatus, unknown_status
from ingine.errors import BadRecord, ClientError, JobNotFound
from ingine.producer import arguments
from ingine.producer.channels import ChannelHub, Subscription
from ingine.producer.choices import LogWentBack, YieldedChoices
from ingine.producer.connection import Server
from ingine.producer.home import Home
from ingine.producer.partitions import MAX_MOVES, Partition, Partitions
from ingine.producer.queue_info import num_serving
from ingine.producer.results import NO_WORKER
from ingine.producer.token_log import LogPage, LogReader, Retry

NO_SUCH_JOB = "no job {}: never submitted, or its result's TTL has passed"
SILENCE_S = 2.0
"""A stream that receives nothing for about this long reads the log."""
NO_WORKER_AFTER_S = 3.0
"""A stream that receives nothing for this long checks whether any worker serves its partition."""
FIRST_SPACING_S, LONGEST_SPACING_S = 0.001, 0.1
"""Time between the starts of two reads of one log after a read that brought nothing; doubles each time."""
MAX_READS = 10
"""How often a stream reads a log from its first event again, after the server has lost some of it."""
_NOT_ENDED = (JobStatus.QUEUED, JobStatus.RUNNING)

log = logging.getLogger(__name__)


class Streams:
    """All streams of one client: each job's events in order and exactly once."""

    def __init__(self, partitions: Partitions):
        self._partitions = partitions
        self._retry = Retry()
        self._readers: dict[Server, tuple[ChannelHub, LogReader]] = {}
        self._look_at: dict[Keys, float] = {}
        self._unserved: Keys | None = None
        """The partition that the last warning named as served by no worker."""
        self._closed = False

    async def follow(self, job_id: str, position: int = 0, *, at_end: bool = False) -> AsyncIterator[Event]:
        """Yield the events after `position`, up to and including the terminal one, which is always the last.

        at_end: the caller wants the whole output at the end, so published tokens cause no read. Raises
        LogWentBack where the joined text of the events would differ from that of the log.

        Raises JobNotFound if there is no record and no log, BadRecord for a log or a record that no worker
        wrote, UnknownStatus for an end that only a newer version understands, ServerUnavailable if the server
        stays away, and InvalidArgument for a negative position.
        """
        position = arguments.integer("from_position", position, at_least=0)
        choices = YieldedChoices(position)
        num_moves = 0  # since the last event
        while num_moves < MAX_MOVES:
            partition = await self._retry(lambda: self._partitions.of(job_id))
            try:
                async with aclosing(self._follow(partition, job_id, position, choices, at_end)) as events:
                    async for event in events:
                        position, num_moves = event.position, 0
                        yield event
                return
            except JobNotFound:
                if not await self._retry(partial(self._partitions.moved, job_id, partition)):
                    raise
            choices.moved()
            num_moves += 1
        raise self._partitions.unsettled()

    def _readers_at(self, server: Server) -> tuple[ChannelHub, LogReader]:
        if self._closed:
            raise ClientError("the client is closed")
        if server not in self._readers:
            self._readers[server] = ChannelHub(server.redis), LogReader(server)
        return self._readers[server]

    async def _follow(
        self, partition: Partition, job_id: str, position: int, choices: YieldedChoices, at_end: bool
    ) -> AsyncIterator[Event]:
        hub, reader = self._readers_at(partition.server)
        channel, home = partition.keys.channel(job_id), Home()
        subscription = hub.subscribe(channel, ends_only=at_end)
        reads, lacked, went_back = _ReadTimer(subscription), False, False
        num_read_again = 0
        try:
            while True:
                with_record = await reads.next()
                page = await reader.read(partition.keys, job_id, position, with_record=with_record)
                for event in page.events:
                    if went_back and isinstance(event, TokensEvent):
                        raise BadRecord(
                            f"the record of job {job_id} says that it has ended after {position} tokens, "
                            f"and its log goes on to {event.position}"
                        )
                    if at_end and event.start < position:
                        raise LogWentBack
                    if isinstance(event, TokensEvent):
                        if choices.needs_start(event):
                            choices.read_again()
                            position = 0
                            subscription.mark_stale()
                            break
                        try:
                            part = choices.new_part(event, position)
                        except LogWentBack as error:
                            num_read_again += 1
                            if at_end:
                                raise
                            if num_read_again > MAX_READS:
                                raise BadRecord(f"the log of job {job_id} has changed: {error}") from None
                            choices.read_again()
                            position = 0
                            subscription.mark_stale()
                            break
                        position = event.position
                        if part is not None:
                            yield part
                    elif with_record:  # else it is read once more, with the record
                        _check_end(event, page)
                        yield event
                        return
                reads.done(position, page, with_record=with_record)
                if page.events:
                    lacked = False
                elif with_record:
                    if page.has_ended and page.committed < position:
                        # The caller's position is beyond the log, or the server has lost tokens that the
                        # caller has seen. Only the terminal event may follow.
                        position, went_back = page.committed, True
                    lacked = _check_record(job_id, position, page, lacked=lacked)
                    if lacked:
                        subscription.mark_stale()
                    elif page.status in _NOT_ENDED and reads.silent_s >= NO_WORKER_AFTER_S:
                        await self._look_for_workers(partition)
        finally:
            home.call(partial(hub.unsubscribe, channel, subscription))

    async def _look_for_workers(self, partition: Partition) -> None:
        """Warn if no worker serves the partition. The next warning comes once a worker has served it."""
        now = asyncio.get_running_loop().time()
        if now < self._look_at.get(partition.keys, 0):
            return
        self._look_at[partition.keys] = now + NO_WORKER_AFTER_S
        try:
            number = await partition.call(num_serving)
        except ClientError:  # the server is away, or refuses the command: the stream goes on all the same
            return
        if number:
            self._unserved = None if self._unserved == partition.keys else self._unserved
        elif self._unserved is None:
            self._unserved = partition.keys
            log.warning(NO_WORKER, repr(self._partitions.queue))

    async def aclose(self) -> None:
        self._closed = self._retry.ended = True
        for hub, reader in self._readers.values():
            await hub.aclose()
            await reader.aclose()


class _ReadTimer:
    """Decides when a stream reads its job's log, and whether it reads the job's record too."""

    def __init__(self, subscription: Subscription):
        self._subscription = subscription
        self._clock = asyncio.get_running_loop().time
        self._fruitless = 0
        self._began_at = self._record_at = 0.0
        self._heard_at = self._clock()

    async def next(self) -> bool:
        """Wait until there may be something to read. Returns True if the record is to be read, too."""
        if self._fruitless:
            spacing_s = min(FIRST_SPACING_S * 2**self._fruitless, LONGEST_SPACING_S)
            await asyncio.sleep(self._began_at + spacing_s - self._clock())
        await self._subscription.wait(self._record_at)
        self._began_at = self._clock()
        _, may_be_end = self._subscription.heard
        self._subscription.forget()
        return may_be_end or self._began_at >= self._record_at

    def done(self, position: int, page: LogPage, *, with_record: bool) -> None:
        """Note that the log was read, up to `position`."""
        now = self._clock()
        if page.events:
            self._fruitless, self._heard_at = 0, now
        else:
            self._fruitless = min(self._fruitless + 1, 10)
        if page.events or with_record:
            self._record_at = now + SILENCE_S * random.uniform(0.75, 1.25)
        self._subscription.has_read(position)
        if page.full or page.has_end:
            self._subscription.mark_stale()

    @property
    def silent_s(self) -> float:
        """Seconds since the last event."""
        return self._clock() - self._heard_at


def _check_record(job_id: str, position: int, page: LogPage, *, lacked: bool) -> bool:
    """Return True if the log, whose `page` is empty, lacks events that the record says it has.

    The log was read before the record, so the events may have been added in between. If the log `lacked` them
    at the previous read already, they are missing: raises BadRecord. Raises JobNotFound without a record.
    """
    if page.status is None:
        raise JobNotFound(NO_SUCH_JOB.format(job_id))
    lacks = page.has_ended or page.committed > position
    if lacks and lacked:
        _check_status(job_id, page.status)
        raise BadRecord(
            f"the record of job {job_id} says {page.status} after {page.committed} tokens, and its log has "
            f"nothing behind {position}"
        )
    return lacks


def _check_end(end: TerminalEvent, page: LogPage) -> None:
    """Raise BadRecord if the record contradicts the log's end: workers write both in one step."""
    if page.status not in (None, end.status) or (page.status and page.committed != end.position):
        raise BadRecord(
            f"the log of job {end.job_id} ends as {end.status} after {end.position} tokens, and its record "
            f"says {page.status} after {page.committed}"
        )
    _check_status(end.job_id, end.status)


def _check_status(job_id: str, status: JobStatus | str) -> None:
    """Raise UnknownStatus for a status that only a newer version understands."""
    if not isinstance(status, JobStatus):
        raise unknown_status(job_id, status)
