"""From the engine's outputs to the token log: append each step, finish what has ended."""

import asyncio
import logging
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from typing import Any

from redis.exceptions import ResponseError

from ingine.contract.events import TerminalEvent, TokensEvent
from ingine.contract.expiry import deadline_error
from ingine.contract.faults import MAX_REASON_CHARS
from ingine.contract.record import JobStatus
from ingine.engine.outputs import FinishReason, SeqOutput
from ingine.errors import EngineError, ErrorCode, InvalidRequest
from ingine.worker.entries import Append, Begun, Entry, Finish, Refusal
from ingine.worker.jobs import MAX_ROLLBACKS, JobTable, RunningJob
from ingine.worker.logs import log_event
from ingine.worker.metrics import Metrics
from ingine.worker.queue import Queue
from ingine.worker.releasing import release_job
from ingine.worker.retry import until_served

logger = logging.getLogger(__name__)

BAD_RECORD = "the job's keys are not what they should be: {}"


class Publisher:
    """Commits outputs in the order in which the engine made them.

    `abort` is called with the engine's name of each sequence that need not go on: fenced, or cancelled.
    """

    def __init__(self, jobs: JobTable, metrics: Metrics, abort: Callable[[str], None]):
        self._jobs = jobs
        self._metrics = metrics
        self._abort = abort
        self._under_way: list[float] = []

    @property
    def waiting_since(self) -> float | None:
        """Since when (`time.monotonic`) the oldest step under way waits for Redis to take it."""
        return min(list(self._under_way), default=None)

    async def commit(self, outputs: list[SeqOutput]) -> None:
        """Append a step's tokens, in one call a partition, then end the jobs that it finished.

        Returns once all of it is in Redis, however long the server is away.
        """
        began = time.monotonic()
        self._under_way.append(began)
        try:
            await self._commit(outputs)
        finally:
            self._under_way.remove(began)

    async def _commit(self, outputs: list[SeqOutput]) -> None:
        held = [(job, out) for out in outputs if (job := self._jobs.by_seq(out.seq_id))]
        calls: dict[Queue, list[tuple[RunningJob, Append]]] = defaultdict(list)
        for job, output in held:
            # A cancelled job takes no more tokens; its abort is on its way.
            if output.token_ids and job.ending is not JobStatus.CANCELLED:
                event = TokensEvent(output.position, output.token_ids, output.text, output.logprobs)
                append = Append(job.id, job.attempt, event, job.job.stream)
                if append.start != (job.sent.end or job.position):
                    raise EngineError(f"the tokens for {job.id} do not go on from where it was")
                job.sent.add(append, job.position)
                calls[job.queue].append((job, append))
        await asyncio.gather(*(self._append_to(queue, of_queue) for queue, of_queue in calls.items()))
        ended = [
            self._finish_job(job, output)
            for job, output in held
            if output.finish_reason and self._jobs.by_seq(job.seq_id) is job
        ]
        await asyncio.gather(*ended)

    async def end(self, queue: Queue, finish: Finish) -> int | Refusal:
        """Write a terminal event. Returns what `Queue.finish` does; the reply has been waited for.

        Refusal.BROKEN: it cannot be written, and the job's entry is in the dead letters.
        """
        try:
            answer = await until_served("finish", lambda: queue.finish(finish))
        except ResponseError as error:
            job_id, metadata = finish.event.job_id, finish.event.metadata
            reason = BAD_RECORD.format(error)
            await self.bury(
                queue, finish.entry, ErrorCode.BAD_RECORD, reason, job_id=job_id, metadata=metadata
            )
            return Refusal.BROKEN
        if answer == finish.event.position:
            self._metrics.ended(finish.event)
            event = finish.event
            log_event(
                logger, logging.DEBUG, f"job {event.status}",
                job_id=event.job_id, finish_reason=event.finish_reason, code=(event.error or {}).get("code"),
                position=event.position, attempt=finish.attempt, ms=event.timings.get("total_ms"),
            )  # fmt: skip
        return answer

    async def reject(
        self,
        queue: Queue,
        entry: Entry,
        job_id: str,
        reply_to: str | None,
        begun: Begun,
        status: JobStatus,
        error: dict | None,
        metadata: dict | None = None,
    ) -> None:
        """End a job that never ran under this attempt."""
        if error:  # its message may quote anything, at any length
            error = error | {"message": error["message"][:MAX_REASON_CHARS]}
        event = TerminalEvent(
            position=begun.position,
            status=status,
            job_id=job_id,
            finish_reason=str(FinishReason.ERROR if status is JobStatus.FAILED else FinishReason.ABORT),
            error=error,
            usage={"num_output_tokens": begun.position},
            timings={"queue_ms": begun.now - begun.submitted_at, "attempts": begun.attempt},
            metadata=metadata,
        )
        bury = (error or {}).get("code") in (ErrorCode.WORKER_LOST, ErrorCode.BAD_RECORD)
        answer = await self.end(
            queue, Finish(entry, begun.attempt, event, reply_to, bury, begun.idempotency_key)
        )
        if bury and answer == event.position:
            self._metrics.dead_letters.inc()

    async def bury(
        self,
        queue: Queue,
        entry: Entry,
        code: ErrorCode,
        reason: str,
        *,
        job_id: str | None = None,
        metadata: dict[str, Any] | None = None,
    ) -> None:
        """To the dead letters, since no terminal event can be written under the job's own keys. Its record
        ends, if the job has an id that can be read and its record is one.

        Where these are none either, the entry stays: whoever claims it after a lease tries again.
        """
        of_job = {"job_id": job_id, "metadata": metadata}
        try:
            buried = await until_served("bury", lambda: queue.bury(entry, str(code), reason, **of_job))
        except ResponseError as error:
            log_event(logger, logging.ERROR, "entry not buried", entry=entry.id, code=str(code), error=error)
            return
        if buried:
            self._metrics.dead_letters.inc()
            log_event(logger, logging.WARNING, "entry buried", entry=entry.id, code=str(code), reason=reason)

    async def refuse(self, job: RunningJob, fault: InvalidRequest) -> None:
        """End a job that the engine would not take."""
        error = {"code": str(fault.code), "message": str(fault)}
        reply_to, metadata = job.job.reply_to, job.job.metadata
        await self.reject(
            job.queue, job.entry, job.id, reply_to, job.begun, JobStatus.FAILED, error, metadata
        )
        self._jobs.remove(job)

    async def _append_to(self, queue: Queue, calls: list[tuple[RunningJob, Append]]) -> None:
        """Until each job's log has all of its events, or the job is known to be ours no more."""
        while calls:
            appends = [append for _, append in calls]
            answers = await until_served("append", lambda: queue.append(appends))  # noqa: B023
            answered = zip(calls, answers, strict=True)
            calls, written = [], []
            for (job, append), answer in answered:
                if answer == append.position:
                    job.position = answer
                    written.append((job, append))
                    goes_on = answer < job.sent.end
                else:
                    goes_on = await self._still_ours(job, answer)
                if goes_on and (following := job.sent.after(job.position)):
                    calls.append((job, following))
            self._measure(written)

    async def _still_ours(self, job: RunningJob, answer: int | Refusal) -> bool:
        """Act on an answer of `append` that is not the position asked for. Whether the job goes on here."""
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
        """The server came back with an older log, which ends at `position`. Whether the job is still ours.

        What is lost is written again from what we keep. Where that is not all of it, the job is given back:
        whoever goes on with it makes the tokens again, as after the death of a worker, or finds that record
        and log do not fit. What no server does, but somebody who writes there, buries the job.
        """
        job.num_rollbacks += 1
        if job.num_rollbacks > MAX_ROLLBACKS:
            await self._bury_running(job)
            return False
        log_event(logger, logging.WARNING, "log went back", job_id=job.id, to=position, position=job.position)
        self._metrics.log_rollbacks.inc()
        if position < job.position and job.sent.goes_on_from(position):
            job.position = position
            return True
        self._abort(job.seq_id)
        await release_job(self._jobs, job)
        return False

    async def _bury_running(self, job: RunningJob) -> None:
        """Its log cannot be written any more."""
        self._discard(job)
        reason = BAD_RECORD.format("its record or its log is of another kind, or was changed")
        code, metadata = ErrorCode.BAD_RECORD, job.job.metadata
        await self.bury(job.queue, job.entry, code, reason, job_id=job.id, metadata=metadata)

    def _measure(self, written: list[tuple[RunningJob, Append]]) -> None:
        """A step at a time, since a metric takes its lock each time it is told something."""
        now = time.monotonic()
        latencies: Counter[float] = Counter()
        """Tokens by how long one took after the one before, in seconds."""
        num_written = 0
        for job, append in written:
            num_tokens = append.position - append.start
            num_written += num_tokens
            if job.last_commit is not None:
                latencies[(now - job.last_commit) / num_tokens] += num_tokens
            elif not job.begun.first_token_at:
                job.first_token_ms = job.since_submit_ms
                self._metrics.first_token(job.first_token_ms / 1000)
            job.last_commit = now
        for seconds, count in latencies.items():
            self._metrics.between_tokens(seconds, count)
        self._metrics.output_tokens.inc(num_written)

    def lease_answered(self, job: RunningJob, answer: Refusal) -> None:
        """Its lease was not simply renewed. Of a job that we are about to give up, that is no news."""
        if self._jobs.by_seq(job.seq_id) is not job or job.is_releasing or job.is_finishing:
            return
        match answer:
            case Refusal.STALE:
                self.drop(job)
            case Refusal.CANCELLED:
                self.cancel(job)

    def cancel(self, job: RunningJob) -> None:
        if job.ending is not JobStatus.CANCELLED:
            job.ending = JobStatus.CANCELLED
            self._abort(job.seq_id)

    def drop(self, job: RunningJob) -> None:
        """Somebody else holds the job now. Not a word to Redis about it."""
        if self._jobs.by_seq(job.seq_id) is not job:
            return
        log_event(logger, logging.WARNING, "job fenced", job_id=job.id, attempt=job.attempt)
        self._metrics.fenced_writes.inc()
        self._discard(job)

    def _discard(self, job: RunningJob) -> None:
        """It goes on here no more, and nothing is written of that."""
        self._jobs.remove(job)
        self._abort(job.seq_id)

    async def _finish_job(self, job: RunningJob, output: SeqOutput) -> None:
        """Until the job has ended, or is known to be ours no more. A log that is found too short is written
        again first."""
        job.is_finishing = True
        goes_on = True
        while goes_on:
            event = terminal_event(job, output)
            key = job.begun.idempotency_key
            finish = Finish(job.entry, job.attempt, event, job.job.reply_to, idempotency_key=key)
            goes_on = False
            match await self.end(job.queue, finish):
                case Refusal.STALE:
                    self.drop(job)
                case Refusal.BROKEN:  # buried
                    self._discard(job)
                case job.position:
                    self._jobs.remove(job)
                case int(position):
                    goes_on = await self._write_again(job, position)

    async def _write_again(self, job: RunningJob, position: int) -> bool:
        """All that a log lacks which ends at `position`. Whether the job is still ours."""
        if not await self._roll_back(job, position):
            return False
        if append := job.sent.after(job.position):
            await self._append_to(job.queue, [(job, append)])
        return self._jobs.by_seq(job.seq_id) is job


