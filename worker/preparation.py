"""Prepare begun jobs for the engine: read their prompts, which may take long or be impossible here."""

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from functools import partial

from redis.exceptions import RedisError

from ingine.contract.jobs import token_cost
from ingine.contract.keys import Priority
from ingine.engine.message_format import MessageFormat
from ingine.engine.request import EngineRequest
from ingine.errors import ErrorCode, InvalidRequest
from ingine.sampling_params import SamplingParams
from ingine.worker.choices import CommittedChoice
from ingine.worker.faults import burying, ending_faulty
from ingine.worker.finisher import Finisher
from ingine.worker.hosting.engine_link import EngineHost
from ingine.worker.hosting.prompt_process import NoPromptProcess
from ingine.worker.jobs import JobTable, RunningJob
from ingine.worker.logs import log_event
from ingine.worker.metrics import Metrics
from ingine.worker.prompts import PromptReader
from ingine.worker.queue import FIRST_PAUSE_S, LONGEST_PAUSE_S, Queue
from ingine.worker.retry import until_served
from ingine.worker.tasks import cancel_all
from ingine.worker.terminal_events import Outcome

logger = logging.getLogger(__name__)

REST_S = 5.0
"""Seconds without taking jobs after a prompt could not be read here, so that a peer takes that job. Longer
than the job's own first pause."""

ENGINE_PRIORITY = {Priority.HIGH: -1, Priority.NORMAL: 0, Priority.LOW: 1}


