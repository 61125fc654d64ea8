"""Calls that repair a queue, and those that a worker makes when it starts: `adopt.lua`, `renumber.lua`,
`put_back.lua`, `forget.lua`, `agree_on_model.lua` and `may.lua`.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from ingine.contract.calls.script_call import ScriptCall
from ingine.contract.entries import MAX_ENTRY_BYTES, Entry, read_entries
from ingine.contract.keys import GROUP, RELEASED, WAITING, Keys, Priority
from ingine.contract.scripts import read_script


@dataclass(frozen=True, slots=True)
class Adopted:
    """The reply of `adopt`."""

    after: str
    """Id of the entry to continue after. '' after the last page."""
    num_adopted: int


@dataclass(frozen=True, slots=True)
class Renumbered:
    """The reply of `renumber`."""

    rebuilt: bool
    """The call has rebuilt the stream."""
    set_aside: list[Entry]
    """The first of the entries that are set aside. Their ids are those in the stream `Keys.set_aside`."""


def adopt(keys: Keys, priority: Priority, *, after: str, max_entries: int) -> ScriptCall[Adopted]:
    """Find entries that no worker would ever read, in one page of a jobs stream.

    after: the entry to continue after, '' to start.
    """
    touched = [keys.jobs(priority), keys.fair(priority)]
    args = [GROUP, after, max_entries, WAITING, RELEASED]
    return ScriptCall(read_script("adopt"), touched, args, lambda reply: Adopted(reply[0].decode(), reply[1]))


def renumber(keys: Keys, priority: Priority, *, count: int) -> ScriptCall[Renumbered]:
    """Rebuild a jobs stream whose ids are used up. Returns up to `count` of the entries set aside."""
    touched = [keys.jobs(priority), keys.while_renumbered(priority), keys.set_aside(priority)]

    def read(reply: list) -> Renumbered:
        rebuilt, entries = reply
        return Renumbered(bool(rebuilt), read_entries(priority, entries))

    return ScriptCall(read_script("renumber"), touched, [GROUP, count, MAX_ENTRY_BYTES], read)


def put_back(keys: Keys, priority: Priority, *, aside_id: str, job_id: str | None) -> ScriptCall[int]:
    """Add an entry that is set aside to its jobs stream again. Returns how many were added: 0 or 1."""
    touched = [keys.set_aside(priority), keys.jobs(priority), keys.job(job_id or "")]
    return ScriptCall(read_script("put_back"), touched, [aside_id], int)


def forget(keys: Keys, *, idle_ms: int) -> ScriptCall[int]:
    """Delete consumers that have been idle for more than `idle_ms` and have nothing pending.

    Returns how many were deleted.
    """
    return ScriptCall(read_script("forget"), keys.all_jobs, [GROUP, idle_ms], int)


def agree_on_model(keys: Keys, *, fingerprint: str, replaces: bytes) -> ScriptCall[bytes]:
    """Record the model of a queue's workers. Returns the fingerprint that the queue has from now on.

    replaces: the fingerprint of workers that are gone; '' if there is none to replace.
    """
    return ScriptCall(read_script("agree_on_model"), [keys.settings], [fingerprint, replaces], bytes)


def may(commands: Sequence[str]) -> ScriptCall[list[str]]:
    """Ask which of these commands, each with its arguments, the server would refuse to its user."""
    return ScriptCall(read_script("may"), [], commands, lambda reply: [line.decode() for line in reply])
