"""Reads of token logs, for all of a client's streams on one server together."""

import asyncio
import random
from collections import defaultdict, deque
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import TypeVar

from redis import exceptions

from ingine.connect.server_errors import is_lacking, is_refusal
from ingine.contract.events import UNREADABLE, Event, TerminalEvent, decode_log
from ingine.contract.expiry import expire
from ingine.contract.jobs import DEFAULT_RESULT_TTL_S
from ingine.contract.keys import Keys, log_id
from ingine.contract.record import JobStatus, read_any_status, read_number
from ingine.errors import BadRecord, ClientError, ServerUnavailable
from ingine.producer.connection import Server
from ingine.producer.home import end_tasks, is_cancelled
from ingine.producer.results import of_another_type

T = TypeVar("T")
READS_PER_TRIP = 128
ENTRIES_PER_READ = 256
GIVE_UP_S = 30.0
"""How long streams wait for a server that is away."""
_FIELDS = ("status", "position", "deadline_at")
ENDS = frozenset(status for status in JobStatus if status.terminal)
_GOING_ON = frozenset(JobStatus) - ENDS


@dataclass(frozen=True, slots=True)
class LogPage:
    """The events of a job's log after a position."""

    events: list[Event]
    full: bool
    """True if there may be more events: the page has as many as one read may return."""
    status: JobStatus | str | None = None
    """None if the job has no record, or it was not read. A plain `str` is a status of a newer version."""
    committed: int = 0
    """Tokens in the whole log, according to the record."""
    overdue: bool = False
    """True if the job has not ended, and its deadline has passed by the server's clock."""

    @property
    def has_ended(self) -> bool:
        """True if the record says so, or has a status of a newer version: there may be no more events."""
        return self.status is not None and self.status not in _GOING_ON

    @property
    def has_end(self) -> bool:
        """True if the page has the terminal event."""
        return bool(self.events) and isinstance(self.events[-1], TerminalEvent)


@dataclass(frozen=True, slots=True, eq=False)
class _Request:
    keys: Keys
    job_id: str
    position: int
    with_record: bool
    answer: asyncio.Future

    @property
    def log(self) -> str:
        return self.keys.tokens(self.job_id)

    @property
    def record(self) -> str:
        return self.keys.job(self.job_id)


class Retry:
    """Repeats a call while its server is away, for GIVE_UP_S at most."""

    def __init__(self):
        self.ended = False
        """Once set, a failed call is not repeated."""

    async def __call__(self, call: Callable[[], Awaitable[T]]) -> T:
        """Return what `call` does. Raises its error if that is a refusal, or after GIVE_UP_S."""
        clock = asyncio.get_running_loop().time
        began, before = clock(), asyncio.current_task().cancelling()
        while True:
            try:
                return await call()
            except (exceptions.RedisError, ServerUnavailable) as error:
                if not _is_away(error) or self.ended or is_cancelled(before) or clock() - began >= GIVE_UP_S:
                    raise
                await asyncio.sleep(random.uniform(0.1, 0.5))


def _is_away(error: exceptions.RedisError | ServerUnavailable) -> bool:
    cause = error.__cause__ if isinstance(error, ServerUnavailable) else error
    return isinstance(cause, exceptions.ConnectionError | exceptions.TimeoutError) and not is_refusal(cause)


