"""Reads what a live board shows of a queue: its state, its running jobs, and who the waiting ones belong to.

The work of one read is bounded, whatever the length of the queue. The body of a job, which has its prompt, is
read once, when the job is first listed.
"""

import asyncio
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

from redis.asyncio import Redis
from redis.exceptions import NoPermissionError, RedisError

from ingine.contract.events import UNREADABLE, TokensEvent, decode_log
from ingine.contract.jobs import decode_job
from ingine.contract.keys import GROUP, JOB_FIELD, Keys, Priority, log_id
from ingine.contract.record import JobStatus, read_number
from ingine.errors import ClientError, InvalidJob, ServerUnavailable
from ingine.producer.client import AsyncClient
from ingine.producer.partitions import Partition
from ingine.producer.results import QueueInfo

MAX_WORKERS = 64
"""Workers whose jobs are listed."""
MAX_JOBS = 100
"""Running jobs that are listed, in each partition."""
MAX_SAMPLED, MAX_SAMPLED_BYTES = 200, 1 << 20
"""Waiting jobs whose tenants are counted, of each priority in each partition, and about how many bytes of
jobs are read for that."""
TEXT_TOKENS = 64
"""Tokens of a job's output, the last ones, whose text is read."""
_FIELDS = ("status", "entry", "worker", "attempt", "position", "submitted_at", "began_at", "first_token_at")


@dataclass(frozen=True, slots=True)
class RunningJob:
    """A job that a worker has. Times are Unix times in ms by the server's clock, None if not reached."""

    job_id: str
    priority: str
    tenant: str | None
    worker: str
    attempt: int
    """How often a worker has begun it."""
    position: int
    """Output tokens committed."""
    age_s: float
    """Seconds since it was submitted."""
    submitted_at_ms: int | None
    began_at_ms: int | None
    first_token_at_ms: int | None
    text: str = ""
    """The end of its output, as the model wrote it. Empty unless it was asked for."""


@dataclass(frozen=True, slots=True)
class Snapshot:
    """What one read has found. Its parts are read one after the other, so they may differ by a moment."""

    info: QueueInfo
    jobs: list[RunningJob]
    """By priority and age."""
    refused: str = ""
    """The server's reason, if this user may not read the jobs, which are then absent, or their outputs."""


@dataclass(frozen=True, slots=True)
class _Entry:
    """What a job's entry says, which never changes."""

    job_id: str
    priority: Priority
    tenant: str | None


