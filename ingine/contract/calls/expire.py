"""The two calls of `expire.lua`: read a job whose deadline may have passed, then end it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ingine.contract.calls.script_call import Reply, ScriptCall
from ingine.contract.events import TerminalEvent, encode_event
from ingine.contract.keys import GROUP, Keys
from ingine.contract.scripts import read_script


@dataclass(frozen=True, slots=True)
class Due:
    """A job to end: its deadline has passed and no worker runs it. Times are in ms since 1970."""

    job_id: str
    position: int
    """Committed output tokens."""
    attempt: int
    submitted_at: int | None
    deadline_at: int
    reply_to: str
    """'' if the job has no replies stream."""
    idempotency_key: str
    """'' if it was submitted without one."""
    raw: bytes
    """The msgpack job. Empty if it has more bytes than the call asked for, or is gone."""


def read_due(keys: Keys, job_id: str, *, max_bytes: int) -> ScriptCall[Due | str]:
    """Read a job if it is to be ended, with the job itself if that has `max_bytes` at most.

    Returns a Due, or why it is not to be ended: the status in which it has ended, `early` (its deadline has
    not passed), `running`, `unknown` (it has no record) or `broken` (its keys hold something else).
    """

    def read(reply: list[bytes]) -> Due | str:
        return _read_due(job_id, reply[1:]) if reply[0] == b"due" else _read_answer(reply)

    return _expire(keys, job_id, max_bytes, [], [], read)


def end_due(keys: Keys, due: Due, *, event: TerminalEvent, result_ttl_ms: int) -> ScriptCall[str]:
    """End a job that `read_due` returned. `event` is its terminal event.

    Returns `expired`, `moved` if the job has another position by now (read it again), or as `read_due`.
    """
    touched = [
        keys.tokens(due.job_id),
        keys.delayed,
        keys.bytes,
        keys.replies(due.reply_to),
        keys.idem(due.idempotency_key),
    ]
    args = [
        due.position,
        encode_event(event),
        keys.channel(due.job_id),
        result_ttl_ms,
        int(due.reply_to != ""),
        int(due.idempotency_key != ""),
    ]
    return _expire(keys, due.job_id, "", touched, args, _read_answer)


def _expire(
    keys: Keys,
    job_id: str,
    max_bytes: int | str,
    more_keys: list[str],
    more_args: list[str | int | bytes],
    read_reply: Callable[[list[bytes]], Reply],
) -> ScriptCall[Reply]:
    touched = [*keys.all_jobs, keys.job(job_id), keys.deadlines, *more_keys]
    args = [GROUP, job_id, max_bytes, *more_args]
    return ScriptCall(read_script("expire"), touched, args, read_reply)


def _read_answer(reply: list[bytes]) -> str:
    return reply[0].decode(errors="replace")


def _read_due(job_id: str, fields: Sequence[bytes]) -> Due:
    *texts, raw = fields
    position, attempt, submitted_at, deadline_at, reply_to, idempotency_key = (
        text.decode(errors="replace") for text in texts
    )
    return Due(
        job_id,
        int(position),
        int(attempt),
        int(submitted_at) if submitted_at else None,
        int(deadline_at),
        reply_to,
        idempotency_key,
        raw,
    )