class LogReader:
    """Reads logs on one server. Requests that arrive during a round trip share the next one."""

    def __init__(self, server: Server):
        self._server = server
        self._waiting: deque[_Request] = deque()
        self._under_way: list[_Request] = []
        self._runner: asyncio.Task | None = None
        self._retry = Retry()
        self._closed = False

    async def read(self, keys: Keys, job_id: str, position: int, *, with_record: bool) -> LogPage:
        """Read the log of a job after `position`.

        with_record: read the job's record, too, after its log, and expire the job if it is overdue.
        Raises ServerUnavailable after GIVE_UP_S without a server, and BadRecord for a log or a record that no
        worker wrote.
        """
        if self._closed:
            raise ClientError("the client is closed")
        answer = asyncio.get_running_loop().create_future()
        self._waiting.append(_Request(keys, job_id, position, with_record, answer))
        if self._runner is None or self._runner.done():
            self._runner = asyncio.create_task(self._run())
        return await answer

    async def aclose(self) -> None:
        self._closed = True
        if self._runner:
            await end_tasks([self._runner])
        for request in (*self._under_way, *self._waiting):
            if not request.answer.done():
                request.answer.set_exception(ClientError("the client is closed"))

    async def _run(self) -> None:
        while self._waiting:
            self._under_way = [
                self._waiting.popleft() for _ in range(min(READS_PER_TRIP, len(self._waiting)))
            ]
            try:
                trip = partial(self._fetch, self._under_way)
                answers = await self._retry(partial(self._server.in_time, trip, GIVE_UP_S))
            except Exception as error:  # whatever it is, no stream may wait for ever
                if isinstance(error, exceptions.RedisError):
                    self._under_way += self._waiting  # later requests would fail the same way
                    self._waiting.clear()
                answers = [error] * len(self._under_way)
            for request, answer in zip(self._under_way, answers, strict=True):
                if not request.answer.done():  # else its stream has gone
                    self._answer(request, answer)

    def _answer(self, request: _Request, answer: LogPage | Exception) -> None:
        """Resolve one request. Never raises, or the requests after this one would wait for ever."""
        if isinstance(answer, exceptions.RedisError):
            try:
                answer = of_another_type(request.job_id, answer) or self._server.unavailable(answer)
            except Exception as error:
                answer = error
        if isinstance(answer, Exception):
            request.answer.set_exception(answer)
        else:
            request.answer.set_result(answer)

    async def _fetch(self, requests: list[_Request]) -> list[LogPage | Exception]:
        try:
            pages = await self._fetch_together(requests)
        except exceptions.ResponseError as error:
            if is_lacking(error):
                raise
            # One of the keys is not a log, or may not be read: only its own stream shall fail.
            pages = await self._fetch_each(requests)
        return await self._without_overdue(requests, pages)

    async def _fetch_together(self, requests: list[_Request]) -> list[LogPage | Exception]:
        """Read all logs with one command. Raises ResponseError if the server refuses any of them."""
        pipeline = self._server.redis.pipeline(transaction=False)
        groups = _groups(requests)
        for group in groups:
            after = {log: log_id(request.position) for log, request in group.items()}
            pipeline.xread(after, count=ENTRIES_PER_READ)
        with_record = [request for request in requests if request.with_record]
        for request in with_record:
            pipeline.hmget(request.record, *_FIELDS)
        if with_record:
            pipeline.time()
        answers = await pipeline.execute()
        now_ms = answers.pop()[0] * 1000 if with_record else 0
        records = dict(zip(with_record, answers[len(groups) :], strict=True))
        entries: dict[_Request, list] = {}
        for group, answer in zip(groups, answers, strict=False):
            of_log = by_stream(answer)
            entries |= {request: of_log.get(log.encode(), ()) for log, request in group.items()}
        return [_page(request, entries[request], records.get(request), now_ms) for request in requests]

    async def _fetch_each(self, requests: list[_Request]) -> list[LogPage | Exception]:
        """Read each log with a command of its own."""
        pipeline = self._server.redis.pipeline(transaction=False)
        for request in requests:
            pipeline.xrange(request.log, min=f"({log_id(request.position)}", count=ENTRIES_PER_READ)
            pipeline.hmget(request.record, *_FIELDS)
        pipeline.time()
        *logs_and_records, time = await pipeline.execute(raise_on_error=False)
        now_ms = 0 if isinstance(time, Exception) else time[0] * 1000
        answers = iter(logs_and_records)
        return [_page(request, next(answers), next(answers), now_ms) for request in requests]

    async def _without_overdue(
        self, requests: list[_Request], pages: list[LogPage | Exception]
    ) -> list[LogPage | Exception]:
        """Expire the overdue jobs that no worker runs. Marks their pages `full`, since an event was added."""
        overdue: dict[Keys, list[str]] = defaultdict(list)
        for request, page in zip(requests, pages, strict=True):
            if isinstance(page, LogPage) and page.overdue:
                overdue[request.keys].append(request.job_id)
        answers: dict[tuple[Keys, str], str] = {}
        for keys, job_ids in overdue.items():
            with suppress(exceptions.ResponseError):  # not permitted: a worker will do it
                ends = await expire(self._server.redis, keys, job_ids, result_ttl_s=DEFAULT_RESULT_TTL_S)
                answers |= {(keys, job_id): answer for job_id, answer in ends.items()}
        return [
            replace(page, full=True) if answers.get((request.keys, request.job_id)) in ENDS else page
            for request, page in zip(requests, pages, strict=True)
        ]


def _groups(requests: list[_Request]) -> list[dict[str, _Request]]:
    """Group requests by log, so that no group has a log twice: one XREAD can name a stream only once.

    In a cluster a client serves one slot, so all keys of a group are in the same slot.
    """
    groups: list[dict[str, _Request]] = []
    for request in requests:
        log = request.log
        group = next((group for group in groups if log not in group), None)
        if group is None:
            groups.append(group := {})
        group[log] = request
    return groups


def by_stream(answer) -> dict[bytes, list]:
    """The entries of each stream in an XREAD answer, whose shape in redis-py depends on the RESP version."""
    if isinstance(answer, dict):
        return {stream: entries for stream, (entries,) in answer.items()}
    return dict(answer)


def _page(request: _Request, entries, record, now_ms: int) -> LogPage | Exception:
    """Build the page from the answers to one request. Errors are returned: they concern one stream alone."""
    for answer in (entries, record):
        if isinstance(answer, exceptions.RedisError):
            return answer
    job_id = request.job_id
    status, position, deadline_at = record or (None, None, None)
    try:
        events = decode_log(job_id, request.position, entries)
    except UNREADABLE as error:
        return BadRecord(f"the token log of job {job_id} is not what a worker writes: {str(error)[:200]}")
    try:
        status = read_any_status(job_id, status) if status else None
        deadline_at = read_number(job_id, "deadline_at", deadline_at)
        return LogPage(
            events=events,
            full=len(entries) == ENTRIES_PER_READ,
            status=status,
            committed=read_number(job_id, "position", position) or 0,
            overdue=deadline_at is not None and deadline_at <= now_ms and status in _GOING_ON,
        )
    except ClientError as error:
        return error
