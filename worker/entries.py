"""Entries of the jobs streams as a worker reads them, and what it sends and gets for the jobs in them."""

import itertools
from dataclasses import dataclass, field
from enum import Enum, StrEnum

from ingine.contract.events import TerminalEvent, TokensEvent, encode_event
from ingine.contract.jobs import MAX_JOB_BYTES
from ingine.contract.keys import JOB_FIELD, Priority

MAX_ENTRY_BYTES = MAX_JOB_BYTES + 1024
"""Of all its fields: what has more is never read. Nothing that lies in the server can raise it."""

MAX_FOREIGN_FIELDS = 64


@dataclass(frozen=True, slots=True)
class Entry:
    """A delivered entry of a jobs stream. Its id is the server's time of submission."""

    priority: Priority
    id: str
    raw: bytes
    accepted: bool = False
    """It says that it came through submit.lua, which holds jobs against the limits. Anybody can say so."""
    abandoned: bool = field(default=False, compare=False)
    """It was parked for workers of another model, which are gone."""
    foreign: tuple[tuple[bytes, bytes], ...] = ()
    """Fields of an entry that has no `job`: the first `MAX_FOREIGN_FIELDS`."""
    num_bytes_unread: int = 0
    """Of an entry that has more than MAX_ENTRY_BYTES, and is to be buried."""


class Refusal(Enum):
    """Why `append` or `finish` has written nothing, or what `renew` says of a job's lease."""

    STALE = -1
    """The attempt is not ours any more."""
    CANCELLED = -2
    """Somebody has asked to cancel the job: it takes no more tokens. Its lease was renewed."""
    BROKEN = -3
    """Something else lies under the job's keys: it can never be written."""


def position_or_refusal(answer: int) -> int | Refusal:
    """Read what a script answers: the number of tokens that the log has, or one of `Refusal`."""
    return answer if answer >= 0 else Refusal(answer)


class Verdict(StrEnum):
    """What `begin` has made of an entry. Nothing is begun but with `RUN`."""

    RUN = "run"
    """The job is ours, under a new attempt."""
    OTHER_MODEL = "other_model"
    """It is for the workers of another model."""
    STALE = "stale"
    """The entry is not ours any more."""
    DUPLICATE = "duplicate"
    """Another entry has its job id."""
    DONE = "done"
    """The job has ended before; the entry is gone now."""
    SUSPECT = "suspect"
    """It is to be begun by a worker without other jobs. The entry's lease was renewed."""


@dataclass(frozen=True, slots=True)
class Begun:
    """What `begin` answers. Times are the server's, in ms since 1970."""

    verdict: Verdict
    attempt: int = 0
    position: int = 0
    deaths: int = 0
    cancelled: bool = False
    now: int = 0
    submitted_at: int = 0
    first_token_at: int = 0
    idempotency_key: str | None = None
    fingerprint: str = ""
    """Of the model that has made what is committed; empty where nothing is."""


class Append:
    """A tokens event as it is written. Log probabilities are three times as large before they are bytes.

    One is made for each token: a dataclass with fields that it computes takes twice as long.
    """

    __slots__ = ("attempt", "job_id", "position", "publish", "raw", "start")

    def __init__(self, job_id: str, attempt: int, event: TokensEvent, publish: bool):
        self.job_id = job_id
        self.attempt = attempt
        self.publish = publish
        self.position = event.position
        """Tokens that are committed with it."""
        self.start = event.position - len(event.token_ids)
        """Tokens that are committed before it."""
        self.raw = encode_event(event)


@dataclass(frozen=True, slots=True)
class Finish:
    entry: Entry
    attempt: int
    event: TerminalEvent
    reply_to: str | None
    bury: bool = False
    """Leave a copy of the job, with the event's error, in the dead letters."""
    idempotency_key: str | None = None
    """That `begin` has answered with: the key lives as long as the result."""


def read_entries(priority: Priority, reply: list) -> list[Entry]:
    """Of a reply as XRANGE gives it: fields are a flat list there, and nothing for what has been deleted.

    Instead of the fields our scripts give the number of their bytes where these are too many.
    """
    entries = []
    for entry_id, fields in reply:
        if isinstance(fields, int):
            entries.append(Entry(priority, entry_id.decode(), b"", num_bytes_unread=fields))
        elif fields:
            named = dict(zip(fields[::2], fields[1::2], strict=True))
            entries.append(read_entry(priority, entry_id, named))
    return entries


def read_entry(priority: Priority, entry_id: bytes, fields: dict[bytes, bytes]) -> Entry:
    num_bytes = sum(len(name) + len(value) for name, value in fields.items())
    if num_bytes > MAX_ENTRY_BYTES:
        return Entry(priority, entry_id.decode(), b"", num_bytes_unread=num_bytes)
    raw = fields.get(JOB_FIELD.encode())
    if raw is None:
        foreign = tuple(itertools.islice(fields.items(), MAX_FOREIGN_FIELDS))
        return Entry(priority, entry_id.decode(), b"", foreign=foreign)
    return Entry(priority, entry_id.decode(), raw, b"cost" in fields)
