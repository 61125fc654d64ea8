"""Calls for the jobs that a worker runs: `append.lua`, `finish.lua` and `renew.lua`."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import Enum

from ingine.contract.calls.script_call import ScriptCall
from ingine.contract.entries import Entry
from ingine.contract.events import TerminalEvent, TokensEvent, encode_event
from ingine.contract.keys import GROUP, Keys
from ingine.contract.scripts import read_script


class Refusal(Enum):
    """Why `append` or `finish` wrote nothing, or the state of a job that `renew` reports."""

    STALE = -1
    """The attempt is not ours any more."""
    CANCELLED = -2
    """A client has requested to cancel the job: it takes no more tokens. `renew` has renewed its lease."""
    BROKEN = -3
    """The job's keys hold values of another type or kind: nothing can ever be written there."""


class Append:
    """The tokens of one choice that a step commits, encoded: log probabilities take three times as much
    memory before they are encoded.

    A worker makes one for each token. It is no dataclass, since one with computed fields takes twice as long.
    """

    __slots__ = (
        "attempt",
        "choice_position",
        "finish_reason",
        "index",
        "job_id",
        "position",
        "publish",
        "raw",
        "start",
        "stop_reason",
    )

    def __init__(self, job_id: str, attempt: int, event: TokensEvent, publish: bool):
        self.job_id = job_id
        self.attempt = attempt
        self.publish = publish
        """Publish the event on the job's channel too."""
        self.position = event.position
        """Output tokens committed after it."""
        self.start = event.position - len(event.token_ids)
        """Output tokens committed before it."""
        self.index = event.index
        self.choice_position = event.choice_position
        self.finish_reason, self.stop_reason = event.finish_reason, event.stop_reason
        self.raw = encode_event(event)


@dataclass(frozen=True, slots=True)
class Finish:
    """The end of a job's attempt."""

    entry: Entry
    attempt: int
    event: TerminalEvent
    reply_to: str | None
    bury: bool = False
    """Copy the job, with the event's error, to the dead letters."""
    idempotency_key: str | None = None
    """The key from the reply of `begin`. It expires together with the result."""


def append(keys: Keys, appends: Sequence[Append], *, worker_id: str) -> ScriptCall[list[int | Refusal]]:
    """Commit one step's tokens. Returns for each append the number of tokens in the log, or why not.

    The append was written if that number is its position. Any other number: the log ends there. Several
    appends of one job are written in their order; where the reply to an earlier call of the same appends was
    lost, the answer to each is the number after the last of them.
    """
    job_key, log_key, channel_name = keys.job(""), keys.tokens(""), keys.channel("")
    touched: list[str] = []
    args: list[str | int | bytes] = [worker_id]
    for each in appends:
        job_id = each.job_id
        touched += (job_key + job_id, log_key + job_id)
        channel = channel_name + job_id if each.publish else ""
        args += (each.attempt, each.start, each.position, each.raw, channel)
    return ScriptCall(read_script("append"), touched, args, _read_positions)


def finish(keys: Keys, end: Finish, *, worker_id: str, result_ttl_ms: int) -> ScriptCall[int | Refusal]:
    """End a job. Returns the number of tokens in its log, or Refusal.STALE.

    The job has ended if that number is the event's position. Any other number: the log ends there.
    """
    event, job_id = end.event, end.event.job_id
    touched = [
        keys.jobs(end.entry.priority),
        keys.job(job_id),
        keys.tokens(job_id),
        keys.bytes,
        keys.dead,
        keys.deadlines,
        keys.replies(end.reply_to or ""),
        keys.idem(end.idempotency_key or ""),
    ]
    error = (event.error or {}) if end.bury else {}
    args = [
        GROUP,
        end.entry.id,
        end.attempt,
        event.position,
        event.status,
        encode_event(event),
        keys.channel(job_id),
        result_ttl_ms,
        int(end.reply_to is not None),
        worker_id,
        error.get("code", ""),
        error.get("message", ""),
        job_id,
        int(end.idempotency_key is not None),
    ]
    return ScriptCall(read_script("finish"), touched, args, _read_position)


def renew(
    keys: Keys, jobs: Iterable[tuple[Entry, str, int]], *, worker_id: str
) -> ScriptCall[list[Refusal | None]]:
    """Renew the leases of jobs, each given by entry, job id and attempt.

    Returns for each None where its lease was renewed, else Refusal.STALE or Refusal.CANCELLED.
    """
    touched: list[str] = []
    args: list[str | int] = [GROUP, worker_id]
    for entry, job_id, attempt in jobs:
        touched += (keys.jobs(entry.priority), keys.job(job_id))
        args += (entry.id, attempt)
    return ScriptCall(read_script("renew"), touched, args, _read_leases)


def _read_position(number: int) -> int | Refusal:
    return number if number >= 0 else Refusal(number)


def _read_positions(reply: list[int]) -> list[int | Refusal]:
    return [_read_position(number) for number in reply]


def _read_leases(reply: list[int]) -> list[Refusal | None]:
    return [Refusal(number) if number else None for number in reply]
