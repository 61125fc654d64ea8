"""Build the call that cancels a job. `AsyncClient.cancel` makes one, `purge_jobs` makes many together."""

from typing import Any

from ingine.contract.calls.producing import cancel
from ingine.contract.calls.script_call import ScriptCall
from ingine.contract.events import TerminalEvent
from ingine.contract.jobs import DEFAULT_RESULT_TTL_S
from ingine.contract.keys import Keys
from ingine.contract.record import JobStatus


def cancel_call(
    keys: Keys,
    job_id: str,
    *,
    reply_to: str | None,
    idempotency_key: str | None,
    metadata: dict[str, Any] | None,
    bare: tuple[str, str] | None = None,
) -> ScriptCall[str]:
    """Return the call that cancels a job; its reply is that of `cancel`.

    metadata: for the terminal event of a job that no worker has begun. bare: entry id and priority of a job
    without a record, which was added by a bare XADD.
    """
    event = TerminalEvent(
        position=0, status=JobStatus.CANCELLED, job_id=job_id, finish_reason="abort", metadata=metadata
    )
    return cancel(
        keys,
        job_id,
        event=event,
        reply_to=reply_to,
        idempotency_key=idempotency_key,
        result_ttl_ms=DEFAULT_RESULT_TTL_S * 1000,
        bare=bare,
    )