def terminal_event(job: RunningJob, output: SeqOutput) -> TerminalEvent:
    """How a job ends whose sequence has ended."""
    status, finish_reason, error = _ending(job, output)
    if job.begun.first_token_at:
        first_token_ms = float(job.begun.first_token_at - job.begun.submitted_at)
    else:
        first_token_ms = job.first_token_ms
    return TerminalEvent(
        position=job.position,
        status=status,
        job_id=job.id,
        # Text that is held back belongs to the tokens before it; a cancelled job may lack some of those.
        text="" if status is JobStatus.CANCELLED else output.final_text,
        finish_reason=str(finish_reason),
        error=error,
        usage={
            "num_prompt_tokens": output.num_prompt_tokens,
            "num_cached_tokens": output.num_cached_tokens,
            "num_output_tokens": job.position,
        },
        timings={
            "queue_ms": job.begun.now - job.begun.submitted_at,
            "first_token_ms": round(first_token_ms, 1) if first_token_ms is not None else None,
            "total_ms": round(job.since_submit_ms, 1),
            "attempts": job.attempt,
        },
        metadata=job.job.metadata,
    )


def _ending(job: RunningJob, output: SeqOutput) -> tuple[JobStatus, FinishReason, dict | None]:
    if job.ending is JobStatus.CANCELLED:
        return JobStatus.CANCELLED, FinishReason.ABORT, None
    if output.finish_reason is FinishReason.ABORT:
        return JobStatus.EXPIRED, FinishReason.ABORT, deadline_error(job.job.deadline_ms)
    if output.finish_reason is FinishReason.ERROR:
        error = {"code": str(ErrorCode.ENGINE_ERROR), "message": str(output.stop_reason)}
        return JobStatus.FAILED, FinishReason.ERROR, error
    return JobStatus.FINISHED, output.finish_reason, None
