"""Admission: which entries become running jobs, how many, and which end at once. One for all partitions."""

import asyncio
import contextlib
from collections.abc import Callable, Iterator

from ingine.contract.foreign_formats import no_job_field
from ingine.contract.jobs import MAX_JOB_BYTES, Job, decode_job, read_job_id
from ingine.contract.record import JobStatus
from ingine.errors import ErrorCode, InvalidJob
from ingine.worker.entries import MAX_ENTRY_BYTES, Begun, Entry
from ingine.worker.faults import burying, ending_faulty
from ingine.worker.finisher import Finisher
from ingine.worker.hosting.engine_link import EngineHost
from ingine.worker.jobs import BegunJob, JobTable, RunningJob
from ingine.worker.metrics import Metrics
from ingine.worker.preparation import Preparation
from ingine.worker.queue import Queue
from ingine.worker.terminal_events import Outcome

INLINE_BYTES = 8 << 10
"""Of a job that is decoded at once, so that the begins of many small ones share a round trip."""


class Admission:
    """Room is counted here, so that the intakes of several partitions never take more than there is."""

    def __init__(
        self,
        jobs: JobTable,
        engine: EngineHost,
        finisher: Finisher,
        preparation: Preparation,
        metrics: Metrics,
        *,
        max_num_jobs: int,
        max_deaths: int,
    ):
        self._jobs = jobs
        self._engine = engine
        self._finisher = finisher
        self._preparation = preparation
        self._metrics = metrics
        self._max_num_jobs = max_num_jobs
        self._max_deaths = max_deaths
        self._decoding = asyncio.Lock()
        self._num_reserved = 0
        self._suspect_begins = False
        self._wakers: list[Callable[[], None]] = []
        self.num_suspects = 0
        """Entries that wait until this worker has no other job. While any does, nothing else is taken."""
        self.stopping = False

    @property
    def room(self) -> int:
        """Jobs to take now. None while the engine has sequences waiting, or prompts could not be read here:
        another worker may be idle."""
        if self._preparation.rests:
            return 0
        if self.stopping or self.num_suspects or self._engine.stats.num_waiting or self.is_for_one_alone:
            return 0
        num_taken = len(self._jobs) + len(self._preparation) + self._num_reserved
        return max(0, self._max_num_jobs - num_taken)

    @property
    def is_for_one_alone(self) -> bool:
        """A suspect runs or is being begun: nothing else may be, not even what was delivered already."""
        return self._suspect_begins or self._jobs.one_runs_alone

    @property
    def idle(self) -> bool:
        """No job runs, and none is being admitted: a suspect may have the worker to itself."""
        return not self._jobs and not self._preparation and not self._num_reserved

    async def interrupt(self, queue: Queue) -> list[RunningJob]:
        """Stop preparing jobs of a partition. Returns those that are begun and neither run nor are over."""
        return await self._preparation.interrupt(queue)

    @contextlib.contextmanager
    def reserve(self, num_jobs: int) -> Iterator[int]:
        """Room that nobody else counts on, from before a read until what it brought is admitted."""
        self._num_reserved += num_jobs
        try:
            yield num_jobs
        finally:
            self._num_reserved -= num_jobs

    @contextlib.contextmanager
    def reserve_all(self) -> Iterator[None]:
        """The whole worker, while a suspect is being begun."""
        self._suspect_begins = True
        try:
            yield
        finally:
            self._suspect_begins = False

    def on_room(self, wake: Callable[[], None]) -> None:
        """`wake` is called when there may be room."""
        self._wakers.append(wake)

    def offer_room(self) -> None:
        """First to whoever has not been served for longest: room mostly comes for one job alone."""
        for wake in self._wakers:
            wake()

    def served(self, wake: Callable[[], None]) -> None:
        """Whose `wake` this is has got jobs: the others come first now."""
        self._wakers.remove(wake)
        self._wakers.append(wake)

    def holds(self, entry: Entry) -> bool:
        return self._jobs.holds(entry)

    async def admit(self, queue: Queue, entry: Entry, max_job_bytes: int, *, alone: bool = False) -> bool:
        """Admit one entry: it runs, waits, has ended, is buried, or is somebody else's.

        False for a suspect that must have the worker to itself: nothing was done to it.
        """
        # What submit.lua has accepted stays accepted, whatever the limit is by now. That it has may be a lie:
        # MAX_JOB_BYTES is what a worker can bear from anybody.
        max_bytes = MAX_JOB_BYTES if entry.accepted else max_job_bytes
        async with burying(self._finisher, queue, entry):
            try:
                job = await self._decode(queue, entry, max_bytes)
            except InvalidJob as fault:
                return await self._end_invalid(queue, entry, fault, alone)
            # Once more, since from here on the job's metadata is known.
            async with burying(self._finisher, queue, entry, metadata=job.metadata):
                begun = await self._begin(queue, entry, job.id, job.reply_to, alone=alone, model=job.model)
                if begun.verdict == "run":
                    running = RunningJob(queue, job, entry, begun, position=begun.position)
                    async with ending_faulty(self._finisher, running.as_begun):
                        await self._run(running)
                return begun.verdict != "suspect"
        return True

    async def release(self, queue: Queue, entry: Entry) -> None:
        """Leave an entry that does not run here to any worker. A begin whose reply was lost is no death."""
        try:
            job_id = (await self._decode(queue, entry, MAX_JOB_BYTES)).id
        except InvalidJob as fault:
            job_id = fault.job_id
        await queue.release(entry, job_id or "", 0)

    async def _decode(self, queue: Queue, entry: Entry, max_bytes: int) -> Job:
        """Raises InvalidJob, with the id that the entry bears, if that could be read.

        Large ones one at a time, with a turn of the loop in between: what they take of it does not add up.
        """
        if entry.foreign:
            raise InvalidJob(ErrorCode.INVALID_SHAPE, no_job_field(name for name, _ in entry.foreign))
        if entry.num_bytes_unread:
            reason = f"the entry has {entry.num_bytes_unread} bytes, the most is {MAX_ENTRY_BYTES}"
            raise InvalidJob(ErrorCode.JOB_TOO_LARGE, reason)
        # Who serves another model may take longer prompts, and the job be one for them.
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
        """Ask for the lease. What another model's workers are to run is parked, and a duplicate is buried."""
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
        """End what is no valid job: with an event if it has an id, else as a dead letter. Returns as `admit`
        does."""
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
        """End a begun job that must not run, put off one that is early, and prepare any other."""
        queue, entry, job, begun = running.queue, running.entry, running.job, running.begun
        if outcome := self._rejection(running):
            await self._finisher.reject(running.as_begun, outcome)
            return
        if job.not_before_ms and (early_ms := begun.submitted_at + job.not_before_ms - begun.now) > 0:
            # A bare XADD: a submitted job gets into its stream only when its time has come.
            await queue.delay(entry, job.id, begun.attempt, early_ms / 1000)
            return
        task = await self._preparation.start(running)
        if task is None:
            return
        task.add_done_callback(lambda _: self.offer_room())
        if running.alone and not self.stopping:  # else `interrupt` waits for us, and would come too late
            await asyncio.wait([task])  # nothing else is to begin meanwhile

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
            message = f"its tokens are of the model {begun.fingerprint}, which no worker serves any more"
            return Outcome.failed(ErrorCode.MODEL_CHANGED, message)
        if job.model not in (None, *queue.model.names) and not begun.position:
            names = ", ".join(sorted(queue.model.names | queue.served_elsewhere))
            message = f"model {job.model!r}: the workers of this queue serve {names}"
            return Outcome.failed(ErrorCode.UNKNOWN_MODEL, message)
        return None
