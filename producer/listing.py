"""Lists jobs that wait or run, from the streams and records of a queue, in pages of bounded size."""

from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Any

from redis.asyncio import Redis
from redis.exceptions import RedisError

from ingine.contract.jobs import Job, decode_job
from ingine.contract.keys import JOB_FIELD, Keys, Priority
from ingine.contract.record import JobStatus, read_number, read_status
from ingine.errors import ClientError, InvalidArgument, InvalidJob
from ingine.producer import arguments
from ingine.producer.partitions import Partition
from ingine.producer.results import QueuedJob

ENTRIES_PER_PAGE = 64
IDS_PER_PAGE = 1000
WAITING = (JobStatus.QUEUED, JobStatus.DELAYED)
LISTED = (*WAITING, JobStatus.RUNNING)
_FIELDS = ("status", "entry", "submitted_at", "worker", "idempotency_key", "reply_to")


@dataclass(frozen=True, slots=True)
class Wanted:
    """A filter for jobs."""

    statuses: tuple[JobStatus, ...]
    priorities: tuple[Priority, ...]
    tenant: str | None
    older_than_s: float

    @classmethod
    def checked(cls, status: Any, priority: Any, tenant: Any, older_than_s: Any) -> "Wanted":
        """Make a filter from arguments; None matches all. Raises InvalidArgument."""
        return cls(
            statuses=_among("status", LISTED, status),
            priorities=_among("priority", tuple(Priority), priority),
            tenant=None if tenant is None else arguments.text("tenant", tenant),
            older_than_s=0.0 if older_than_s is None else arguments.seconds("older_than_s", older_than_s),
        )

    def match(self, job: QueuedJob) -> bool:
        return (
            job.status in self.statuses
            and job.priority in self.priorities
            and self.tenant in (None, job.tenant)
            and job.age_s >= self.older_than_s
        )


def _among(name: str, known: tuple, value: Any) -> tuple:
    if value is None:
        return known
    if value in known:
        return tuple(one for one in known if one == value)
    raise InvalidArgument(f"{name} is one of {', '.join(known)}, not {value!r}")


@dataclass(frozen=True, slots=True)
class Found:
    """A listed job, with what cancelling it needs."""

    listed: QueuedJob
    job: Job | None
    """None if the entry cannot be decoded."""
    reply_to: str | None
    idempotency_key: str | None
    has_record: bool


async def find_jobs(partition: Partition, wanted: Wanted) -> AsyncIterator[list[Found]]:
    """Yield pages of jobs: first those in streams, by priority and age, then the delayed ones.

    An entry with the id of another job (a duplicate, which a worker will bury) is left out.
    """
    if wanted.statuses != (JobStatus.DELAYED,):
        for priority in wanted.priorities:
            async for entries in _stream_pages(partition, priority):
                page = await _page(partition, [_of_entry(priority, *entry) for entry in entries])
                yield [found for found in page if wanted.match(found.listed)]
    if JobStatus.DELAYED in wanted.statuses:
        job_ids = await _delayed_ids(partition)
        for start in range(0, len(job_ids), ENTRIES_PER_PAGE):
            raws = await _raw_delayed(partition, job_ids[start : start + ENTRIES_PER_PAGE])
            page = await _page(partition, raws)
            yield [found for found in page if wanted.match(found.listed)]


@dataclass(frozen=True, slots=True)
class _Raw:
    job_id: str | None
    priority: Priority | None
    entry: str | None
    raw: bytes
    tenant: str | None

    @property
    def job(self) -> Job | None:
        try:
            return decode_job(self.raw, max_bytes=len(self.raw))
        except InvalidJob:
            return None


async def _stream_pages(partition: Partition, priority: Priority) -> AsyncIterator[list]:
    start = "-"
    while entries := await partition.call(
        lambda redis, keys: redis.xrange(keys.jobs(priority), min=start, count=ENTRIES_PER_PAGE)  # noqa: B023
    ):
        yield entries
        start = f"({entries[-1][0].decode()}"


