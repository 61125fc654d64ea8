"""The contract between producers, workers and consumers as plain Python: the answer of each call, and its
effect. It has one method per script; compare it with `ingine/contract/scripts`.

The server chooses the ids of entries and the time, which are passed to the model.
"""

from dataclasses import dataclass, field

from ingine.contract.calls.running import Refusal
from ingine.contract.keys import RELEASED, Priority
from ingine.contract.record import JobStatus
from ingine.errors import ErrorCode
from tests.contract.fair_order import Entry, JobsStream

MAX_DEATHS, SUSPECT_DEATHS = 3, 2


@dataclass
class Record:
    """A job's record, from its submission, or its first begin, until its result's TTL has passed."""

    status: JobStatus
    priority: Priority
    reply_to: str
    attempt: int = 0
    position: int = 0
    deaths: int = 0
    cancel: bool = False
    worker: str = ""
    entry: str = ""
    """The id of its last entry. That of a delayed job is gone, or has not existed yet."""
    nonce: str = ""
    num_bytes: int = 0
    """Bytes counted against the queue's limit; 0 after a bare XADD."""
    submitted_at: int = 0
    """In ms; 0 until submission or first begin. It never changes, since deadlines count from it."""
    log: list[str] = field(default_factory=list)
    key: str | None = None
    """Its idempotency key, which lives as long as the record."""
    has_deadline: bool = False
    overdue: bool = False
    delayed: Entry | None = None
    """The entry that returns to the stream, under another id."""

    def runs_under(self, worker: str, attempt: int) -> bool:
        """The fence: True for the worker of the current attempt, which alone may write."""
        return (self.status, self.worker, self.attempt) == (JobStatus.RUNNING, worker, attempt)


@dataclass(frozen=True)
class Letter:
    """A dead letter."""

    code: str
    priority: Priority
    entry: Entry


@dataclass
class Limits:
    max_jobs: int = 100_000
    max_bytes: int = 1 << 30
    max_job_bytes: int = 1 << 20
    one_a_tenant: bool = False
    """True if the rate is so low that a tenant's second job is refused while the test runs."""


