"""Calls of producers and operators: scripts that submit, cancel, delete and requeue, and `partition.lua`."""

from dataclasses import dataclass
from enum import StrEnum

from ingine.contract.calls.script_call import ScriptCall
from ingine.contract.control import nudge
from ingine.contract.events import TerminalEvent, encode_event
from ingine.contract.jobs import (
    DEFAULT_MAX_JOB_BYTES,
    DEFAULT_MAX_QUEUED_BYTES,
    DEFAULT_MAX_QUEUED_JOBS,
    MAX_JOB_BYTES,
    Job,
)
from ingine.contract.keys import GROUP, Keys
from ingine.contract.scripts import read_script


class SubmitVerdict(StrEnum):
    """What `submit` decided about a job. Below each: what `SubmitReply.detail` holds."""

    ACCEPTED = "accepted"
    """The job's id."""
    SAME = "same"
    """The id of the job that was submitted before with this idempotency key."""
    PARTITIONS = "partitions"
    """The queue's present number of partitions: the job belongs to another one."""
    DUPLICATE = "duplicate"
    """Nothing. There is a job with this id."""
    FULL = "full"
    """The limit of jobs, `max_jobs`."""
    FULL_BYTES = "full_bytes"
    """The limit of bytes, `max_bytes`."""
    TOO_LARGE = "too_large"
    """The limit of one job's bytes."""
    RATE = "rate"
    """How long to wait, in ms."""


@dataclass(frozen=True, slots=True)
class SubmitReply:
    verdict: SubmitVerdict
    detail: str


class RequeueVerdict(StrEnum):
    """What `requeue` did with a dead letter. Below each: what `RequeueReply.detail` holds."""

    REQUEUED = "requeued"
    """The id of the new entry."""
    MISSING = "missing"
    """Nothing. There is no such dead letter."""
    KNOWN = "known"
    """The status of the job that has the dead letter's job id."""
    NO_JOB = "no_job"
    """Nothing. The dead letter has no field `job`."""


@dataclass(frozen=True, slots=True)
class RequeueReply:
    verdict: RequeueVerdict
    detail: str


def sources() -> list[str]:
    """Return the source of each of these scripts: servers report errors by the line of a script."""
    return [read_script(name) for name in ("submit", "cancel", "delete", "requeue", "partition")]


def submit(
    keys: Keys,
    job: Job,
    raw: bytes,
    *,
    nonce: str,
    cost: int,
    idempotency_key: str | None = None,
    num_partitions: int = 1,
    same: str | None = None,
) -> ScriptCall[SubmitReply]:
    """Submit `job`, whose encoding is `raw`.

    nonce: identifies the submission if it is sent twice. cost: the job's tokens, for fair shares.
    num_partitions: the number that the producer knows. same: the job id of an earlier reply with
    SubmitVerdict.SAME, to make the reply final.
    """
    touched = [
        keys.job(job.id),
        keys.settings,
        keys.jobs(job.priority),
        *keys.all_jobs,
        keys.delayed,
        keys.bytes,
        keys.rate(job.tenant or ""),
        keys.deadlines,
        keys.idem(idempotency_key or ""),
    ]
    if same is not None:
        touched.append(keys.job(same))
    args = [
        job.id,
        raw,
        str(job.priority),
        nonce,
        job.reply_to or "",
        idempotency_key or "",
        DEFAULT_MAX_QUEUED_JOBS,
        DEFAULT_MAX_JOB_BYTES,
        DEFAULT_MAX_QUEUED_BYTES,
        num_partitions,
        job.tenant or "",
        cost,
        job.not_before_ms or 0,
        MAX_JOB_BYTES,
        job.deadline_ms or 0,
        same or "",
        job.sampling.n,
    ]
    return ScriptCall(read_script("submit"), touched, args, _read_submitted)


def _read_submitted(reply: list[bytes]) -> SubmitReply:
    verdict, detail = reply
    return SubmitReply(SubmitVerdict(verdict.decode()), detail.decode(errors="replace"))


def cancel(
    keys: Keys,
    job_id: str,
    *,
    event: TerminalEvent,
    reply_to: str | None,
    idempotency_key: str | None,
    result_ttl_ms: int,
    bare: tuple[str, str] | None = None,
) -> ScriptCall[str]:
    """Cancel a job. Returns `cancelled`, `requested`, `unknown`, or the status in which it had ended.

    event: the terminal event of a job that no worker has begun. bare: entry id and priority of a job without
    a record, which was added by a bare XADD.
    """
    touched = [
        keys.job(job_id),
        keys.tokens(job_id),
        *keys.all_jobs,
        keys.delayed,
        keys.bytes,
        keys.deadlines,
        keys.replies(reply_to or ""),
        keys.idem(idempotency_key or ""),
    ]
    args = [
        GROUP,
        encode_event(event),
        keys.channel(job_id),
        result_ttl_ms,
        int(bool(reply_to)),
        keys.control,
        nudge("cancel", job_id=job_id),
        job_id,
        int(bool(idempotency_key)),
        *(bare or ()),
    ]
    return ScriptCall(read_script("cancel"), touched, args, bytes.decode)


def delete(keys: Keys, job_id: str) -> ScriptCall[str]:
    """Delete a job that has ended. Returns `deleted`, `unknown`, or the status of one that has not."""
    return ScriptCall(read_script("delete"), [keys.job(job_id), keys.tokens(job_id)], [], bytes.decode)


def requeue(keys: Keys, letter_id: str, *, stream: str, job_id: str | None) -> ScriptCall[RequeueReply]:
    """Put a dead letter back into `stream`, the jobs stream that it came from. job_id: None if unreadable."""
    touched = [keys.dead, stream]
    if job_id is not None:
        touched.append(keys.job(job_id))

    def read(reply: list[bytes]) -> RequeueReply:
        verdict, detail = (part.decode(errors="replace") for part in reply)
        return RequeueReply(RequeueVerdict(verdict), detail)

    return ScriptCall(read_script("requeue"), touched, [letter_id], read)


def partition(keys: Keys, *, number: int | None) -> ScriptCall[str]:
    """Announce a new number of partitions to producers, if this partition is empty. None: only check that.

    Returns what the partition holds, '' if it is empty.
    """
    touched = [keys.settings, *keys.all_jobs, keys.delayed, keys.dead]
    return ScriptCall(read_script("partition"), touched, [] if number is None else [number], bytes.decode)
