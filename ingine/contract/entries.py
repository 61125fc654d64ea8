"""Entries of the jobs streams, as workers read them."""

import itertools
import re
from collections.abc import Iterable
from dataclasses import dataclass, field

from ingine.contract.jobs import MAX_JOB_BYTES
from ingine.contract.keys import JOB_FIELD, Priority
from ingine.sampling_params import MAX_CHOICES

MAX_ENTRY_BYTES = MAX_JOB_BYTES + 1024
"""Limit for all fields of an entry together: a worker never reads a larger one. No setting raises it."""

MAX_FOREIGN_FIELDS = 64

_COUNT = re.compile(rb"[1-9][0-9]{0,14}")


@dataclass(frozen=True, slots=True)
class Entry:
    """A delivered entry of a jobs stream. Its id begins with the server's time of submission, in ms."""

    priority: Priority
    id: str
    raw: bytes
    """The msgpack job, not validated. Empty if the entry has no field `job` or is too large."""
    accepted: bool = False
    """The entry claims that submit.lua, which enforces the limits on jobs, has written it. Any client that
    may write to the stream can claim that."""
    abandoned: bool = field(default=False, compare=False)
    """The entry was parked for workers of another model, and none of them is left."""
    foreign: tuple[tuple[bytes, bytes], ...] = ()
    """The first `MAX_FOREIGN_FIELDS` fields of an entry without a field `job`."""
    num_bytes_unread: int = 0
    """Size of an entry of more than MAX_ENTRY_BYTES, which is to be buried. 0 for all others."""
    num_choices: int = field(default=1, compare=False)
    """Choices of the job by the entry's field `choices`, from 1 to MAX_CHOICES. Any client may have
    written it: the job itself has the true number."""


def count_choices(entries: Iterable[Entry]) -> int:
    """Return the number of places that these entries take in a worker."""
    return sum(entry.num_choices for entry in entries)


def read_entries(priority: Priority, reply: list) -> list[Entry]:
    """Decode entries from a script's reply: pairs of an id and a flat list of fields, as XRANGE returns them.

    Where an entry is too large, scripts return its number of bytes in place of the fields. Deleted entries,
    which have no fields, are left out.
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
    """Decode one entry with these fields, as XREADGROUP returns them."""
    num_bytes = sum(len(name) + len(value) for name, value in fields.items())
    if num_bytes > MAX_ENTRY_BYTES:
        return Entry(priority, entry_id.decode(), b"", num_bytes_unread=num_bytes)
    raw = fields.get(JOB_FIELD.encode())
    if raw is None:
        foreign = tuple(itertools.islice(fields.items(), MAX_FOREIGN_FIELDS))
        return Entry(priority, entry_id.decode(), b"", foreign=foreign)
    num_choices = _read_num_choices(fields.get(b"choices", b""))
    return Entry(priority, entry_id.decode(), raw, b"cost" in fields, num_choices=num_choices)


def _read_num_choices(text: bytes) -> int:
    """Read the field `choices`, as `choices.lua` does."""
    return min(int(text), MAX_CHOICES) if _COUNT.fullmatch(text) else 1
