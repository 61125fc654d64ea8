"""The terminal event of a job that is buried: clients get it, though its log cannot be written."""

from dataclasses import dataclass
from typing import Any

from redis.asyncio import Redis
from redis.exceptions import ResponseError

from ingine.contract.entries import Entry
from ingine.contract.events import TerminalEvent
from ingine.contract.faults import MAX_REASON_CHARS
from ingine.contract.jobs import read_reply_to
from ingine.contract.keys import Keys
from ingine.contract.record import JobStatus
from ingine.engine.outputs import FinishReason
from ingine.worker.retry import never_passes


@dataclass(frozen=True, slots=True)
class Ending:
    """The terminal event of a job that is buried, and where it is sent."""

    event: TerminalEvent
    reply_to: str | None
    idempotency_key: str | None


async def ending_of(
    redis: Redis,
    keys: Keys,
    entry: Entry,
    job_id: str,
    error: dict[str, str],
    metadata: dict[str, Any] | None,
) -> Ending:
    """Build the ending of the job in `entry`.

    Its record and its bytes may be damaged. They are not decoded, since that may be what failed.
    """
    position = key = None
    try:
        position, key = await redis.hmget(keys.job(job_id), "position", "idempotency_key")
    except ResponseError as error_reply:
        if not never_passes(error_reply):
            raise
    num_tokens = int(position) if position and position.isdigit() and len(position) < 16 else 0
    event = TerminalEvent(
        position=num_tokens,
        status=JobStatus.FAILED,
        job_id=job_id,
        finish_reason=str(FinishReason.ERROR),
        error=error | {"message": error["message"][:MAX_REASON_CHARS]},
        usage={"num_output_tokens": num_tokens},
        metadata=metadata,
    )
    return Ending(event, read_reply_to(entry.raw), _short(key))


def _short(key: bytes | None) -> str | None:
    """Decode an idempotency key, which becomes part of a key. None if it is too long."""
    return key.decode(errors="replace") if key and len(key) <= 1024 else None
