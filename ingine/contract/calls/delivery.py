"""Calls that deliver entries of a jobs stream: `take.lua`, `claim.lua`, `unpark.lua` and `promote.lua`.

Entries that wait in the fair order, are released, or are parked for a model are pending under consumers that
are no workers.

Each choice of a job takes one place in a worker. `take`, `claim` and `unpark` deliver entries while one of
`num_places` is free, so the last entry may have more choices than are free.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from ingine.contract.calls.script_call import ScriptCall
from ingine.contract.entries import MAX_ENTRY_BYTES, Entry, read_entries
from ingine.contract.keys import GROUP, PARKED_PREFIX, WAITING, Keys, Priority
from ingine.contract.scripts import read_script


@dataclass(frozen=True, slots=True)
class Taken:
    """The reply of `take`."""

    entries: list[Entry]
    more: bool
    """Nothing was taken, since there may be more new entries to put into the fair order: call again."""


def take(
    keys: Keys,
    priority: Priority,
    *,
    worker_id: str,
    num_places: int,
    max_ordered: int,
    take_anyway: bool,
    max_cost: int,
) -> ScriptCall[Taken]:
    """Take waiting entries in fair order, for `num_places` choices.

    max_ordered: most new entries that the call puts into that order. take_anyway: take entries even if there
    may be more new ones. max_cost: most tokens that one choice counts for.
    """
    touched = [keys.jobs(priority), keys.fair(priority), keys.ends(priority), keys.settings]
    args = [GROUP, worker_id, num_places, WAITING, max_ordered, int(take_anyway), max_cost, MAX_ENTRY_BYTES]

    def read(reply: list) -> Taken:
        entries, more = reply
        return Taken(read_entries(priority, entries), bool(more))

    return ScriptCall(read_script("take"), touched, args, read)


def claim(
    keys: Keys, priority: Priority, *, worker_id: str, min_idle_ms: int, num_places: int
) -> ScriptCall[list[Entry]]:
    """Claim entries that are released, or whose holders were silent for `min_idle_ms`."""
    args = [GROUP, worker_id, min_idle_ms, num_places, WAITING, PARKED_PREFIX, MAX_ENTRY_BYTES]
    return ScriptCall(
        read_script("claim"), [keys.jobs(priority)], args, lambda reply: read_entries(priority, reply)
    )


def unpark(
    keys: Keys,
    priority: Priority,
    *,
    worker_id: str,
    num_places: int,
    abandoned_after_ms: int,
    ours: Sequence[str],
    others: Sequence[str],
) -> ScriptCall[list[Entry]]:
    """Claim parked entries: those for the worker's model, then those of models not served.

    ours: consumers of the entries that are parked for the worker. others: consumers of those that are parked
    for other workers. Entries of any further consumer are abandoned once they are parked for
    `abandoned_after_ms`, and are returned with `Entry.abandoned` set.
    """
    args = [GROUP, worker_id, num_places, PARKED_PREFIX, abandoned_after_ms, len(ours), MAX_ENTRY_BYTES]

    def read(reply: list) -> list[Entry]:
        for_us, abandoned = (read_entries(priority, entries) for entries in reply)
        return for_us + [replace(entry, abandoned=True) for entry in abandoned]

    return ScriptCall(read_script("unpark"), [keys.jobs(priority)], [*args, *ours, *others], read)


def promote(keys: Keys, job_ids: Sequence[bytes]) -> ScriptCall[int]:
    """Move those of these delayed jobs that are due to their jobs streams. Returns how many were moved."""
    prefix = keys.job("").encode()
    touched = [keys.delayed, *keys.all_jobs, *(prefix + job_id for job_id in job_ids)]
    return ScriptCall(read_script("promote"), touched, job_ids, int)
