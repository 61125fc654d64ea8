"""Entries of the jobs streams as a worker reads them, and what it sends and gets for the jobs in them."""

import itertools
from dataclasses import InitVar, dataclass, field

from ingine.keys import JOB_FIELD, Priority
from ingine.wire import TerminalEvent, TokensEvent, encode_event

STALE, CANCELLED, BROKEN = -1, -2, -3
"""What `append`, `finish` and `renew` answer instead of a position."""

MAX_FOREIGN_FIELDS = 64


@dataclass(frozen=True, slots=True)
class Entry:
    """A delivered entry of a jobs stream. Its id is the server's time of submission."""

    priority: Priority
    id: str
    raw: bytes
    accepted: bool = False
    """It came through submit.lua, which has held it against the queue's limits."""
    abandoned: bool = field(default=False, compare=False)
    """It was parked for workers of another model, which are gone."""
    foreign: tuple[tuple[bytes, bytes], ...] = ()
    """Fields of an entry that has no `job`: the first `MAX_FOREIGN_FIELDS`."""


@dataclass(frozen=True, slots=True)
class Begun:
    """What `begin` answers. Times are the server's, in ms since 1970."""

    verdict: str
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


@dataclass(slots=True)  # one a token: a frozen one takes three times as long to make
class Append:
    """A tokens event as it is written. Log probabilities are three times as large before they are bytes."""

    job_id: str
    attempt: int
    event: InitVar[TokensEvent]
    publish: bool
    start: int = field(init=False)
    """Tokens that are committed before it."""
    position: int = field(init=False)
    """Tokens that are committed with it."""
    raw: bytes = field(init=False)

    def __post_init__(self, event: TokensEvent) -> None:
        self.start = event.position - len(event.token_ids)
        self.position = event.position
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
    """Of a reply as XRANGE gives it: fields are a flat list there, and nothing for what has been deleted."""
    pairs = (
        (entry_id, dict(zip(fields[::2], fields[1::2], strict=True))) for entry_id, fields in reply if fields
    )
    return [read_entry(priority, entry_id, fields) for entry_id, fields in pairs]


def read_entry(priority: Priority, entry_id: bytes, fields: dict[bytes, bytes]) -> Entry:
    raw = fields.get(JOB_FIELD.encode())
    if raw is None:
        foreign = tuple(itertools.islice(fields.items(), MAX_FOREIGN_FIELDS))
        return Entry(priority, entry_id.decode(), b"", foreign=foreign)
    return Entry(priority, entry_id.decode(), raw, b"cost" in fields)
