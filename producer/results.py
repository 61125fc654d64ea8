"""The values that the client returns: chunks, results, and the state of jobs and queues."""

from dataclasses import dataclass, field
from typing import Any

from redis.exceptions import RedisError

from ingine.contract.events import TerminalEvent
from ingine.contract.keys import SILENT_AFTER_S
from ingine.contract.record import JobStatus, read_number, read_status
from ingine.errors import BadRecord, JobCancelled, JobExpired, JobFailed

NO_WORKER = "no worker serves queue %s: jobs wait until one does (start one with `ingine worker`)"


@dataclass(frozen=True, slots=True)
class Chunk:
    """A piece of a job's output."""

    text: str
    """What it adds to the text. May be empty: half characters and possible stop strings are held back."""
    token_ids: list[int]
    """Empty in the last chunk if that only brings text which was held back."""
    position: int
    """Output tokens up to and including this chunk: give it to `attach` or `stream` to go on after it."""
    logprobs: list[dict[str, Any]] | None = None
    """If asked for, one a token: {token_id, logprob, top: [[token_id, logprob], ...], bytes, top_bytes}. The
    bytes, lists of ints, are UTF-8: a character may be several tokens. An older worker gives none."""


@dataclass(frozen=True, slots=True)
class Result:
    """A finished job."""

    job_id: str
    text: str
    token_ids: list[int]
    finish_reason: str
    """`stop` or `length`."""
    usage: dict[str, int]
    """num_prompt_tokens, num_cached_tokens, num_output_tokens."""
    timings: dict[str, float]
    """queue_ms, first_token_ms, total_ms from submission; attempts."""
    metadata: dict[str, Any] | None
    status: JobStatus
    logprobs: list[dict[str, Any]] | None = None


@dataclass(frozen=True, slots=True)
class JobInfo:
    """How a job stands. Times are Unix times in milliseconds by the server's clock, None if not reached."""

    job_id: str
    status: JobStatus
    position: int
    """Output tokens committed."""
    priority: str | None
    worker: str | None
    """Who runs it, or ran it last."""
    attempt: int
    """How often a worker has begun it."""
    deaths: int
    """Workers that died or failed while they ran it."""
    cancel_requested: bool
    reply_to: str | None
    idempotency_key: str | None
    entry: str | None
    """Its id in the jobs stream."""
    submitted_at_ms: int | None
    began_at_ms: int | None
    first_token_at_ms: int | None
    finished_at_ms: int | None
    deadline_at_ms: int | None

    @classmethod
    def from_record(cls, job_id: str, record: dict[bytes, bytes]) -> "JobInfo":
        """From the job's hash, see `ingine/contract/scripts`. Raises BadRecord for what is no record."""
        # Without the job itself, which the record of a delayed one holds: it is no text.
        fields = {name.decode(errors="replace"): value for name, value in record.items() if name != b"raw"}
        texts = {name: value.decode(errors="replace") for name, value in fields.items()}

        def number(name: str) -> int | None:
            return read_number(job_id, name, fields.get(name))

        return cls(
            job_id=job_id,
            status=read_status(job_id, fields["status"]),
            position=number("position") or 0,
            priority=texts.get("priority"),
            worker=texts.get("worker") or None,
            attempt=number("attempt") or 0,
            deaths=number("deaths") or 0,
            cancel_requested=texts.get("cancel") == "1",
            reply_to=texts.get("reply_to") or None,
            idempotency_key=texts.get("idempotency_key") or None,
            entry=texts.get("entry"),
            **{f"{name}_ms": number(name) for name in _TIMES},
        )


_TIMES = ("submitted_at", "began_at", "first_token_at", "finished_at", "deadline_at")


@dataclass(frozen=True, slots=True)
class QueuedJob:
    """A job that waits or runs, as `jobs` lists it."""

    job_id: str | None
    """None if it cannot be read: a worker will bury it."""
    status: JobStatus
    """`queued`, `delayed` or `running`."""
    priority: str
    tenant: str | None
    submitted_at_ms: int | None
    """Unix time in milliseconds by the server's clock."""
    age_s: float
    """Since then."""
    entry: str | None
    """Its id in the jobs stream. None while it is delayed."""
    num_bytes: int
    worker: str | None
    """Who runs it."""


@dataclass(frozen=True, slots=True)
class QueueInfo:
    """How a queue stands."""

    queue: str
    waiting: dict[str, int]
    """Jobs that no worker has, by priority."""
    running: dict[str, int]
    """Jobs that a worker has, by priority."""
    num_delayed: int
    """Jobs whose time has not come."""
    num_bytes: int
    """Of the submitted jobs that wait or run."""
    num_partitions: int
    """The limits hold for each of them by itself."""
    max_jobs: int
    """`submit` raises QueueFull at so many jobs, delayed, waiting and running together."""
    max_bytes: int
    """Likewise at so many bytes."""
    max_job_bytes: int
    max_jobs_per_s: float | None
    """Of each tenant: `submit` raises RateLimited. None: no limit."""
    weights: dict[str, float]
    """Tenant -> its share of the work while others wait too; 1 for those not named."""
    paused: bool
    draining: list[str]
    """Workers that were told to drain."""
    workers: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Worker id -> its last heartbeat, and `silent_s` since then; one that lives beats each second. Its
    `state` is `silent` after 5 s without one, and `lost` after 30 s."""
    num_dead: int = 0
    """Dead letters."""

    @property
    def num_serving(self) -> int:
        """Workers whose last heartbeat is 5 s old at most, and that are not draining."""
        return sum(map(is_serving, self.workers.values()))


@dataclass(frozen=True, slots=True)
class DeadLetter:
    """An entry that no worker could answer."""

    entry_id: str
    """Its place among the dead letters; what `requeue` and `purge` want. Begins with `PARTITION:` where the
    queue has several."""
    job: bytes
    """As it was sent."""
    job_id: str | None
    """None if not even that can be read."""
    code: str
    reason: str
    stream: str
    """The jobs stream that it came from."""
    entry: str
    """Its id there; begins with the time of its submission in Unix milliseconds."""
    deliveries: int
    worker: str


def is_serving(heartbeat: dict[str, Any]) -> bool:
    """Of a worker, as in `QueueInfo.workers`."""
    return heartbeat["silent_s"] <= SILENT_AFTER_S and heartbeat.get("state") != "draining"


def raise_unless_finished(end: TerminalEvent) -> None:
    """Raises JobFailed, JobCancelled or JobExpired."""
    error = end.error or {}
    reason = error.get("message") or "no reason was given"
    match end.status:
        case JobStatus.FAILED:
            raise JobFailed(f"job {end.job_id} failed: {reason}", code=str(error.get("code", "engine_error")))
        case JobStatus.CANCELLED:
            raise JobCancelled(f"job {end.job_id} was cancelled after {end.position} tokens")
        case JobStatus.EXPIRED:
            raise JobExpired(f"job {end.job_id} expired after {end.position} tokens: its deadline passed")


def of_another_type(job_id: str, error: Exception | None) -> BadRecord | None:
    """What it means for a job that the server says so; None if it says something else."""
    if isinstance(error, RedisError) and str(error).startswith("WRONGTYPE"):
        return BadRecord(f"a key of job {job_id} is of another type: somebody has written it ({error})")
    return None
