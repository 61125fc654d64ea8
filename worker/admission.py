"""Admission: decides which entries become running jobs, and ends the others. One for all partitions."""

import asyncio
import contextlib
from collections.abc import Callable, Iterator

from ingine.contract.calls.begin import Begun
from ingine.contract.entries import MAX_ENTRY_BYTES, Entry
from ingine.contract.foreign_formats import no_job_field
from ingine.contract.jobs import MAX_JOB_BYTES, Job, decode_job, read_job_id
from ingine.contract.record import JobStatus
from ingine.errors import ErrorCode, InvalidJob
from ingine.worker.faults import burying, ending_faulty
from ingine.worker.finisher import Finisher
from ingine.worker.hosting.engine_link import EngineHost
from ingine.worker.jobs import BegunJob, JobTable, RunningJob
from ingine.worker.metrics import Metrics
from ingine.worker.preparation import Preparation
from ingine.worker.queue import Queue
from ingine.worker.terminal_events import Outcome

INLINE_BYTES = 8 << 10
"""Size up to which a job is decoded at once, so that the begins of many small jobs share a round trip."""


class Admission:
    """Begins entries, and counts the room for jobs, so that the intakes of several partitions together never
    take more jobs than the engine has room for."""

    def __init__(
        self,
        jobs: JobTable,
        engine: EngineHost,
        finisher: Finisher,
        preparation: Preparation,
        metrics: Metrics,
        *,
        num_places: int,
        max_deaths: int,
    ):
        self._jobs = jobs
        self._engine = engine
        self._finisher = finisher
        self._preparation = preparation
        self._metrics = metrics
        self._num_places = num_places
        self._max_deaths = max_deaths
        self._decoding = asyncio.Lock()
        self._num_reserved = 0
        self._suspect_begins = False
        self._wakers: list[Callable[[], None]] = []
        self.num_suspects = 0
        """Entries that wait until this worker has no other job. While there are any, no entry is taken."""
        self.stopping = False

    @property
    def room(self) -> int:
        """Number of free places, one for each choice to take now. 0 while sequences wait for room in the
        engine, or just after a prompt could not be read here, since another worker may be idle."""
        if self._preparation.rests:
            return 0
        stats = self._engine.stats
        is_full = stats.num_waiting > stats.num_compiling
        if self.stopping or self.num_suspects or is_full or self.is_for_one_alone:
            return 0
        num_taken = self._jobs.num_places + self._preparation.num_places + self._num_reserved
        return max(0, self._num_places - num_taken)

    @property
    def is_for_one_alone(self) -> bool:
        """A suspect runs or is being begun. No other entry may be begun, not even one already delivered."""
        return self._suspect_begins or self._jobs.one_runs_alone

    @property
    def idle(self) -> bool:
        """No job runs or is being admitted, so a suspect may have the worker to itself."""
        return not self._jobs and not self._preparation and not self._num_reserved

    async def interrupt(self, queue: Queue) -> list[RunningJob]:
        """Stop preparing jobs of a partition. Returns the begun jobs that neither run nor have ended."""
        return await self._preparation.interrupt(queue)

    @contextlib.contextmanager
    def reserve(self, num_places: int) -> Iterator[int]:
        """Reserve places, from before a read until the entries that it returned are admitted."""
        self._num_reserved += num_places
        try:
            yield num_places
        finally:
            self._num_reserved -= num_places

    @contextlib.contextmanager
    def reserve_all(self) -> Iterator[None]:
        """Reserve the whole worker while a suspect is being begun."""
        self._suspect_begins = True
        try:
            yield
        finally:
            self._suspect_begins = False

    def on_room(self, wake: Callable[[], None]) -> None:
        """Register `wake`, to be called when there may be room."""
        self._wakers.append(wake)

    def offer_room(self) -> None:
        """Wake the intakes, the one that was served longest ago first: mostly there is room for one job."""
        for wake in self._wakers:
            wake()

    def served(self, wake: Callable[[], None]) -> None:
        """Move the intake of this `wake` behind the others, since it has got jobs."""
        self._wakers.remove(wake)
        self._wakers.append(wake)

    def holds(self, entry: Entry) -> bool:
        return self._jobs.holds(entry)

    async def admit(self, queue: Queue, entry: Entry, max_job_bytes: int, *, alone: bool = False) -> bool:
        """Admit one entry. Afterwards its job runs or is delayed, has ended, is buried, or belongs to another
        worker.

        alone: this worker has no other job. Returns False for a suspect that needs an idle worker: it was
        left as it is.
        """
        # A job that submit.lua has accepted stays accepted, whatever the limit is now. Any client can set
        # this mark, so MAX_JOB_BYTES is a limit that a worker can bear from any client.
        max_bytes = MAX_JOB_BYTES if entry.accepted else max_job_bytes
        async with burying(self._finisher, queue, entry):
            try:
                job = await self._decode(queue, entry, max_bytes)
            except InvalidJob as fault:
                return await self._end_invalid(queue, entry, fault, alone)
            # Nested, since from here on the job's metadata is known.
            async with burying(self._finisher, queue, entry, metadata=job.metadata):
                begun = await self._begin(queue, entry, job.id, job.reply_to, alone=alone, model=job.model)
                if begun.verdict == "run":
                    running = RunningJob(queue, job, entry, begun, position=begun.position)
                    async with ending_faulty(self._finisher, running.as_begun):
                        await self._run(running)
                return begun.verdict != "suspect"
        return True

    async def release(self, queue: Queue, entry: Entry) -> None:
        """Release an entry that does not run here, for any worker. If its begin's reply was lost, no death is
        counted."""
        try:
            job_id = (await self._decode(queue, entry, MAX_JOB_BYTES)).id
        except InvalidJob as fault:
            job_id = fault.job_id
        await queue.release_unbegun(entry, job_id)

    async def _decode(self, queue: Queue, entry: Entry, max_bytes: int) -> Job:
        """Decode the job of an entry. Raises InvalidJob, with the job id if that could be read.

        Large jobs are decoded one at a time, with a turn of the event loop in between, so that they do not
        hold it up together.
        """
        if entry.foreign:
            raise InvalidJob(ErrorCode.INVALID_SHAPE, no_job_field(name for name, _ in entry.foreign))
        if entry.num_bytes_unread:
            reason = f"the entry has {entry.num_bytes_unread} bytes, the most is {MAX_ENTRY_BYTES}"
            raise InvalidJob(ErrorCode.JOB_TOO_LARGE, reason)
        # Workers of another model may take longer prompts, and the job may be for them.
        max_num_tokens = None if queue.served_elsewhere else self._engine.limits.max_num_tokens
        if len(entry.raw) <= INLINE_BYTES:
            return decode_job(entry.raw, max_bytes=max_bytes, max_num_tokens=max_num_tokens)
        async with self._decoding:
            await asyncio.sleep(0)
            return decode_job(entry.raw, max_bytes=max_bytes, max_num_tokens=max_num_tokens)

    async def _begin(
        self,
        queue: Queue,
        entry: Entry,
        job_id: str,
        reply_to: str | None,
        *,
        alone: bool,
        model: str | None = None,
    ) -> Begun:
        """Ask for the lease. An entry for another model's workers is parked, and a duplicate is buried."""
        begun = await queue.begin(entry, job_id, reply_to, alone=alone, model=model)
        if begun.verdict == "run":
            self._metrics.began(begun, entry.priority)
        elif begun.verdict == "other_model":
            await queue.park(entry, job_id, begun.fingerprint)
        elif begun.verdict == "duplicate":
            reason = f"another entry has the job id {job_id}"
            await self._finisher.bury(queue, entry, ErrorCode.DUPLICATE_ID, reason)
        return begun

    async def _end_invalid(self, queue: Queue, entry: Entry, fault: InvalidJob, alone: bool) -> bool:
        """End an invalid job: with a terminal event if its id could be read, else as a dead letter. Returns
        what `admit` returns."""
        if fault.job_id is None:
            job_id = read_job_id(entry.raw)
            await self._finisher.bury(queue, entry, fault.code, str(fault), job_id=job_id)
            return True
        job_id, reply_to = fault.job_id, fault.reply_to
        begun = await self._begin(queue, entry, job_id, reply_to, alone=alone)
        if begun.verdict == "run":
            invalid = BegunJob(queue, entry, begun, job_id, reply_to)
            async with ending_faulty(self._finisher, invalid):
                await self._finisher.reject(invalid, Outcome.failed(fault.code, str(fault)))
        return begun.verdict != "suspect"

    async def _run(self, running: RunningJob) -> None:
        """End a begun job that must not run, delay one that is early, and prepare any other."""
        queue, entry, job, begun = running.queue, running.entry, running.job, running.begun
        if outcome := self._rejection(running):
            await self._finisher.reject(running.as_begun, outcome)
            return
        if job.not_before_ms and (early_ms := begun.submitted_at + job.not_before_ms - begun.now) > 0:
            # It was added with a bare XADD: submit.lua delays a job before it enters its stream.
            await queue.delay(entry, job.id, begun.attempt, early_ms / 1000)
            return
        task = await self._preparation.start(running)
        if task is None:
            return
        task.add_done_callback(lambda _: self.offer_room())
        if running.alone and not self.stopping:
            # No other job may begin meanwhile. A hand-over waits for the intake before it interrupts again.
            await asyncio.wait([task])

    def _rejection(self, running: RunningJob) -> Outcome | None:
        """How a job that must not run ends; None if it may run."""
        queue, job, begun = running.queue, running.job, running.begun
        if begun.cancelled:
            return Outcome(JobStatus.CANCELLED)
        if job.deadline_ms is not None and begun.now >= begun.submitted_at + job.deadline_ms:
            return Outcome.expired(job.deadline_ms)
        if begun.deaths >= self._max_deaths:
            message = f"{begun.deaths} workers died or failed while they ran this job; it is not tried again"
            return Outcome.failed(ErrorCode.WORKER_LOST, message)
        if begun.fingerprint and not queue.model.same_weights(begun.fingerprint):
            message = f"its tokens come from the model {begun.fingerprint}, which no worker serves any more"
            return Outcome.failed(ErrorCode.MODEL_CHANGED, message)
        if job.model not in (None, *queue.model.names) and not begun.position:
            names = ", ".join(sorted(queue.model.names | queue.served_elsewhere))
            message = f"model {job.model!r}: the workers of this queue serve {names}"
            return Outcome.failed(ErrorCode.UNKNOWN_MODEL, message)
        return None
