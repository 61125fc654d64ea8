"""End jobs whose deadline has passed and that nobody runs. Workers do it, and clients that wait for a job."""

from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from ingine.contract.events import TerminalEvent, encode_event
from ingine.contract.jobs import MAX_JOB_BYTES, decode_job
from ingine.contract.keys import GROUP, Keys
from ingine.contract.record import JobStatus
from ingine.contract.scripts import read_script
from ingine.errors import ErrorCode, InvalidJob

MAX_EXPIRED = 100
"""Jobs that one call of `expire_due` looks at."""

MAX_ATTEMPTS = 5
"""How often a job is looked at again that has moved on in between."""

MAX_BYTES_AT_ONCE = 64 << 10
"""Jobs up to this size come with the first look, since their metadata belongs into their last
event. Larger ones are read one at a time."""


@dataclass(frozen=True, slots=True)
class _Due:
    """A job that is to be ended, as `expire.lua` has read it: its numbers are numbers."""

    job_id: str
    position: int
    attempt: int
    submitted_at: int | None
    deadline_at: int
    reply_to: str
    idempotency_key: str
    raw: bytes

    @classmethod
    def read(cls, job_id: str, fields: Sequence[bytes]) -> "_Due":
        *texts, raw = fields
        position, attempt, submitted_at, deadline_at, reply_to, idempotency_key = (
            text.decode(errors="replace") for text in texts
        )
        submitted = int(submitted_at) if submitted_at else None
        numbers = int(position), int(attempt), submitted, int(deadline_at)
        return cls(job_id, *numbers, reply_to, idempotency_key, raw)


def deadline_error(deadline_ms: int | None) -> dict[str, str]:
    """What the terminal event of an expired job says. `deadline_ms` counts from its submission."""
    message = f"not finished {deadline_ms} ms after it was submitted"
    return {"code": str(ErrorCode.DEADLINE_EXCEEDED), "message": message}


async def expire_due(redis: Any, keys: Keys, *, result_ttl_s: float) -> bool:
    """End the jobs of a partition that are due. Whether there may be more of them: call it again then.

    `redis`: an asyncio client. Raises what it does.
    """
    now_s, _ = await redis.time()
    due = await redis.zrange(keys.deadlines, "-inf", now_s * 1000, byscore=True, offset=0, num=MAX_EXPIRED)
    job_ids = [job_id.decode() for job_id in due if job_id.isascii()]
    if foreign := [job_id for job_id in due if not job_id.isascii()]:  # by hand: no job has such an id
        await redis.zrem(keys.deadlines, *foreign)
    await expire(redis, keys, job_ids, result_ttl_s=result_ttl_s)
    return len(due) == MAX_EXPIRED


async def expire(redis: Any, keys: Keys, job_ids: Iterable[str], *, result_ttl_s: float) -> dict[str, str]:
    """End those of these jobs of a partition whose deadline has passed and that nobody runs.

    Returns what `expire.lua` answers for each: `expired`, another status in which it has ended, `early`,
    `running`, `unknown`, `broken`; `moved` for one that was written to again and again meanwhile. What the
    server refuses for one job alone is `broken`, too; it is raised if it refuses all of them.
    """
    answers: dict[str, str] = dict.fromkeys(job_ids, "moved")
    for _ in range(MAX_ATTEMPTS):
        if not (moved := [job_id for job_id, answer in answers.items() if answer == "moved"]):
            break
        due = []
        for job_id, (answer, *fields) in (await _look(redis, keys, moved)).items():
            if answer == b"due":
                due.append(_Due.read(job_id, fields))
            else:
                answers[job_id] = answer.decode(errors="replace")
        answers |= await _end(redis, keys, due, int(result_ttl_s * 1000))
    return answers


async def _look(
    redis: Any, keys: Keys, job_ids: Sequence[str], max_bytes: int = MAX_BYTES_AT_ONCE
) -> dict[str, list[bytes]]:
    calls = {
        job_id: ([*keys.all_jobs, keys.job(job_id), keys.deadlines], [GROUP, job_id, max_bytes])
        for job_id in job_ids
    }
    return await _call(redis, calls)


async def _end(redis: Any, keys: Keys, due: Sequence[_Due], ttl_ms: int) -> dict[str, str]:
    now_s, now_us = await redis.time()
    calls = {}
    for job in due:
        raw = job.raw or await _read_job(redis, keys, job)
        event = _event(job, raw, now_s * 1000 + now_us // 1000)
        touched = [
            *keys.all_jobs,
            keys.job(job.job_id),
            keys.deadlines,
            keys.tokens(job.job_id),
            keys.delayed,
            keys.bytes,
            keys.replies(job.reply_to),
            keys.idem(job.idempotency_key),
        ]
        args = [GROUP, job.job_id, "", job.position, encode_event(event), keys.channel(job.job_id), ttl_ms]
        calls[job.job_id] = touched, [*args, int(job.reply_to != ""), int(job.idempotency_key != "")]
    return {job_id: answer.decode() for job_id, (answer, *_) in (await _call(redis, calls)).items()}


async def _call(redis: Any, calls: dict[str, tuple[list, list]]) -> dict[str, list[bytes]]:
    """`expire.lua` for each job, in one round trip."""
    if not calls:
        return {}
    pipeline = redis.pipeline(transaction=False)
    script = redis.register_script(read_script("expire"))
    # Known to every server but one that is new or has just started; then this is what it needs.
    pipeline.script_load(script.script)
    for touched, args in calls.values():
        pipeline.evalsha(script.sha, len(touched), *touched, *args)
    loaded, *answers = await pipeline.execute(raise_on_error=False)
    refusals = [answer for answer in answers if isinstance(answer, Exception)]
    if len(refusals) == len(answers):
        raise loaded if isinstance(loaded, Exception) else refusals[0]
    return {
        job_id: [b"broken"] if isinstance(answer, Exception) else answer
        for job_id, answer in zip(calls, answers, strict=True)
    }


async def _read_job(redis: Any, keys: Keys, job: _Due) -> bytes:
    """The job as it was sent; nothing where it cannot be had, or is larger than any may be."""
    [(answer, *fields)] = (await _look(redis, keys, [job.job_id], MAX_JOB_BYTES)).values()
    return fields[-1] if answer == b"due" else b""


def _event(job: _Due, raw: bytes, now_ms: int) -> TerminalEvent:
    metadata = None
    if raw:
        with suppress(InvalidJob):  # from a newer producer perhaps
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
