"""The call by which a worker begins a job: `begin.lua`."""

from dataclasses import dataclass
from enum import StrEnum

from ingine.contract.calls.script_call import ScriptCall
from ingine.contract.entries import Entry
from ingine.contract.keys import GROUP, Keys
from ingine.contract.scripts import read_script


class Verdict(StrEnum):
    """What `begin` decided about an entry. Only `RUN` begins the job."""

    RUN = "run"
    """The job is ours, under a new attempt."""
    OTHER_MODEL = "other_model"
    """The job is for the workers of another model."""
    STALE = "stale"
    """The entry is not ours any more."""
    DUPLICATE = "duplicate"
    """Another entry has the same job id."""
    DONE = "done"
    """The job has ended before. The call has deleted the entry."""
    SUSPECT = "suspect"
    """Only a worker without other jobs may begin it. The call has renewed the entry's lease."""


@dataclass(frozen=True, slots=True)
class Begun:
    """The reply of `begin`. Times are the server's, in ms since 1970.

    Only `verdict` is set where that is not RUN, and `fingerprint` with OTHER_MODEL.
    """

    verdict: Verdict
    attempt: int = 0
    position: int = 0
    """Committed output tokens."""
    deaths: int = 0
    """Workers that died or failed while they ran the job."""
    cancelled: bool = False
    """A client has requested to cancel the job."""
    now: int = 0
    submitted_at: int = 0
    first_token_at: int = 0
    """0: the job has no token yet."""
    idempotency_key: str | None = None
    fingerprint: str = ""
    """Fingerprint of the model that made the committed tokens, '' where there are none. With OTHER_MODEL: the
    fingerprint or name of the model whose workers the job is for."""


def begin(
    keys: Keys,
    entry: Entry,
    *,
    worker_id: str,
    job_id: str,
    reply_to: str | None,
    suspect_deaths: int,
    max_deaths: int,
    alone: bool,
    lease_ms: int,
    fingerprint: str,
    model_elsewhere: str | None,
    llguidance: str = "",
) -> ScriptCall[Begun]:
    """Begin the job of `entry` under a new attempt.

    suspect_deaths: number of deaths from which a job runs alone. max_deaths: number from which it does not
    run any more. alone: the worker has no other job. fingerprint: of the worker's model. model_elsewhere: the
    model that the job names, if only other workers serve it. llguidance: the version of the library that
    enforces grammars here.
    """
    touched = [keys.jobs(entry.priority), keys.job(job_id), keys.tokens(job_id)]
    args = [
        GROUP,
        worker_id,
        entry.id,
        entry.priority,
        reply_to or "",
        suspect_deaths,
        max_deaths,
        int(alone),
        lease_ms,
        fingerprint,
        int(entry.abandoned),
        model_elsewhere or "",
        llguidance,
    ]
    return ScriptCall(read_script("begin"), touched, args, _read_begun)


def _read_begun(reply: list) -> Begun:
    verdict, fields = Verdict(reply[0].decode()), reply[1:]
    match verdict, fields:
        case Verdict.RUN, [attempt, position, deaths, cancel, *times, idempotency_key, model]:
            key = _text(idempotency_key) or None
            return Begun(verdict, attempt, position, deaths, bool(cancel), *times, key, _text(model))
        case Verdict.OTHER_MODEL, [model]:
            return Begun(verdict, fingerprint=_text(model))
    return Begun(verdict)


def _text(raw: bytes) -> str:
    """Decode a field of a record. Any client may have written it, so it need not be UTF-8."""
    return raw.decode(errors="replace")
