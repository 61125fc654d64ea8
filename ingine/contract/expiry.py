"""End jobs whose deadline has passed and that no worker runs.

Workers do it, and clients that wait for such a job.
"""

from collections.abc import Iterable, Sequence
from contextlib import suppress
from typing import Any, TypeVar

from ingine.contract.calls.expire import Due, end_due, read_due
from ingine.contract.calls.script_call import ScriptCall
from ingine.contract.events import TerminalEvent
from ingine.contract.jobs import MAX_JOB_BYTES, decode_job
from ingine.contract.keys import Keys
from ingine.contract.record import JobStatus
from ingine.errors import ErrorCode, InvalidJob

T = TypeVar("T")

MAX_EXPIRED = 100
"""Jobs that one call of `expire_due` examines."""

MAX_ATTEMPTS = 5
"""How often a job is read again that has changed between reading and ending it."""

MAX_BYTES_AT_ONCE = 64 << 10
"""Jobs up to this size are read together, since their metadata belongs in their terminal events. Larger jobs
are read one at a time."""


def deadline_error(deadline_ms: int | None) -> dict[str, str]:
    """The error in the terminal event of an expired job. `deadline_ms` counts from its submission."""
    message = f"not finished {deadline_ms} ms after it was submitted"
    return {"code": str(ErrorCode.DEADLINE_EXCEEDED), "message": message}


async def expire_due(redis: Any, keys: Keys, *, result_ttl_s: float) -> bool:
    """End the jobs of a partition that are due. Returns True if there may be more: call it again then.

    redis: an asyncio client. Raises its errors.
    """
    now_s, _ = await redis.time()
    due = await redis.zrange(keys.deadlines, "-inf", now_s * 1000, byscore=True, offset=0, num=MAX_EXPIRED)
    job_ids = [job_id.decode() for job_id in due if job_id.isascii()]
    # Added by hand: no job has an id that is not ASCII.
    if foreign := [job_id for job_id in due if not job_id.isascii()]:
        await redis.zrem(keys.deadlines, *foreign)
    await expire(redis, keys, job_ids, result_ttl_s=result_ttl_s)
    return len(due) == MAX_EXPIRED


async def expire(redis: Any, keys: Keys, job_ids: Iterable[str], *, result_ttl_s: float) -> dict[str, str]:
    """End those of these jobs of a partition whose deadline has passed and that no worker runs.

    Returns for each what `expire.lua` replied: `expired`, another status in which it has ended, `early`,
    `running`, `unknown` or `broken`; `moved` for a job that changed at each attempt. A job for which the
    server returned an error is `broken` too. Raises the error if the server returned one for every job.
    """
    answers: dict[str, str] = dict.fromkeys(job_ids, "moved")
    for _ in range(MAX_ATTEMPTS):
        if not (moved := [job_id for job_id, answer in answers.items() if answer == "moved"]):
            break
        due = []
        for job_id, answer in (await _read_due(redis, keys, moved)).items():
            if isinstance(answer, Due):
                due.append(answer)
            else:
                answers[job_id] = answer
        answers |= await _end(redis, keys, due, int(result_ttl_s * 1000))
    return answers


async def _read_due(
    redis: Any, keys: Keys, job_ids: Sequence[str], max_bytes: int = MAX_BYTES_AT_ONCE
) -> dict[str, Due | str]:
    return await _run_all(redis, {job_id: read_due(keys, job_id, max_bytes=max_bytes) for job_id in job_ids})


async def _end(redis: Any, keys: Keys, due: Sequence[Due], ttl_ms: int) -> dict[str, str]:
    now_s, now_us = await redis.time()
    calls = {}
    for job in due:
        raw = job.raw or await _read_job(redis, keys, job)
        event = _event(job, raw, now_s * 1000 + now_us // 1000)
        calls[job.job_id] = end_due(keys, job, event=event, result_ttl_ms=ttl_ms)
    return await _run_all(redis, calls)


async def _run_all(redis: Any, calls: dict[str, ScriptCall[T]]) -> dict[str, T | str]:
    """Make these calls of `expire.lua`, by job id, in one round trip."""
    if not calls:
        return {}
    pipeline = redis.pipeline(transaction=False)
    script = redis.register_script(next(iter(calls.values())).source)
    # A server that has just started does not have the script yet. To load it each time costs no round trip.
    pipeline.script_load(script.script)
    for call in calls.values():
        pipeline.evalsha(script.sha, len(call.keys), *call.keys, *call.args)
    loaded, *replies = await pipeline.execute(raise_on_error=False)
    refusals = [reply for reply in replies if isinstance(reply, Exception)]
    if len(refusals) == len(replies):
        raise loaded if isinstance(loaded, Exception) else refusals[0]
    return {
        job_id: "broken" if isinstance(reply, Exception) else call.read_reply(reply)
        for (job_id, call), reply in zip(calls.items(), replies, strict=True)
    }


async def _read_job(redis: Any, keys: Keys, job: Due) -> bytes:
    """Read the job as it was submitted. Returns b'' if it is gone, or larger than any job may be."""
    [answer] = (await _read_due(redis, keys, [job.job_id], MAX_JOB_BYTES)).values()
    return answer.raw if isinstance(answer, Due) else b""


def _event(job: Due, raw: bytes, now_ms: int) -> TerminalEvent:
    metadata = None
    if raw:
        with suppress(InvalidJob):  # a newer producer may have submitted it
            metadata = decode_job(raw, max_bytes=len(raw)).metadata
    submitted_at = min(now_ms, job.deadline_at if job.submitted_at is None else job.submitted_at)
    return TerminalEvent(
        position=job.position,
        status=JobStatus.EXPIRED,
        job_id=job.job_id,
        finish_reason="abort",
        error=deadline_error(job.deadline_at - submitted_at),
        usage={"num_output_tokens": job.position},
        timings={"total_ms": now_ms - submitted_at, "attempts": job.attempt},
        metadata=metadata,
    )