class QueueWatch:
    """Reads one queue again and again, and remembers the entries of the jobs that were running last."""

    def __init__(self, client: AsyncClient):
        self._client = client
        self._entries: dict[tuple[Keys, str, bytes], _Entry | None] = {}
        """By partition, priority and entry id. None for an entry that is gone or cannot be read."""

    async def read(self, *, with_text: bool) -> Snapshot:
        """Read the queue's state and running jobs. with_text: read the end of each job's output too.

        Raises ServerUnavailable, and ClientError for a setting that is not a number.
        """
        info = await self._client.queue_info()
        partitions, workers = await self._client._partitions.all(), _busiest(info)
        try:
            parts = await asyncio.gather(*(self._running(each, workers) for each in partitions))
        except ServerUnavailable as error:
            return Snapshot(info, [], refused=_refusal(error))
        self._entries = {key: entry for _, entries in parts for key, entry in entries.items()}
        lists, refused = [jobs for jobs, _ in parts], ""
        if with_text:
            try:
                lists = await asyncio.gather(*map(_with_texts, partitions, lists))
            except ServerUnavailable as error:
                refused = _refusal(error)
        return Snapshot(info, sorted((job for jobs in lists for job in jobs), key=_order), refused)

    async def waiting_tenants(self, info: QueueInfo) -> Counter[str]:
        """Count the oldest waiting jobs by tenant; those without a tenant count under ''.

        info: the queue's state, as read before. Raises ServerUnavailable. Without the right to read jobs it
        counts none.
        """
        num_waiting = sum(info.waiting.values())
        if not num_waiting:
            return Counter()
        bytes_per_job = max(1, info.num_bytes // (num_waiting + sum(info.running.values())))
        limit = max(1, min(MAX_SAMPLED, MAX_SAMPLED_BYTES // bytes_per_job))
        try:
            partitions = await self._client._partitions.all()
            parts = await asyncio.gather(*(_waiting(each, _busiest(info), limit) for each in partitions))
        except ServerUnavailable as error:
            _refusal(error)
            return Counter()
        return sum(parts, Counter())

    async def _running(self, partition: Partition, workers: Sequence[str]) -> tuple[list[RunningJob], dict]:
        held = await partition.call(lambda redis, keys: _held(redis, keys, workers)) if workers else []
        listed = [(partition.keys, str(priority), entry) for priority, entry in held][:MAX_JOBS]
        new = [key for key in listed if key not in self._entries]
        found = await partition.call(lambda redis, _: _entries(redis, new)) if new else {}
        entries = {key: found[key] if key in found else self._entries[key] for key in listed}
        known = [(key[2], entry) for key, entry in entries.items() if entry]
        if not known:
            return [], entries
        return await partition.call(lambda redis, keys: _records(redis, keys, known)), entries


def _busiest(info: QueueInfo) -> list[str]:
    """At most MAX_WORKERS workers, first those that hold jobs."""
    return sorted(info.workers, key=lambda worker: not info.workers[worker].get("num_jobs"))[:MAX_WORKERS]


async def _held(redis: Redis, keys: Keys, workers: Sequence[str]) -> list[tuple[Priority, bytes]]:
    """The entries that these workers have, most urgent first."""
    pipeline = redis.pipeline(transaction=False)
    for priority in Priority:
        for worker in workers:
            pipeline.xpending_range(keys.jobs(priority), GROUP, "-", "+", MAX_JOBS, worker)
    answers = iter(await pipeline.execute(raise_on_error=False))
    held = []
    for priority in Priority:
        pending = [one for _ in workers for one in _allowed(next(answers)) or ()]
        held += [(priority, one["message_id"]) for one in sorted(pending, key=_entry_order)]
    return held


async def _entries(redis: Redis, listed: Sequence[tuple[Keys, str, bytes]]) -> dict:
    pipeline = redis.pipeline(transaction=False)
    for keys, priority, entry in listed:
        pipeline.xrange(keys.jobs(priority), min=entry, max=entry)
    answers = await pipeline.execute(raise_on_error=False)
    entries = {}
    for key, answer in zip(listed, map(_allowed, answers), strict=True):
        entries[key] = _entry(Priority(key[1]), answer[0][1]) if answer else None
    return entries


async def _records(redis: Redis, keys: Keys, known: Sequence[tuple[bytes, _Entry]]) -> list[RunningJob]:
    pipeline = redis.pipeline(transaction=False)
    pipeline.time()
    for _, entry in known:
        pipeline.hmget(keys.job(entry.job_id), *_FIELDS)
    time, *records = await pipeline.execute(raise_on_error=False)
    now_s, now_us = _allowed(time) or (0, 0)
    now_ms = now_s * 1000 + now_us // 1000
    jobs = []
    for (entry_id, entry), record in zip(known, map(_allowed, records), strict=True):
        if record and (job := _job(entry_id, entry, record, now_ms)):
            jobs.append(job)
    return jobs


def _job(entry_id: bytes, entry: _Entry, record: list[bytes | None], now_ms: int) -> RunningJob | None:
    """The job; None if it is not running, or if its record is damaged or belongs to another entry."""
    status, its_entry, worker, *fields = record
    if status != JobStatus.RUNNING.encode() or its_entry not in (None, entry_id):
        return None
    try:
        numbers = [
            read_number(entry.job_id, name, raw) for name, raw in zip(_FIELDS[3:], fields, strict=True)
        ]
    except ClientError:
        return None
    attempt, position, submitted_at_ms, began_at_ms, first_token_at_ms = numbers
    return RunningJob(
        job_id=entry.job_id,
        priority=str(entry.priority),
        tenant=entry.tenant,
        worker=(worker or b"?").decode(errors="replace"),
        attempt=attempt or 0,
        position=position or 0,
        age_s=max(0, now_ms - (submitted_at_ms or now_ms)) / 1000,
        submitted_at_ms=submitted_at_ms,
        began_at_ms=began_at_ms,
        first_token_at_ms=first_token_at_ms,
    )


async def _with_texts(partition: Partition, jobs: Sequence[RunningJob]) -> list[RunningJob]:
    async def read(redis: Redis, keys: Keys) -> list:
        pipeline = redis.pipeline(transaction=False)
        for job in jobs:
            start = log_id(max(0, job.position - TEXT_TOKENS))
            pipeline.xrange(keys.tokens(job.job_id), min=f"({start}", count=2 * TEXT_TOKENS)
        return [_allowed(answer) for answer in await pipeline.execute(raise_on_error=False)]

    logs = await partition.call(read) if jobs else []
    return [replace(job, text=_text(job, log or [])) for job, log in zip(jobs, logs, strict=True)]


def _text(job: RunningJob, log: list) -> str:
    """The text of the last events of a log. In a job of several choices, of the choice that grew last."""
    try:
        events = decode_log(job.job_id, max(0, job.position - TEXT_TOKENS), log)
    except UNREADABLE:
        return ""
    grown = [event for event in events if isinstance(event, TokensEvent)]
    return "".join(event.text for event in grown if event.index == grown[-1].index)


async def _waiting(partition: Partition, workers: Sequence[str], limit: int) -> Counter[str]:
    running = set(await partition.call(lambda redis, keys: _held(redis, keys, workers))) if workers else set()

    async def read(redis: Redis, keys: Keys) -> list:
        pipeline = redis.pipeline(transaction=False)
        for priority in Priority:
            num_running = sum(held is priority for held, _ in running)
            pipeline.xrange(keys.jobs(priority), count=limit + num_running)
        return [_allowed(answer) for answer in await pipeline.execute(raise_on_error=False)]

    tenants: Counter[str] = Counter()
    for priority, answer in zip(Priority, await partition.call(read), strict=True):
        for entry_id, fields in answer or ():
            if (priority, entry_id) not in running:
                entry = _entry(priority, fields)
                tenants[(entry and entry.tenant) or ""] += 1
    return tenants


def _entry(priority: Priority, fields: dict[bytes, bytes]) -> _Entry | None:
    raw = fields.get(JOB_FIELD.encode(), b"")
    try:
        job = decode_job(raw, max_bytes=len(raw))
    except InvalidJob:  # a worker will bury it
        return None
    return _Entry(job.id, priority, fields.get(b"tenant", b"").decode(errors="replace") or job.tenant)


def _refusal(error: ServerUnavailable) -> str:
    """The reason if the user lacks a right. Raises any other error."""
    if isinstance(error.__cause__, NoPermissionError):
        return str(error.__cause__)
    raise error


def _allowed(answer):
    """An answer of a pipeline; None for an error that concerns one key. Raises NoPermissionError."""
    if isinstance(answer, NoPermissionError):
        raise answer
    return None if isinstance(answer, RedisError) else answer


def _entry_order(pending: dict) -> tuple[int, ...]:
    return tuple(map(int, pending["message_id"].split(b"-")))


def _order(job: RunningJob) -> tuple:
    return list(Priority).index(Priority(job.priority)), job.submitted_at_ms or 0, job.job_id
