"""Commit the engine's outputs to the token logs, step by step, and end the jobs whose sequences ended."""

import asyncio
import logging
import time
from collections import Counter, defaultdict
from collections.abc import Callable

from ingine.contract.calls.running import Append, Finish, Refusal
from ingine.contract.record import JobStatus
from ingine.engine.outputs import FinishReason, SeqOutput
from ingine.errors import ErrorCode, InvalidRequest
from ingine.worker.choice_events import tokens_event
from ingine.worker.finisher import BAD_RECORD, Finisher
from ingine.worker.jobs import MAX_ROLLBACKS, JobTable, RunningJob
from ingine.worker.logs import log_event
from ingine.worker.metrics import Metrics
from ingine.worker.queue import Queue
from ingine.worker.releasing import release_job
from ingine.worker.retry import until_served
from ingine.worker.terminal_events import Outcome, terminal_event

logger = logging.getLogger(__name__)


class Publisher:
    """Commits outputs in the order in which the engine computed them.

    `abort` is called with the engine's id of each sequence that is to stop: its job is fenced, cancelled,
    buried or released.
    """

    def __init__(self, jobs: JobTable, finisher: Finisher, metrics: Metrics, abort: Callable[[str], None]):
        self._jobs = jobs
        self._finisher = finisher
        self._metrics = metrics
        self._abort = abort
        self._commits_began: list[float] = []
        """When (`time.monotonic`) each commit in progress began."""

    @property
    def waiting_since(self) -> float | None:
        """When (`time.monotonic`) the oldest commit in progress began; None if there is none."""
        return min(list(self._commits_began), default=None)

    async def commit(self, outputs: list[SeqOutput]) -> None:
        """Append a step's tokens, in one call per partition, then end the jobs that it finished: those whose
        choices have all ended.

        Returns once all of it is in Redis, however long the server is away. Raises EngineError for tokens
        that do not continue the job's earlier ones.
        """
        began = time.monotonic()
        self._commits_began.append(began)
        try:
            await self._commit(outputs)
        finally:
            self._commits_began.remove(began)

    async def _commit(self, outputs: list[SeqOutput]) -> None:
        held = [(job, out) for out in outputs if (job := self._jobs.by_seq(out.seq_id))]
        calls: dict[Queue, list[tuple[RunningJob, Append]]] = defaultdict(list)
        for job, output in held:
            if job.choices and output.finish_reason is not None:
                self._jobs.end_choice(job, output)
            # A cancelled job takes no more tokens; its abort is in flight.
            if output.token_ids and job.ending is not JobStatus.CANCELLED:
                append = Append(job.id, job.attempt, tokens_event(job, output), job.job.stream)
                job.sent.add(append, job.position)
                calls[job.queue].append((job, append))
        await asyncio.gather(*(self._append_to(queue, of_queue) for queue, of_queue in calls.items()))
        ended = [
            self._finish_job(job, output)
            for job, output in held
            if _is_end(job, output) and self._jobs.by_seq(job.seq_id) is job
        ]
        await asyncio.gather(*ended)

    async def refuse(self, job: RunningJob, fault: InvalidRequest) -> None:
        """End a job that the engine has refused."""
        await self._finisher.reject(job.as_begun, Outcome.failed(fault.code, str(fault)))
        self._jobs.remove(job)

    async def _append_to(self, queue: Queue, calls: list[tuple[RunningJob, Append]]) -> None:
        """Append until each job's log has all of its events, or the job is no longer ours."""
        while calls:
            appends = [append for _, append in calls]
            answers = await until_served("append", lambda: queue.append(appends))  # noqa: B023
            last = {job: append.position for job, append in calls}
            refused: dict[RunningJob, bool] = {}
            """Whether each job with an event that was not written goes on here."""
            written = []
            for (job, append), answer in zip(calls, answers, strict=True):
                if job in refused:
                    continue
                # A later event's position: an earlier call has written both, and its reply was lost.
                if isinstance(answer, int) and append.position <= answer <= last[job]:
                    job.position = append.position
                    if job.choices:
                        job.choices[append.index].wrote(append)
                    written.append((job, append))
                else:
                    refused[job] = await self._still_ours(job, answer)
            calls = [
                (job, append)
                for job in last
                if refused.get(job, job.position < job.sent.end)
                for append in job.sent.all_after(job.position)
            ]
            self._measure(written)

    async def _still_ours(self, job: RunningJob, answer: int | Refusal) -> bool:
        """Act on an answer of `append` that is not the position asked for. Returns whether the job goes on
        here."""
        match answer:
            case Refusal.STALE:
                self.drop(job)
            case Refusal.CANCELLED:
                job.sent.forget_after(job.position)
                self.cancel(job)
            case Refusal.BROKEN:
                await self._bury_running(job)
            case position:
                return await self._roll_back(job, position)
        return False

    async def _roll_back(self, job: RunningJob, position: int) -> bool:
        """Act on a server that came back with an older log, which ends at `position`. Returns whether the job
        is still ours.

        Events that the log lost are written again from `job.sent`. If they are not all kept there, the job is
        released: its next attempt computes the tokens again, as after the death of a worker, or finds that
        record and log disagree. More rollbacks than crashes of a server explain mean that a client writes to
        the job's keys: the job is buried.
        """
        job.num_rollbacks += 1
        if job.num_rollbacks > MAX_ROLLBACKS:
            await self._bury_running(job)
            return False
        log_event(logger, logging.WARNING, "log went back", job_id=job.id, to=position, position=job.position)
        self._metrics.log_rollbacks.inc()
        if position < job.position and job.sent.goes_on_from(position):
            if job.choices:
                for append in reversed(job.sent.all_after(position)):
                    job.choices[append.index].lost(append)
            job.position = position
            return True
        self._abort(job.seq_id)
        await release_job(self._jobs, job)
        return False

    async def _bury_running(self, job: RunningJob) -> None:
        """Bury a job whose log cannot be written any more."""
        self._discard(job)
        reason = BAD_RECORD.format("its record or its log has another type, or was changed")
        of_job = {"job_id": job.id, "metadata": job.job.metadata}
        await self._finisher.bury(job.queue, job.entry, ErrorCode.BAD_RECORD, reason, **of_job)

    def _measure(self, written: list[tuple[RunningJob, Append]]) -> None:
        """Update the metrics once for a whole step, since each update of a metric takes a lock."""
        now = time.monotonic()
        latencies: Counter[float] = Counter()
        """Number of tokens by seconds since the token before."""
        num_written = 0
        for job, append in written:
            num_tokens = append.position - append.start
            num_written += num_tokens
            of = job.choices[append.index] if job.choices else job
            if of.last_commit is not None:
                latencies[(now - of.last_commit) / num_tokens] += num_tokens
            elif not job.begun.first_token_at and job.first_token_ms is None:
                job.first_token_ms = job.since_submit_ms
                self._metrics.first_token(job.first_token_ms / 1000)
            of.last_commit = now
        for seconds, count in latencies.items():
            self._metrics.between_tokens(seconds, count)
        self._metrics.output_tokens.inc(num_written)

    def lease_answered(self, job: RunningJob, answer: Refusal) -> None:
        """Act on a lease that was not simply renewed. A job that is being released or finished here, or is
        gone already, is left alone: its lease was expected to end."""
        if self._jobs.by_seq(job.seq_id) is not job or job.is_releasing or job.is_finishing:
            return
        match answer:
            case Refusal.STALE:
                self.drop(job)
            case Refusal.CANCELLED:
                self.cancel(job)

    def cancel(self, job: RunningJob) -> None:
        """Stop computing a job. It ends as cancelled once the engine has delivered the abort."""
        if job.ending is not JobStatus.CANCELLED:
            job.ending = JobStatus.CANCELLED
            self._abort(job.seq_id)

    def drop(self, job: RunningJob) -> None:
        """Let go of a job that another attempt holds now. Writes nothing to Redis."""
        if self._jobs.by_seq(job.seq_id) is not job:
            return
        log_event(logger, logging.WARNING, "job fenced", job_id=job.id, attempt=job.attempt)
        self._metrics.fenced_writes.inc()
        self._discard(job)

    def _discard(self, job: RunningJob) -> None:
        """Stop running a job here, without writing anything to Redis."""
        self._jobs.remove(job)
        self._abort(job.seq_id)

    async def _finish_job(self, job: RunningJob, output: SeqOutput) -> None:
        """Finish a job, or find that it is no longer ours. A log that turns out too short is written again
        first."""
        job.is_finishing = True
        goes_on = True
        while goes_on:
            event = terminal_event(job, output)
            key = job.begun.idempotency_key
            finish = Finish(job.entry, job.attempt, event, job.job.reply_to, idempotency_key=key)
            goes_on = False
            match await self._finisher.finish(job.queue, finish):
                case Refusal.STALE:
                    self.drop(job)
                case Refusal.BROKEN:  # buried
                    self._discard(job)
                case job.position:
                    self._jobs.remove(job)
                case int(position):
                    goes_on = await self._write_again(job, position)

    async def _write_again(self, job: RunningJob, position: int) -> bool:
        """Append all that is missing from a log that ends at `position`. Returns whether the job is still
        ours."""
        if not await self._roll_back(job, position):
            return False
        if appends := job.sent.all_after(job.position):
            await self._append_to(job.queue, [(job, append) for append in appends])
        return self._jobs.by_seq(job.seq_id) is job


def _is_end(job: RunningJob, output: SeqOutput) -> bool:
    """Whether the job ends with this output. An abort that is neither for a cancel nor for a deadline ends
    only the sequence: the job is about to be released."""
    if output.finish_reason is FinishReason.ABORT and job.ending is None:
        return False
    return output.ends_request
