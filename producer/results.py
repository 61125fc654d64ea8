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
    """A part of one choice of a job's output."""

    text: str
    """Text that it adds. It may be empty: half characters and possible stop strings are held back."""
    token_ids: list[int]
    """Empty in the last chunk if that only adds text which was held back."""
    position: int
    """Output tokens, of all choices, up to the end of this chunk. Pass it to `attach` or `stream` to continue
    after it."""
    logprobs: list[dict[str, Any]] | None = None
    """If requested, one a token: {token_id, logprob, rank, top: [[token_id, logprob], ...], bytes,
    decoded_token, top_bytes, top_decoded_tokens}. Bytes are lists of ints, in UTF-8: a character may have
    several tokens. `decoded_token` has U+FFFD for half a character. Older workers send fewer of them."""
    index: int = 0
    """The choice that it belongs to."""
    choice_position: int | None = None
    """Tokens of that choice up to the end of this chunk. None in a job of one choice."""
    finish_reason: str | None = None
    """`stop`, `length` or `tool_calls` if the choice ends with this chunk. None in a job of one choice."""
    prompt_logprobs: list[dict[str, Any] | None] | None = None
    """In the chunk with the first token of choice 0, if requested: one a token of the prompt, None for the
    first one."""
    parsed: dict[str, Any] | None = None
    """The `delta`, if the worker parses the job's output as a message: the job has tools, or the model
    reasons. None otherwise."""

    @property
    def delta(self) -> dict[str, Any]:
        """What it adds to the assistant message, as the `delta` of OpenAI's chunks.

        {content, reasoning, tool_calls: [{index, id, type, function: {name, arguments}}]}, each only where it
        adds something. In a job whose output is not parsed, `content` is the text.
        """
        if self.parsed is not None:
            return self.parsed
        return {"content": self.text} if self.text else {}


@dataclass(frozen=True, slots=True)
class Choice:
    """One of the outputs of a finished job."""

    index: int
    text: str
    token_ids: list[int]
    finish_reason: str
    """`stop` or `length`; `tool_calls` if the model has chosen to call functions, and has stopped."""
    stop_reason: int | str | None = None
    """The stop string or the id of the stop token that ended it; None for any other end."""
    logprobs: list[dict[str, Any]] | None = None
    parsed: dict[str, Any] | None = None
    """The `message`, if the worker parses the job's output as one: the job has tools, or the model reasons.
    None otherwise."""

    @property
    def message(self) -> dict[str, Any]:
        """The assistant message as OpenAI has it: {role, content, reasoning, tool_calls}, the last two only
        where there are any. `content` is None in a message of tool calls alone.

        In a job whose output is not parsed, `content` is the text.
        """
        return {"role": "assistant", "content": self.text} if self.parsed is None else self.parsed


@dataclass(frozen=True, slots=True)
class Result:
    """A finished job. `text`, `message`, `token_ids`, `finish_reason`, `stop_reason` and `logprobs` are those
    of choice 0."""

    job_id: str
    text: str
    token_ids: list[int]
    finish_reason: str
    """`stop`, `length` or `tool_calls`."""
    usage: dict[str, int]
    """num_prompt_tokens, num_cached_tokens, num_output_tokens. The last counts all choices."""
    timings: dict[str, float]
    """queue_ms, first_token_ms, total_ms from submission; attempts."""
    metadata: dict[str, Any] | None
    status: JobStatus
    logprobs: list[dict[str, Any]] | None = None
    prompt_logprobs: list[dict[str, Any] | None] | None = None
    """If requested, one a token of the prompt as in `Chunk.logprobs`, None for the first one."""
    stop_reason: int | str | None = None
    """The stop string or the id of the stop token that ended the output; None for any other end."""
    choices: list[Choice] = field(default_factory=list)
    """One for each of the job's `n`, in the order of their indices."""

    @property
    def message(self) -> dict[str, Any]:
        """See `Choice.message`."""
        return self.choices[0].message