class Preparation:
    """Reads the prompts of begun jobs and adds the jobs to the engine. Its length is the number of jobs that
    are prepared in tasks beside the intakes."""

    def __init__(
        self,
        jobs: JobTable,
        engine: EngineHost,
        finisher: Finisher,
        prompts: PromptReader,
        metrics: Metrics,
        *,
        expire: Callable[[RunningJob], None],
    ):
        self._jobs = jobs
        self._engine = engine
        self._finisher = finisher
        self._prompts = prompts
        self._metrics = metrics
        self._expire = expire
        self._tasks: dict[RunningJob, asyncio.Task] = {}
        """The tasks of jobs whose prompts may take long to read. The intakes go on meanwhile, except for the
        one that has a job which is to run alone."""
        self._rests_until = 0.0

    def __len__(self) -> int:
        return len(self._tasks)

    @property
    def num_places(self) -> int:
        """Places for the choices of the jobs that are prepared in tasks."""
        return sum(job.num_choices for job in self._tasks)

    @property
    def rests(self) -> bool:
        """Whether a prompt could not be read here in the last `REST_S`: no job is to be taken, so that a peer
        takes that one."""
        return time.monotonic() < self._rests_until

    async def start(self, running: RunningJob) -> asyncio.Task | None:
        """Prepare a job, at once or in a task.

        Returns None once the job runs, has ended or is delayed. If its prompt may take long to read, or if it
        is to run alone, returns immediately with the task that does the same.
        """
        if self._prompts.reads_at_once(running.job) and not running.alone:
            with self._jobs.beginning(running):
                await self._run(running)
            return None
        task = asyncio.create_task(self._run_beside(running), name=f"preparing {running.id}")
        task.add_done_callback(lambda _: self._tasks.pop(running))
        self._tasks[running] = task
        return task

    async def interrupt(self, queue: Queue) -> list[RunningJob]:
        """Stop preparing jobs of a partition. Returns the begun jobs that neither run nor have ended."""
        preparing = {job: task for job, task in self._tasks.items() if job.queue is queue}
        await cancel_all(set(preparing.values()))
        return [job for job, task in preparing.items() if task.cancelled()]

    async def _run(self, running: RunningJob) -> None:
        """Prepare a job until it runs, has ended or is delayed."""
        job = running.job
        submitted_at = datetime.fromtimestamp(running.begun.submitted_at / 1000, UTC)
        try:
            async with asyncio.timeout(_left_s(running)):
                resumes = running.begun.position > 0
                prompt_token_ids, params = await self._prompts.read(job, submitted_at, resumes)
                bad_words = await self._prompts.read_bad_words(job)
                message = self._prompts.message_format(job, prompt_token_ids)
            committed = await self._committed(running)
        except InvalidRequest as fault:
            await self._finisher.reject(running.as_begun, Outcome.failed(fault.code, str(fault)))
        except TimeoutError:
            await self._finisher.reject(running.as_begun, Outcome.expired(job.deadline_ms))
        except NoPromptProcess as fault:
            await self._put_off(running, fault)
        else:
            self._add(running, prompt_token_ids, params, committed, bad_words, message)

    def _add(
        self,
        running: RunningJob,
        prompt_token_ids: Sequence[int],
        params: SamplingParams,
        committed: list[CommittedChoice],
        bad_words: list[list[int]],
        message: MessageFormat | None,
    ) -> None:
        """Add a job to the running jobs and to the engine."""
        sampling, max_num_tokens = running.job.sampling, self._engine.limits.max_num_tokens
        cost = token_cost(len(prompt_token_ids), sampling.max_tokens, sampling.n)
        running.num_tokens = min(cost, sampling.n * max_num_tokens)
        for choice, of_log in zip(running.choices, committed, strict=False):
            choice.resume(of_log)
        running.parses_message = message is not None and params.detokenize
        first, *others = committed
        if (left_s := _left_s(running)) is not None:
            running.expiry = asyncio.get_running_loop().call_later(left_s, self._expire, running)
        self._jobs.add(running)
        self._metrics.prompt_tokens.inc(len(prompt_token_ids))
        _log_begin(running, len(prompt_token_ids))
        self._engine.add(
            EngineRequest(
                running.seq_id,
                prompt_token_ids,
                params,
                priority=ENGINE_PRIORITY[running.entry.priority],
                output_token_ids=first.token_ids,
                other_output_token_ids=[choice.token_ids for choice in others],
                ended_choices=[index for index, choice in enumerate(committed) if choice.finish_reason],
                bad_words_token_ids=bad_words,
                arrival_time=running.arrival,
                tenant=running.tenant,
                message=message,
            )
        )

    async def _run_beside(self, running: RunningJob) -> None:
        queue, entry, metadata = running.queue, running.entry, running.job.metadata
        with self._jobs.beginning(running):
            async with (
                burying(self._finisher, queue, entry, metadata=metadata),
                ending_faulty(self._finisher, running.as_begun),
            ):
                await self._run(running)

    async def _put_off(self, running: RunningJob, fault: NoPromptProcess) -> None:
        """Delay a job whose prompt cannot be read here, so that a peer takes it. It goes behind all waiting
        jobs, which are therefore taken even if no worker can read this prompt. In that case only its deadline
        ends the job.

        A job that comes back here has found no peer that can read it. Its pause doubles with each attempt,
        and this worker goes on taking jobs.
        """
        queue, entry, attempt = running.queue, running.entry, running.attempt
        if attempt == 1 and await self._has_peers(queue):
            self._rests_until = time.monotonic() + REST_S
        pause_s = min(FIRST_PAUSE_S * 2 ** min(attempt - 1, 10), LONGEST_PAUSE_S)
        if await until_served("delay", lambda: queue.delay(entry, running.id, attempt, pause_s)):
            log_event(logger, logging.INFO, "job put off", job_id=running.id, attempt=attempt, error=fault)

    async def _has_peers(self, queue: Queue) -> bool:
        """Whether there are other workers. True if Redis cannot be asked."""
        with contextlib.suppress(RedisError, OSError):
            return await queue.has_peers()
        return True

    async def _committed(self, running: RunningJob) -> list[CommittedChoice]:
        """The token ids in a job's log, by choice.

        Raises InvalidRequest unless they are in the model's vocabulary and as many as the job's record says.
        Both are written in one call, so if they disagree another client has written there.
        """
        position, num_choices = running.begun.position, running.num_choices
        committed = [CommittedChoice() for _ in range(num_choices)]
        if position:
            read = partial(running.queue.committed_choices, running.id, num_choices)
            committed = await until_served("read log", read)
        num_tokens = sum(len(choice.token_ids) for choice in committed)
        if num_tokens != position:
            message = f"its log has {num_tokens} tokens, and its record says {position}"
            raise InvalidRequest(ErrorCode.BAD_RECORD, message)
        for choice in committed:
            self._engine.limits.validate_output(choice.token_ids)
        return committed


def _left_s(running: RunningJob) -> float | None:
    """Seconds until the job's deadline; None if it has none."""
    deadline_ms = running.job.deadline_ms
    return None if deadline_ms is None else (deadline_ms - running.since_submit_ms) / 1000


def _log_begin(running: RunningJob, num_prompt_tokens: int) -> None:
    job, begun = running.job, running.begun
    log_event(
        logger, logging.DEBUG, "job begun",
        job_id=job.id, attempt=begun.attempt, priority=running.entry.priority,
        prompt_tokens=num_prompt_tokens, queue_ms=begun.now - begun.submitted_at, trace=job.trace,
    )  # fmt: skip
    if begun.attempt > 1:
        log_event(
            logger, logging.INFO, "job resumed",
            job_id=job.id, attempt=begun.attempt, position=running.position, deaths=begun.deaths,
            alone=running.alone or None,
        )  # fmt: skip