def _of_entry(priority: Priority, entry: bytes, fields: dict[bytes, bytes]) -> _Raw:
    raw = fields.get(JOB_FIELD.encode(), b"")
    try:
        job_id, tenant = (job := decode_job(raw, max_bytes=len(raw))).id, job.tenant
    except InvalidJob as error:
        job_id, tenant = error.job_id, None
    return _Raw(job_id, priority, entry.decode(), raw, _text(fields.get(b"tenant")) or tenant)


async def _delayed_ids(partition: Partition) -> list[str]:
    """Read all ids up front: cancelling a job changes the ranks of the others."""
    job_ids: list[bytes] = []

    async def read(redis: Redis, keys: Keys) -> list[bytes]:
        return await redis.zrange(keys.delayed, len(job_ids), len(job_ids) + IDS_PER_PAGE - 1)

    while page := await partition.call(read):
        job_ids += page
    return [_text(job_id) for job_id in job_ids]


async def _raw_delayed(partition: Partition, job_ids: Sequence[str]) -> list[_Raw]:
    async def read(redis: Redis, keys: Keys) -> list:
        pipeline = redis.pipeline(transaction=False)
        for job_id in job_ids:
            pipeline.hmget(keys.job(job_id), "raw", "priority", "tenant")
        return await pipeline.execute(raise_on_error=False)

    records = zip(job_ids, await partition.call(read), strict=True)
    return [
        _Raw(job_id, _priority(record[1]), None, record[0] or b"", _text(record[2]))
        for job_id, record in records
        if not isinstance(record, RedisError)
    ]


async def _page(partition: Partition, raws: Sequence[_Raw]) -> list[Found]:
    async def read(redis: Redis, keys: Keys) -> list:
        pipeline = redis.pipeline(transaction=False)
        pipeline.time()
        for raw in raws:
            pipeline.hmget(keys.job(raw.job_id or ""), *_FIELDS)
        return await pipeline.execute(raise_on_error=False)

    (now_s, now_us), *records = await partition.call(read)
    now_ms = now_s * 1000 + now_us // 1000
    found = []
    for raw, record in zip(raws, records, strict=True):
        if not isinstance(record, RedisError) and (one := _found(raw, record, now_ms)):
            found.append(one)
    return found


def _found(raw: _Raw, record: list[bytes | None], now_ms: int) -> Found | None:
    """The job. None if it has ended or been promoted meanwhile, or its record is bad or another job's."""
    status_field, entry, submitted_at, worker, idempotency_key, reply_to = record
    if raw.entry is None and status_field is None:
        return None
    if status_field is not None and raw.entry is not None and _text(entry) != raw.entry:
        return None
    try:
        job_id = raw.job_id or ""  # the id under which its record was read
        status = read_status(job_id, status_field) if status_field else JobStatus.QUEUED
        submitted_at_ms = read_number(job_id, "submitted_at", submitted_at)
    except ClientError:  # one bad record must not end the listing
        return None
    if submitted_at_ms is None and raw.entry is not None:  # a bare XADD may choose its id
        submitted_at_ms = min(int(raw.entry.partition("-")[0]), now_ms)
    job = raw.job
    listed = QueuedJob(
        job_id=raw.job_id,
        status=status,
        priority=str(raw.priority or Priority.NORMAL),
        tenant=raw.tenant or None,
        submitted_at_ms=submitted_at_ms,
        age_s=max(0, now_ms - (submitted_at_ms or now_ms)) / 1000,
        entry=raw.entry,
        num_bytes=len(raw.raw),
        worker=_text(worker) or None if status is JobStatus.RUNNING else None,
    )
    named = _text(reply_to) or (job.reply_to if job else None)
    return Found(listed, job, named, _text(idempotency_key) or None, status_field is not None)


def _priority(field: bytes | None) -> Priority | None:
    text = _text(field)
    return Priority(text) if text in list(Priority) else None


def _text(field: bytes | None) -> str | None:
    return None if field is None else field.decode(errors="replace")
