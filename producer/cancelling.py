"""The call of `scripts/cancel.lua`, for one job or for many."""

from typing import Any

from ingine.contract.control import nudge
from ingine.contract.events import TerminalEvent, encode_event
from ingine.contract.jobs import DEFAULT_RESULT_TTL_S
from ingine.contract.keys import GROUP, Keys
from ingine.contract.record import JobStatus


def cancel_call(
    keys: Keys,
    job_id: str,
    *,
    reply_to: str | None,
    idempotency_key: str | None,
    metadata: dict[str, Any] | None,
    bare: tuple[str, str] | None = None,
) -> tuple[list[str], list[Any]]:
    """KEYS and ARGV. `metadata`: for the terminal event of a job that no worker has begun.

    bare: entry and priority of one without a record, which came by a bare XADD.
    """
    end = TerminalEvent(
        position=0, status=JobStatus.CANCELLED, job_id=job_id, finish_reason="abort", metadata=metadata
    )
    touched = [keys.job(job_id), keys.tokens(job_id), *keys.all_jobs, keys.delayed, keys.bytes]
    touched += [keys.deadlines, keys.replies(reply_to or ""), keys.idem(idempotency_key or "")]
    return touched, [
        GROUP,
        encode_event(end),
        keys.channel(job_id),
        DEFAULT_RESULT_TTL_S * 1000,
        int(bool(reply_to)),
        keys.control,
        nudge("cancel", job_id=job_id),
        job_id,
        int(bool(idempotency_key)),
        *(bare or ()),
    ]