@dataclass(frozen=True, slots=True)
class JobInfo:
    """The state of a job. Times are Unix times in ms by the server's clock, None if not reached."""

    job_id: str
    status: JobStatus
    position: int
    """Output tokens committed."""
    priority: str | None
    worker: str | None
    """The worker that runs it, or ran it last."""
    attempt: int
    """How often a worker has begun it."""
    deaths: int
    """Number of workers that died or failed while they ran it."""
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
        """Decode a job's hash, which `ingine/contract/scripts` writes. Raises BadRecord if it is damaged."""
        # Leave out the msgpack job, which the record of a delayed job holds: it is not text.
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
    """A job that waits or runs, as returned by `jobs`."""

    job_id: str | None
    """None if it cannot be read. A worker will bury the entry."""
    status: JobStatus
    """`queued`, `delayed` or `running`."""
    priority: str
    tenant: str | None
    submitted_at_ms: int | None
    """Unix time in milliseconds by the server's clock."""
    age_s: float
    """Seconds since then."""
    entry: str | None
    """Its id in the jobs stream. None while it is delayed."""
    num_bytes: int
    worker: str | None
    """The worker that runs it."""


@dataclass(frozen=True, slots=True)
class QueueInfo:
    """The state of a queue."""

    queue: str
    waiting: dict[str, int]
    """Number of jobs that no worker has, by priority."""
    running: dict[str, int]
    """Number of jobs that a worker has, by priority."""
    num_delayed: int
    """Number of delayed jobs."""
    num_bytes: int
    """Bytes of the submitted jobs that wait or run."""
    num_partitions: int
    """Limits apply to each partition separately."""
    max_jobs: int
    """At this number of jobs, delayed, waiting and running together, `submit` raises QueueFull."""
    max_bytes: int
    """At this number of bytes `submit` raises QueueFull too."""
    max_job_bytes: int
    max_jobs_per_s: float | None
    """Limit for each tenant, beyond which `submit` raises RateLimited. None: no limit."""
    weights: dict[str, float]
    """Tenant -> its share of the work while others wait too. It is 1 for all other tenants."""
    paused: bool
    draining: list[str]
    """Ids of workers that are requested to drain."""
    workers: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Worker id -> its last heartbeat, with the seconds since then as `silent_s`. A live worker beats each
    second. Its `state` is `silent` after 5 s without a beat, and `lost` after 30 s."""
    num_dead: int = 0
    """Number of dead letters."""

    @property
    def num_serving(self) -> int:
        """Number of workers whose last heartbeat is at most 5 s old, and that are not draining."""
        return sum(map(is_serving, self.workers.values()))


@dataclass(frozen=True, slots=True)
class DeadLetter:
    """An entry that no worker could run."""

    entry_id: str
    """Its id among the dead letters, which `requeue` and `purge` take. It begins with `PARTITION:` if the
    queue has several partitions."""
    job: bytes
    """The job's bytes, as they were sent."""
    job_id: str | None
    """None if the job id cannot be read."""
    code: str
    reason: str
    stream: str
    """The jobs stream that it came from."""
    entry: str
    """Its id in that stream, which begins with the Unix time of its submission in ms."""
    deliveries: int
    worker: str


def is_serving(heartbeat: dict[str, Any]) -> bool:
    """Return True if a worker serves the queue. heartbeat: from `QueueInfo.workers`."""
    return heartbeat["silent_s"] <= SILENT_AFTER_S and heartbeat.get("state") != "draining"


def raise_unless_finished(end: TerminalEvent) -> None:
    """Raise JobFailed, JobCancelled or JobExpired if the job has ended in that way."""
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
    """Return an error if the server reports that a key of the job holds another type. Else None."""
    if isinstance(error, RedisError) and str(error).startswith("WRONGTYPE"):
        return BadRecord(f"a key of job {job_id} holds another type, which a client has written ({error})")
    return None
