"""The terminal event of a job: its status, its error, and what it used."""

from dataclasses import dataclass

from ingine.contract.events import TerminalEvent
from ingine.contract.expiry import deadline_error
from ingine.contract.faults import MAX_REASON_CHARS
from ingine.contract.record import JobStatus
from ingine.engine.outputs import FinishReason, SeqOutput
from ingine.errors import ErrorCode
from ingine.worker.choice_events import choice_ends, held_back
from ingine.worker.jobs import BegunJob, RunningJob


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a job ended."""

    status: JobStatus
    error: dict[str, str] | None = None
    """`code` and `message`; None for a job that was finished or cancelled."""

    @classmethod
    def failed(cls, code: ErrorCode, message: str) -> "Outcome":
        return cls(JobStatus.FAILED, {"code": str(code), "message": message})

    @classmethod
    def expired(cls, deadline_ms: int | None) -> "Outcome":
        """deadline_ms: the deadline that has passed, counted from the job's submission."""
        return cls(JobStatus.EXPIRED, deadline_error(deadline_ms))


def rejection_event(job: BegunJob, outcome: Outcome) -> TerminalEvent:
    """The terminal event of a job that never ran under this attempt."""
    begun, error = job.begun, outcome.error
    if error:  # its message may quote anything, at any length
        error = error | {"message": error["message"][:MAX_REASON_CHARS]}
    return TerminalEvent(
        position=begun.position,
        status=outcome.status,
        job_id=job.id,
        finish_reason=str(_early_finish_reason(outcome.status)),
        error=error,
        usage={"num_output_tokens": begun.position},
        timings={"queue_ms": begun.now - begun.submitted_at, "attempts": begun.attempt},
        metadata=job.metadata,
    )


def terminal_event(job: RunningJob, output: SeqOutput) -> TerminalEvent:
    """The terminal event of a running job. `output`: the last one of its sequence."""
    outcome = _outcome(job, output)
    is_finished = outcome.status is JobStatus.FINISHED
    # What was held back belongs to the tokens before it; the log of a cancelled job may lack some of them.
    with_text = outcome.status is not JobStatus.CANCELLED
    choices = choice_ends(job, with_text=with_text) if job.choices else None
    finish_reason, num_cached_tokens = output.finish_reason, output.num_cached_tokens
    if job.choices:
        finish_reason = choices[0]["finish_reason"]
        if first := job.choices[0].last_output:  # the others find the prompt that it has computed
            num_cached_tokens = first.num_cached_tokens
    return TerminalEvent(
        position=job.position,
        status=outcome.status,
        job_id=job.id,
        finish_reason=str(finish_reason if is_finished else _early_finish_reason(outcome.status)),
        stop_reason=output.stop_reason if is_finished and not choices else None,
        error=outcome.error,
        usage={
            "num_prompt_tokens": output.num_prompt_tokens,
            "num_cached_tokens": num_cached_tokens,
            "num_output_tokens": job.position,
        },
        timings=_timings(job),
        metadata=job.job.metadata,
        choices=choices,
        **(held_back(job, output) if with_text and not choices else {}),
    )


def _outcome(job: RunningJob, output: SeqOutput) -> Outcome:
    if job.ending is JobStatus.CANCELLED:
        return Outcome(JobStatus.CANCELLED)
    if output.finish_reason is FinishReason.ABORT:
        return Outcome.expired(job.job.deadline_ms)
    if output.finish_reason is FinishReason.ERROR:
        return Outcome.failed(output.error_code or ErrorCode.ENGINE_ERROR, str(output.stop_reason))
    return Outcome(JobStatus.FINISHED)


def _early_finish_reason(status: JobStatus) -> FinishReason:
    """The finish reason of a job that ended before its sequence was complete."""
    return FinishReason.ERROR if status is JobStatus.FAILED else FinishReason.ABORT


def _timings(job: RunningJob) -> dict[str, int | float | None]:
    begun = job.begun
    first_token_ms = job.first_token_ms
    if begun.first_token_at:  # an earlier attempt committed the first token
        first_token_ms = float(begun.first_token_at - begun.submitted_at)
    return {
        "queue_ms": begun.now - begun.submitted_at,
        "first_token_ms": round(first_token_ms, 1) if first_token_ms is not None else None,
        "total_ms": round(job.since_submit_ms, 1),
        "attempts": job.attempt,
    }