@dataclass
class Model:
    limits: Limits = field(default_factory=Limits)
    records: dict[str, Record] = field(default_factory=dict)
    streams: dict[Priority, JobsStream] = field(default_factory=lambda: {p: JobsStream() for p in Priority})
    due: dict[str, int] = field(default_factory=dict)
    """Delayed jobs that are due -> their due time in ms."""
    idempotency: dict[str, str] = field(default_factory=dict)
    hurried: set[str] = field(default_factory=set)
    """Tenants that have submitted a job while `one_a_tenant` was set."""
    replies: dict[str, list[tuple[str, str]]] = field(default_factory=dict)
    """Name of a replies stream -> (job id, final status)."""
    dead: list[Letter] = field(default_factory=list)
    weights: dict[str, float] = field(default_factory=dict)

    # ---------------------------------------------------------------------------------- producers

    @property
    def num_jobs(self) -> int:
        return len(self.delayed) + sum(len(stream.entries) for stream in self.streams.values())

    @property
    def num_bytes(self) -> int:
        """Bytes of the submitted jobs that wait or run."""
        return sum(record.num_bytes for record in self.records.values() if not record.status.terminal)

    @property
    def delayed(self) -> list[str]:
        return [job_id for job_id, record in self.records.items() if record.status is JobStatus.DELAYED]

    @property
    def not_running(self) -> list[str]:
        """Jobs with a record that are delayed or queued."""
        waiting = (JobStatus.DELAYED, JobStatus.QUEUED)
        return [job_id for job_id, record in self.records.items() if record.status in waiting]

    @property
    def ended(self) -> list[str]:
        """Ended jobs whose results can still be read."""
        return [job_id for job_id, record in self.records.items() if record.status.terminal]

    def refusal(self, submission, num_partitions: int = 1) -> tuple[str, str] | None:
        """The answer to a submission that adds nothing; None if it is accepted."""
        job, size, limits = submission.job, len(submission.raw), self.limits
        record = self.records.get(job.id)
        if num_partitions != 1:
            return "partitions", "1"
        if record and record.nonce == submission.nonce:
            return "accepted", job.id
        if submission.idempotency_key in self.idempotency:
            return "same", self.idempotency[submission.idempotency_key]
        if record:
            return "duplicate", ""
        if size > limits.max_job_bytes:
            return "too_large", str(limits.max_job_bytes)
        if self.num_jobs >= limits.max_jobs:
            return "full", str(limits.max_jobs)
        if self.num_bytes + size > limits.max_bytes:
            return "full_bytes", str(limits.max_bytes)
        if limits.one_a_tenant and (job.tenant or "") in self.hurried:
            return "rate", ""
        return None

    def accept(self, submission, entry_id: str) -> tuple[str, str]:
        job, raw = submission.job, submission.raw
        choices = "" if job.sampling.n == 1 else str(job.sampling.n)
        entry = Entry(entry_id, job.id, raw, job.tenant or "", submission.cost, choices)
        status = JobStatus.DELAYED if job.not_before_ms else JobStatus.QUEUED
        record = Record(status, job.priority, job.reply_to or "", nonce=submission.nonce, num_bytes=len(raw))
        record.key, record.has_deadline = submission.idempotency_key, job.deadline_ms is not None
        self.records[job.id] = record
        if job.not_before_ms:
            record.delayed = entry
        else:
            record.entry = entry_id
            self.streams[job.priority].add(entry)
        if submission.idempotency_key:
            self.idempotency[submission.idempotency_key] = job.id
        if self.limits.one_a_tenant:
            self.hurried.add(job.tenant or "")
        return "accepted", job.id

    def cancel(self, job_id: str) -> str:
        record = self.records.get(job_id)
        if record is None:
            return "unknown"
        if record.status.terminal:
            return str(record.status)
        if record.status is not JobStatus.RUNNING and record.position == 0:
            self._end(job_id, JobStatus.CANCELLED, record.reply_to)
            return "cancelled"
        # The log has tokens: only the holder of an attempt may append to it.
        record.cancel = True
        if record.status is JobStatus.DELAYED:
            self.due[job_id] = 0
        return "requested"

    def requeue(self, letter: Letter, entry_id: str) -> None:
        """Requeue a letter, without a record, as after a bare XADD. Only if its job id is not taken."""
        self.dead.remove(letter)
        self.streams[letter.priority].add(letter.entry.under(entry_id))

    @property
    def empty(self) -> bool:
        return self.num_jobs == 0 and not self.dead

    # ------------------------------------------------------------------------------------ workers

    def begin(self, worker: str, priority: Priority, entry_id: str, job_id: str, reply_to: str, alone: bool):
        """Begin a job.

        Returns the verdict; for `run` also attempt, position, deaths and whether it is cancelled.
        """
        stream, record = self.streams[priority], self.records.get(job_id)
        if not self.holds(worker, priority, entry_id):
            return ("stale",)
        if record and record.entry != entry_id:
            return ("duplicate",)
        if record and record.status.terminal:  # the server has lost the deletion of the entry
            stream.delete(entry_id)
            return ("done",)
        if record is None:
            entry_ms = int(entry_id.split("-")[0])
            record = Record(JobStatus.QUEUED, priority, reply_to, entry=entry_id, submitted_at=entry_ms)
        deaths = record.deaths + (record.status is JobStatus.RUNNING and record.worker != worker)
        stream.give(entry_id, worker)
        if SUSPECT_DEATHS <= deaths < MAX_DEATHS and not alone:
            return ("suspect",)
        self.records[job_id] = record
        record.status, record.worker, record.deaths = JobStatus.RUNNING, worker, deaths
        record.attempt += 1
        return "run", record.attempt, record.position, deaths, record.cancel

    def expire(self, job_id: str) -> str:
        record = self.records.get(job_id)
        if record is None:
            return "unknown"
        if record.status.terminal:
            return str(record.status)
        if not record.overdue:
            return "early"
        entry = self.streams[record.priority].entries.get(record.entry)
        is_held = entry is not None and entry.holder == record.worker and not entry.silent
        if record.status is JobStatus.RUNNING and is_held:
            return "running"
        self._end(job_id, JobStatus.EXPIRED, record.reply_to)
        record.worker = ""
        return "expired"

    def append(self, worker: str, job_id: str, attempt: int, start: int, position: int) -> int | Refusal:
        record = self.records.get(job_id)
        if record is None or not record.runs_under(worker, attempt):
            return Refusal.STALE
        if record.position != start:
            return record.position
        if record.cancel:
            return Refusal.CANCELLED
        record.log.append(f"{position}-0")
        record.position = position
        return position

    def finish(self, worker: str, priority: Priority, entry_id: str, finish) -> int | Refusal:
        event = finish.event
        record = self.records.get(event.job_id)
        if record is None or (record.worker, record.attempt) != (worker, finish.attempt):
            return Refusal.STALE
        if record.status is not JobStatus.RUNNING:  # else this call may be a repeat whose reply was lost
            return record.position if record.status is event.status else Refusal.STALE
        if record.position != event.position:
            return record.position
        if finish.bury:
            self.dead.append(Letter(event.error["code"], priority, self.streams[priority].entries[entry_id]))
        self._end(event.job_id, event.status, finish.reply_to or "")
        return event.position

    def release(self, worker: str, priority: Priority, entry_id: str, job_id: str, attempt: int) -> bool:
        """Release a job. Attempt 0: an entry that was taken and, as far as the worker knows, not begun."""
        if not self.holds(worker, priority, entry_id):
            return False
        record = self.records.get(job_id)
        if attempt and (record is None or not record.runs_under(worker, attempt)):
            return False
        if record and record.entry == entry_id and record.runs_under(worker, record.attempt):
            record.status, record.worker = JobStatus.QUEUED, ""
        self.streams[priority].give(entry_id, RELEASED)
        return True

    def delay(self, worker: str, priority: Priority, entry_id: str, job_id: str, attempt: int, died: bool):
        record = self.records.get(job_id)
        entry = self.streams[priority].entries.get(entry_id)
        if record is None or not record.runs_under(worker, attempt) or entry is None:
            return False
        record.deaths += died
        record.status, record.worker = JobStatus.DELAYED, ""
        record.delayed = entry
        self.streams[priority].delete(entry_id)
        return True

    def promote(self, entry_ids: dict[str, str]) -> None:
        """Promote due jobs in the order of their times. entry_ids: their new ids at the server, by job."""
        for job_id in sorted(self.due, key=lambda job_id: (self.due[job_id], job_id)):
            record, entry_id = self.records[job_id], entry_ids[job_id]
            self.streams[record.priority].add(record.delayed.under(entry_id))
            record.status, record.entry, record.delayed = JobStatus.QUEUED, entry_id, None
        self.due = {}

    def renew(
        self, worker: str, priority: Priority, entry_id: str, job_id: str, attempt: int
    ) -> Refusal | None:
        record = self.records.get(job_id)
        if record is None or not record.runs_under(worker, attempt):
            return Refusal.STALE
        if entry_id in self.streams[priority].entries:
            self.streams[priority].give(entry_id, worker)
        return Refusal.CANCELLED if record.cancel else None

    def bury(self, worker: str, priority: Priority, entry_id: str, code: str) -> bool:
        if not self.holds(worker, priority, entry_id):
            return False
        self.dead.append(Letter(code, priority, self.streams[priority].entries[entry_id]))
        self.streams[priority].delete(entry_id)
        return True

    # -------------------------------------------------------------------------------------- others

    def holds(self, worker: str, priority: Priority, entry_id: str) -> bool:
        entry = self.streams[priority].entries.get(entry_id)
        return entry is not None and entry.holder == worker

    def fault(self, priority: Priority, entry_id: str) -> ErrorCode | None:
        """The reason why an entry can never run; None if it can."""
        entry = self.streams[priority].entries[entry_id]
        if entry.job_id is None:
            return ErrorCode.INVALID_SHAPE
        record = self.records.get(entry.job_id)
        return ErrorCode.DUPLICATE_ID if record and record.entry != entry_id else None

    def forget(self, job_id: str) -> None:
        """Remove a job whose result's TTL has passed."""
        self.idempotency.pop(self.records.pop(job_id).key, None)

    def _end(self, job_id: str, status: JobStatus, reply_to: str) -> None:
        record = self.records[job_id]
        record.log.append(f"{record.position}-1")
        record.status, record.delayed = status, None
        self.streams[record.priority].delete(record.entry)
        self.due.pop(job_id, None)
        if reply_to:
            self.replies.setdefault(reply_to, []).append((job_id, str(status)))
