"""What those who wait for a job are told where its end cannot be written into its log."""

from contextlib import suppress
from dataclasses import dataclass

from redis.asyncio import Redis
from redis.exceptions import ResponseError

from ingine.errors import InvalidJob
from ingine.job_faults import MAX_REASON_CHARS
from ingine.keys import Keys
from ingine.outputs import FinishReason
from ingine.wire import MAX_JOB_BYTES, JobStatus, TerminalEvent, decode_job, read_reply_to
from worker.entries import Entry
from worker.retry import never_passes


@dataclass(frozen=True, slots=True)
class Ending:
    """The last event of a job that is buried, and where it goes."""

    event: TerminalEvent
    reply_to: str | None
    idempotency_key: str | None


async def ending_of(redis: Redis, keys: Keys, entry: Entry, job_id: str, *, code: str, reason: str) -> Ending:
    """Of a job that lies in `entry`. Neither its record nor its bytes need be what they should."""
    position = key = None
    try:
        position, key = await redis.hmget(keys.job(job_id), "position", "idempotency_key")
    except ResponseError as error:
        if not never_passes(error):
            raise
    metadata = None
    with suppress(InvalidJob):
        metadata = decode_job(entry.raw, max_bytes=MAX_JOB_BYTES).metadata
    num_tokens = int(position) if position and position.isdigit() and len(position) < 16 else 0
    event = TerminalEvent(
        position=num_tokens,
        status=JobStatus.FAILED,
        job_id=job_id,
        finish_reason=str(FinishReason.ERROR),
        error={"code": code, "message": reason[:MAX_REASON_CHARS]},
        usage={"num_output_tokens": num_tokens},
        metadata=metadata,
    )
    return Ending(event, read_reply_to(entry.raw), _short(key))


def _short(key: bytes | None) -> str | None:
    """Anybody may have made it long, and it becomes part of a key."""
    return key.decode(errors="replace") if key and len(key) <= 1024 else None
