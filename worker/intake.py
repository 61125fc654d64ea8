"""From entries to running jobs: read no more than there is room for, check each at the door, begin it."""

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable
from datetime import UTC, datetime

from redis.exceptions import RedisError, ResponseError

from ingine.errors import ErrorCode, InvalidJob, InvalidRequest
from ingine.wire import DEFAULT_MAX_JOB_BYTES, Job, JobStatus, Priority, decode_job
from worker.engine_thread import EngineThread
from worker.jobs import JobTable, RunningJob
from worker.logs import log_event
from worker.metrics import Metrics
from worker.prompts import PromptReader
from worker.publisher import Publisher, deadline_error
from worker.queue import Begun, Entry, Queue
from worker.retry import Backoff, until_served

logger = logging.getLogger(__name__)

BLOCK_S = 0.25
"""How long one read waits for new entries. Short, since a hand-over waits for it, at either end."""

SWEEP_INTERVAL_S = 1.0

ENGINE_PRIORITY = {Priority.HIGH: -1, Priority.NORMAL: 0, Priority.LOW: 1}


class Intake:
    """Takes jobs while there is room, those of dead or stopping workers before new ones.

    `paused` and `max_job_bytes` are set from the queue's settings by the heartbeat.
    """

    def __init__(
        self,
        queue: Queue,
        jobs: JobTable,
        engine: EngineThread,
        publisher: Publisher,
        prompts: PromptReader,
        metrics: Metrics,
        *,
        max_num_jobs: int,
        lease_s: float,
        max_deaths: int,
        expire: Callable[[RunningJob], None],
    ):
        self._queue = queue
        self._jobs = jobs
        self._engine = engine
        self._publisher = publisher
        self._prompts = prompts
        self._metrics = metrics
        self._max_num_jobs = max_num_jobs
        self._lease_s = lease_s
        self._max_deaths = max_deaths
        self._expire = expire
        self._woken = asyncio.Event()
        self._next_sweep = 0.0
        self._lost_delivery = False
        self.stopping = False
        self.paused = False
        self.max_job_bytes = DEFAULT_MAX_JOB_BYTES
        self.last_poll = time.monotonic()
        """When Redis last answered a read, or there was no need to read."""

    @property
    def room(self) -> int:
        """Jobs to take now. None while the engine has sequences waiting: another worker may be idle."""
        if self.stopping or self.paused or self._engine.stats.num_waiting:
            return 0
        return max(0, self._max_num_jobs - len(self._jobs))

    def wake(self) -> None:
        """There may be room now, or a reason to stop."""
        self._woken.set()

    def sweep_soon(self) -> None:
        """A peer has released jobs: look for them before the next sweep is due."""
        self._next_sweep = 0.0
        self.wake()

    async def run(self) -> None:
        """Until `stopping` is set. A server that is away is waited for."""
        backoff = Backoff("intake")
        while not self.stopping:
            try:
                await (self._take() if self.room else self._wait_for_room())
            except (RedisError, OSError) as error:
                self._lost_delivery = True
                await backoff.sleep(error)
            else:
                backoff.reset()

    async def _wait_for_room(self) -> None:
        self.last_poll = time.monotonic()
        self._woken.clear()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(BLOCK_S):
                await self._woken.wait()

    async def _take(self) -> None:
        """Jobs that others left behind come first: they are mid-sentence, and older than what is new."""
        if self._lost_delivery:
            await self._admit_all(await self._queue.read_own_pending())
            self._lost_delivery = False
        if time.monotonic() >= self._next_sweep:
            self._next_sweep = time.monotonic() + SWEEP_INTERVAL_S
            await self._admit_all(await self._queue.claim_idle(self._lease_s, self.room))
        if room := self.room:
            entries = await self._queue.read_new(room) or await self._queue.wait_for_new(BLOCK_S)
            await self._admit_all(entries[:room])
            for surplus in entries[room:]:  # the waiting read brings up to one of each priority
                await self._queue.release(surplus, "", 0)
        self.last_poll = time.monotonic()

    async def _admit_all(self, entries: list[Entry]) -> None:
        for entry in entries:
            if self.stopping:
                await self._queue.release(entry, "", 0)
            elif not self._jobs.holds(entry):
                await self._admit_or_bury(entry)

    async def _admit_or_bury(self, entry: Entry) -> None:
        try:
            await self._admit(entry)
        except ResponseError as error:
            # Somebody has put something else under this job's keys: that will not pass, and must not hold
            # up the entries behind it. Whatever else the server refuses for (memory, disk) will pass.
            if not any(sign in str(error) for sign in ("WRONGTYPE", "not an integer")):
                raise
            await self._bury(
                entry, ErrorCode.BAD_RECORD, f"the job's keys are not what they should be: {error}"
            )

    async def _admit(self, entry: Entry) -> None:
        """One entry through the door: it runs, has ended, is in the dead letters, or is somebody else's."""
        try:
            job, fault = decode_job(entry.raw, max_bytes=self.max_job_bytes), None
            job_id, reply_to = job.id, job.reply_to
        except InvalidJob as invalid:
            job, fault = None, invalid
            job_id, reply_to = invalid.job_id, invalid.reply_to
        if job_id is None:
            await self._bury(entry, fault.code, str(fault))
            return

        begun = await self._queue.begin(entry, job_id, reply_to)
        if begun.verdict == "duplicate":
            await self._bury(entry, ErrorCode.DUPLICATE_ID, f"another entry has the job id {job_id}")
        elif begun.verdict == "run":
            self._metrics.began(begun, entry.priority)
            try:
                ending = self._ends_at_the_door(job, fault, begun)
                if ending is None:
                    await self._start(entry, job, begun)
                else:
                    await self._publisher.reject(
                        entry, job_id, reply_to, begun, *ending, job and job.metadata
                    )
            except (RedisError, OSError):
                raise
            except Exception as error:
                # A fault of ours that this job, of all, sets off: it must not take one worker after another
                # down. Each time is a death, so it ends as failed.
                log_event(logger, logging.ERROR, "job not begun", job_id=job_id, error=repr(error))
                logger.debug("job not begun", exc_info=error)
                await self._queue.release(entry, job_id, begun.attempt, died=True)

    def _ends_at_the_door(
        self, job: Job | None, fault: InvalidJob | None, begun: Begun
    ) -> tuple[JobStatus, dict | None] | None:
        """Status and error of a job that is not to run, else None."""
        if fault:
            return JobStatus.FAILED, {"code": str(fault.code), "message": str(fault)}
        if begun.cancelled:
            return JobStatus.CANCELLED, None
        if job.deadline_ms is not None and begun.now >= begun.submitted_at + job.deadline_ms:
            return JobStatus.EXPIRED, deadline_error(job.deadline_ms)
        if begun.deaths >= self._max_deaths:
            message = f"{begun.deaths} workers died or failed while they ran this job; it is not tried again"
            return JobStatus.FAILED, {"code": str(ErrorCode.WORKER_LOST), "message": message}
        return None

    async def _start(self, entry: Entry, job: Job, begun: Begun) -> None:
        submitted_at = datetime.fromtimestamp(begun.submitted_at / 1000, UTC)
        try:
            prompt_token_ids, params = await self._prompts.read(job, submitted_at)
        except InvalidRequest as fault:
            error = {"code": str(fault.code), "message": str(fault)}
            await self._publisher.reject(
                entry, job.id, job.reply_to, begun, JobStatus.FAILED, error, job.metadata
            )
            return
        committed: list[int] = []
        if begun.position:
            committed = await until_served("read log", lambda: self._queue.committed(job.id))
        running = RunningJob(job, entry, begun, position=len(committed))
        if job.deadline_ms is not None:
            left_s = (job.deadline_ms - running.since_submit_ms) / 1000
            running.expiry = asyncio.get_running_loop().call_later(left_s, self._expire, running)
        self._jobs.add(running)
        self._metrics.prompt_tokens.inc(len(prompt_token_ids))
        log_event(
            logger,
            logging.INFO,
            "job begun",
            job_id=job.id,
            attempt=begun.attempt,
            priority=entry.priority,
            prompt_tokens=len(prompt_token_ids),
            resumed_from=begun.position or None,
            queue_ms=begun.now - begun.submitted_at,
            trace=job.trace,
        )
        self._engine.add(
            running.seq_id,
            prompt_token_ids,
            params,
            priority=ENGINE_PRIORITY[entry.priority],
            arrival_time=time.time() - running.since_submit_ms / 1000,
            output_token_ids=committed,
        )

    async def _bury(self, entry: Entry, code: ErrorCode, reason: str) -> None:
        if await self._queue.bury(entry, str(code), reason):
            self._metrics.dead_letters.inc()
            log_event(logger, logging.WARNING, "entry buried", entry=entry.id, code=str(code), reason=reason)
