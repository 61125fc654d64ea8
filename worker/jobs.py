"""The jobs that this worker holds a lease on, and the state of each."""

import asyncio
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from ingine.contract.calls.begin import Begun
from ingine.contract.entries import Entry
from ingine.contract.jobs import Job
from ingine.contract.record import JobStatus
from ingine.engine.outputs import SeqOutput
from ingine.worker.choices import Choice
from ingine.worker.queue import SUSPECT_DEATHS, Queue
from ingine.worker.sent import Sent
from ingine.worker.shares import Shares

MAX_ROLLBACKS = 20
"""More crashes of a server than one attempt will see. Beyond that a client keeps setting the job's position
back, which would hold up the other jobs."""


@dataclass(frozen=True, slots=True)
class BegunJob:
    """A job under the attempt that `begin` has granted: what it takes to end it.

    The job need not be valid, only its id be readable.
    """

    queue: Queue
    entry: Entry
    begun: Begun
    id: str
    reply_to: str | None
    metadata: dict[str, Any] | None = None


@dataclass(slots=True, eq=False)
class RunningJob:
    """One job under one attempt. Only the event loop changes it."""

    queue: Queue
    """Its partition."""
    job: Job
    entry: Entry
    begun: Begun
    position: int
    """Number of output tokens committed in the log."""
    parses_message: bool = False
    """Its output is read as an assistant message."""
    num_tokens: int = 0
    """Tokens that it counts for in its tenant's fair share."""
    arrival: float = 0.0
    """The time from which it counts as waiting, in seconds since the epoch. The engine orders by it."""

    began: float = field(default_factory=time.monotonic)
    """When `begin` returned, by `time.monotonic`."""
    sent: Sent = field(init=False)
    choices: list[Choice] = field(init=False)
    """Empty in a job of one choice."""
    ending: JobStatus | None = None
    """The status with which a job that is to end early ends, once the engine has delivered its abort."""
    num_rollbacks: int = 0
    """How often the server was found to have lost the end of the log."""
    is_finishing: bool = False
    """Its terminal event is being written. It may have ended in Redis already, with the reply in flight."""
    is_releasing: bool = False
    """It is being released. Another worker may hold it already, with the reply in flight or lost."""
    first_token_ms: float | None = None
    last_commit: float | None = None
    """When the latest tokens were committed, by `time.monotonic`."""
    expiry: asyncio.TimerHandle | None = None
    """The timer for its deadline."""

    def __post_init__(self) -> None:
        self.sent = Sent(self.position)
        self.choices = [Choice() for _ in range(self.num_choices)] if self.num_choices > 1 else []

    @property
    def id(self) -> str:
        return self.job.id

    @property
    def num_choices(self) -> int:
        return self.job.sampling.n

    @property
    def num_places(self) -> int:
        """Places that it takes in the worker: one for each choice that has not ended, and at least one until
        the end of the job is written."""
        return max(1, sum(not choice.has_ended for choice in self.choices))

    @property
    def as_begun(self) -> BegunJob:
        job = self.job
        return BegunJob(self.queue, self.entry, self.begun, job.id, job.reply_to, job.metadata)

    @property
    def attempt(self) -> int:
        return self.begun.attempt

    @property
    def tenant(self) -> str:
        return self.job.tenant or ""

    @property
    def share_key(self) -> tuple[str, str]:
        """The key of its fair share: tenant and priority."""
        return self.tenant, self.entry.priority

    @property
    def submitted(self) -> float:
        """Time of submission in seconds since the epoch, by this machine's clock."""
        return time.time() - self.since_submit_ms / 1000

    @property
    def alone(self) -> bool:
        """Whether it has the worker to itself, since workers died while they ran it."""
        return self.begun.deaths >= SUSPECT_DEATHS

    @property
    def seq_id(self) -> str:
        """The engine's id of its sequence. It includes the attempt, so that late outputs of a lost attempt
        match no job."""
        return f"{self.job.id}#{self.attempt}"

    @property
    def since_submit_ms(self) -> float:
        """Milliseconds since submission: by the server's clock until begin, by the local monotonic clock from
        then on."""
        return self.begun.now - self.begun.submitted_at + (time.monotonic() - self.began) * 1000


class JobTable:
    """The running jobs, by sequence id and by job id."""

    def __init__(self) -> None:
        self._by_seq: dict[str, RunningJob] = {}
        self._by_id: dict[str, RunningJob] = {}
        self._beginning: set[RunningJob] = set()
        self._entries: set[Entry] = set()
        self._shares = Shares()
        self.num_places = 0
        """Places that the running jobs take together."""

    def add(self, job: RunningJob) -> None:
        """Add a job, and set its `arrival`, which depends on the tokens of its tenant's jobs here."""
        weight = job.queue.weights.get(job.tenant, 1.0)
        job.arrival = self._shares.enter(job.share_key, job.num_tokens, job.submitted, weight)
        self._by_seq[job.seq_id] = job
        self.num_places += job.num_places
        self._by_id[job.id] = job
        self._entries.add(job.entry)

    def remove(self, job: RunningJob) -> None:
        if job.expiry:
            job.expiry.cancel()
        if self._by_seq.pop(job.seq_id, None):
            self._shares.leave(job.share_key, job.num_tokens)
            self.num_places -= job.num_places
        self._entries.discard(job.entry)
        if self._by_id.get(job.id) is job:
            del self._by_id[job.id]

    def end_choice(self, job: RunningJob, output: SeqOutput) -> None:
        """Free the place of a choice, with the last output that the engine has of it."""
        num_places = job.num_places
        job.choices[output.index].last_output = output
        if self._by_seq.get(job.seq_id) is job:
            self.num_places += job.num_places - num_places

    @contextmanager
    def beginning(self, job: RunningJob) -> Iterator[None]:
        """Have a job's lease renewed while the job is prepared for the engine, which may take long."""
        self._beginning.add(job)
        self._entries.add(job.entry)
        try:
            yield
        finally:
            self._beginning.discard(job)
            if job.seq_id not in self._by_seq:
                self._entries.discard(job.entry)

    def leased(self) -> list[RunningJob]:
        """The jobs whose leases are to be renewed. Safe to call from another thread."""
        return [*list(self._by_seq.values()), *list(self._beginning)]

    def by_seq(self, seq_id: str) -> RunningJob | None:
        return self._by_seq.get(seq_id)

    def by_id(self, job_id: str) -> RunningJob | None:
        return self._by_id.get(job_id)

    @property
    def one_runs_alone(self) -> bool:
        return len(self) == 1 and next(iter(self._by_seq.values())).alone

    def holds(self, entry: Entry) -> bool:
        return entry in self._entries

    def __iter__(self) -> Iterator[RunningJob]:
        # A copy: the caller may remove jobs, and await, while it iterates.
        return iter(list(self._by_seq.values()))

    def __len__(self) -> int:
        return len(self._by_seq)
