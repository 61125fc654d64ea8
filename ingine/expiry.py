"""End jobs whose deadline has passed and that nobody runs. Workers do it, and clients that wait for a job."""

from collections.abc import Iterable, Sequence
from contextlib import suppress
from typing import Any

from ingine.errors import ErrorCode, InvalidJob
from ingine.keys import GROUP, JOB_FIELD, Keys
from ingine.scripts import read_script
from ingine.wire import JobStatus, TerminalEvent, decode_job, encode_event

MAX_EXPIRED = 100
"""Jobs that one call of `expire_due` looks at."""

MAX_ATTEMPTS = 5
"""How often a job is read again that has moved on in between."""

_FIELDS = ("status", "position", "priority", "entry", "raw", "reply_to", "idempotency_key")
_NUMBERS = ("attempt", "submitted_at", "deadline_at")


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
    `running`, `unknown`, `broken`; `moved` for one that was written to again and again meanwhile.
    """
    answers: dict[str, str] = dict.fromkeys(job_ids, "moved")
    for _ in range(MAX_ATTEMPTS):
        if moved := [job_id for job_id, answer in answers.items() if answer == "moved"]:
            answers |= await _expire(redis, keys, moved, int(result_ttl_s * 1000))
    return answers


async def _expire(redis: Any, keys: Keys, job_ids: Sequence[str], ttl_ms: int) -> dict[str, str]:
    """Each once. Four round trips at most, however many there are."""
    records, now_ms = await _records(redis, keys, job_ids)
    raws = await _raw_jobs(redis, keys, records)
    pipeline = redis.pipeline(transaction=False)
    script = redis.register_script(read_script("ingine", "expire"))
    # Known to every server but one that is new or has just started; then this is what it needs.
    pipeline.script_load(script.script)
    for job_id, record in records.items():
        event = _event(job_id, record, raws.get(job_id), now_ms)
        touched = [
            *keys.all_jobs,
            keys.job(job_id),
            keys.tokens(job_id),
            keys.delayed,
            keys.deadlines,
            keys.bytes,
        ]
        touched += [keys.replies(record["reply_to"]), keys.idem(record["idempotency_key"])]
        args = [GROUP, job_id, event.position, encode_event(event), keys.channel(job_id), ttl_ms]
        args += [int(record["reply_to"] != ""), int(record["idempotency_key"] != "")]
        pipeline.evalsha(script.sha, len(touched), *touched, *args)
    _, *answers = await pipeline.execute()
    return {job_id: answer.decode() for job_id, answer in zip(records, answers, strict=True)}


async def _records(redis: Any, keys: Keys, job_ids: Sequence[str]) -> tuple[dict[str, dict[str, Any]], int]:
    """What the records say, and the server's time in ms. Of what is no record: nothing."""
    pipeline = redis.pipeline(transaction=False)
    pipeline.time()
    for job_id in job_ids:
        pipeline.hmget(keys.job(job_id), *_FIELDS, *_NUMBERS)
    (now_s, now_us), *answers = await pipeline.execute(raise_on_error=False)
    records = {}
    for job_id, answer in zip(job_ids, answers, strict=True):
        values = [None] * len(_FIELDS + _NUMBERS) if isinstance(answer, Exception) else answer
        record: dict[str, Any] = dict(zip(_FIELDS, values, strict=False))
        record |= {name: (record[name] or b"").decode(errors="replace") for name in _FIELDS if name != "raw"}
        record |= zip(_NUMBERS, map(_number, values[len(_FIELDS) :]), strict=True)
        records[job_id] = record
    return records, now_s * 1000 + now_us // 1000


async def _raw_jobs(redis: Any, keys: Keys, records: dict[str, dict[str, Any]]) -> dict[str, bytes]:
    """The jobs as they were sent, where they can be had: their metadata belongs into their last event."""
    found = {job_id: record["raw"] for job_id, record in records.items() if record["raw"]}
    by_stream = dict(zip(("high", "normal", "low"), keys.all_jobs, strict=True))
    pipeline, asked = redis.pipeline(transaction=False), []
    for job_id, record in records.items():
        if job_id not in found and record["entry"] and record["priority"] in by_stream:
            pipeline.xrange(by_stream[record["priority"]], min=record["entry"], max=record["entry"])
            asked.append(job_id)
    for job_id, entries in zip(asked, await pipeline.execute(raise_on_error=False), strict=True):
        if isinstance(entries, list) and entries:
            found[job_id] = entries[0][1].get(JOB_FIELD.encode(), b"")
    return found


def _event(job_id: str, record: dict[str, Any], raw: bytes | None, now_ms: int) -> TerminalEvent:
    metadata = None
    if raw:
        with suppress(InvalidJob):  # from a newer producer perhaps
            metadata = decode_job(raw, max_bytes=len(raw)).metadata
    position = _number(record["position"].encode())
    return TerminalEvent(
        position=position,
        status=JobStatus.EXPIRED,
        job_id=job_id,
        finish_reason="abort",
        error=deadline_error(record["deadline_at"] - record["submitted_at"]),
        usage={"num_output_tokens": position},
        timings={"total_ms": max(0, now_ms - record["submitted_at"]), "attempts": record["attempt"]},
        metadata=metadata,
    )


def _number(value: bytes | None) -> int:
    """0 for what is none: anybody may have written it."""
    return int(value) if value and value.isdigit() else 0
