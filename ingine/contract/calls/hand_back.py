"""Calls by which a worker gives up an entry: `release.lua`, `delay.lua`, `park.lua` and `bury.lua`.

Each returns whether the entry, or the attempt, was still the worker's.
"""

from ingine.contract.calls.script_call import ScriptCall
from ingine.contract.entries import Entry
from ingine.contract.keys import GROUP, RELEASED, Keys, parked
from ingine.contract.scripts import read_script

NOT_BEGUN = 0
"""In place of an attempt, which counts from 1."""


def release(keys: Keys, entry: Entry, *, worker_id: str, job_id: str, attempt: int) -> ScriptCall[bool]:
    """Hand over a job that runs under `attempt`, for any worker to continue."""
    return _release(keys, entry, worker_id, job_id, attempt)


def release_unbegun(keys: Keys, entry: Entry, *, worker_id: str, job_id: str | None) -> ScriptCall[bool]:
    """Hand over an entry that was delivered to the worker and does not run there.

    The reply of an earlier `begin` may have been lost; its job is handed over all the same, without a death.
    job_id: None if it cannot be read.
    """
    return _release(keys, entry, worker_id, job_id or "", NOT_BEGUN)


def _release(keys: Keys, entry: Entry, worker_id: str, job_id: str, attempt: int) -> ScriptCall[bool]:
    touched = [keys.jobs(entry.priority), keys.job(job_id)]
    args = [GROUP, worker_id, entry.id, attempt, RELEASED]
    return ScriptCall(read_script("release"), touched, args, bool)


def delay(
    keys: Keys,
    entry: Entry,
    *,
    worker_id: str,
    job_id: str,
    attempt: int,
    pause_ms: int,
    died: bool,
    longest_pause_ms: int,
) -> ScriptCall[bool]:
    """Delay a job that runs under `attempt` by `pause_ms`.

    died: count a death, and double the pause with each death, up to `longest_pause_ms`.
    """
    touched = [keys.jobs(entry.priority), keys.job(job_id), keys.delayed]
    args = [GROUP, worker_id, entry.id, attempt, job_id, pause_ms, int(died), longest_pause_ms, RELEASED]
    return ScriptCall(read_script("delay"), touched, args, bool)


def park(keys: Keys, entry: Entry, *, worker_id: str, job_id: str, model: str) -> ScriptCall[bool]:
    """Leave an entry to the workers of `model`, a name or a fingerprint."""
    touched = [keys.jobs(entry.priority), keys.job(job_id)]
    return ScriptCall(read_script("park"), touched, [GROUP, worker_id, entry.id, parked(model)], bool)


def bury(
    keys: Keys,
    entry: Entry,
    *,
    worker_id: str,
    raw: bytes,
    code: str,
    reason: str,
    job_id: str | None,
    event: bytes,
    reply_to: str | None,
    idempotency_key: str | None,
    result_ttl_ms: int,
) -> ScriptCall[bool]:
    """Move an entry to the dead letters.

    raw: the dead letter's job, if the entry has none or is gone. job_id: the job that ends with the entry;
    its encoded terminal event is `event`. None: no job ends.
    """
    job = job_id or ""
    touched = [
        keys.jobs(entry.priority),
        keys.dead,
        keys.job(job),
        keys.tokens(job),
        keys.deadlines,
        keys.bytes,
        keys.replies(reply_to or ""),
        keys.idem(idempotency_key or ""),
    ]
    args = [
        GROUP,
        worker_id,
        entry.id,
        raw,
        code,
        reason,
        job,
        result_ttl_ms,
        event,
        keys.channel(job) if job else "",
        int(reply_to is not None),
        int(idempotency_key is not None),
    ]
    return ScriptCall(read_script("bury"), touched, args, bool)
