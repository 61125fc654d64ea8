"""One jobs stream of the model: the holder of each entry, and the order in which waiting ones are taken."""

from dataclasses import dataclass, field, replace

from ingine.contract.keys import RELEASED, WAITING

MAX_CHOICES, MAX_COST = 128, 20
"""The highest number of choices that an entry counts for, and the highest cost of each."""

LOST = "nobody"
"""Holder of an entry that was delivered and is pending with no consumer."""


@dataclass
class Entry:
    id: str
    job_id: str | None
    """None if the entry cannot be decoded."""
    raw: bytes
    tenant: str = ""
    cost: float | None = None
    """Cost in tokens. None after a bare XADD: it is estimated from the job's bytes."""
    choices: str = ""
    """The field `choices`, which any client may have written. Empty if the entry has none."""
    holder: str | None = None
    """The consumer that it is pending with. None if no consumer has read it yet."""
    silent: bool = False
    """True if it was idle for a lease: its holder has died, or released it."""

    @property
    def num_choices(self) -> int:
        """The places that it takes in a worker."""
        is_count = self.choices.isdecimal() and len(self.choices) <= 15
        return max(1, min(int(self.choices), MAX_CHOICES)) if is_count else 1

    def under(self, entry_id: str) -> "Entry":
        """The same entry, added again under another id."""
        return replace(self, id=entry_id, holder=None, silent=False)


@dataclass
class FairOrder:
    """Start-time fair queueing. An entry starts where its tenant's last one ended, but not in the past."""

    starts: dict[str, float] = field(default_factory=dict)
    """Entry id -> virtual start. A cancelled entry stays until its turn comes, and is then skipped."""
    now: float | None = None
    """The start of the last entry that was taken."""
    ends: dict[str, float] = field(default_factory=dict)
    """Tenant -> virtual end of its last entry, if that is not in the past."""

    def add(self, entry: Entry, weight: float) -> None:
        start = max(self.now or 0.0, self.ends.get(entry.tenant, 0.0))
        cost = len(entry.raw) / 4 if entry.cost is None else entry.cost
        cost = max(1, min(cost, MAX_COST * entry.num_choices))
        self.ends[entry.tenant] = start + cost / weight
        self.starts[entry.id] = start

    def pop(self) -> str:
        first = min(self.starts, key=lambda entry_id: (self.starts[entry_id], entry_id))
        self.now = self.starts.pop(first)
        self.ends = {tenant: end for tenant, end in self.ends.items() if end >= (self.now or 0.0)}
        return first

    def forget(self) -> None:
        """Reset the order once nothing waits."""
        self.starts, self.now, self.ends = {}, None, {}

    @property
    def ahead(self) -> dict[str, float]:
        """The waiting entries' order, as the server stores it."""
        ends = {f"tenant:{tenant}": end for tenant, end in self.ends.items()}
        return ends if self.now is None else ends | {"now": self.now}


@dataclass
class JobsStream:
    """The entries in the order of their arrival. Ended ones are deleted."""

    entries: dict[str, Entry] = field(default_factory=dict)
    order: FairOrder = field(default_factory=FairOrder)

    def add(self, entry: Entry) -> None:
        self.entries[entry.id] = entry

    def held_by(self, consumer: str | None) -> list[Entry]:
        return [entry for entry in self.entries.values() if entry.holder == consumer]

    def take(self, worker: str, num_places: int, weights: dict[str, float]) -> list[str]:
        """Put new entries into the order, then give the first to the worker while it has a free place."""
        if new := self.held_by(None):
            for entry in new:
                entry.holder = WAITING
        for entry in new or (self.held_by(WAITING) if not self.order.starts else []):
            self.order.add(entry, weights.get(entry.tenant, 1.0))
        taken: list[str] = []
        while self.num_choices(taken) < num_places:
            if not self.order.starts:
                self.order.forget()
                break
            if (entry_id := self.order.pop()) in self.entries:
                self.give(entry_id, worker)
                taken.append(entry_id)
        return taken

    def num_choices(self, entry_ids: list[str]) -> int:
        return sum(self.entries[entry_id].num_choices for entry_id in entry_ids)

    def take_new(self, worker: str) -> list[str]:
        """Give the worker the oldest unread entry, bypassing the order: only a worker that waited for it does
        so."""
        new = [entry.id for entry in self.held_by(None)[:1]]
        for entry_id in new:
            self.give(entry_id, worker)
        return new

    def lose(self, consumer: str) -> None:
        """Make the consumer's entries pending with no consumer."""
        for entry in self.held_by(consumer):
            entry.holder, entry.silent = LOST, False

    def adopt(self) -> None:
        """Adopt lost entries: waiting ones keep their place, the others are left to their holders for a
        lease."""
        for entry in self.held_by(LOST):
            entry.holder = WAITING if entry.id in self.order.starts else RELEASED

    def claimable(self) -> list[str]:
        """Silent entries of any worker, the claiming one included. Waiting entries are not claimed."""
        return [entry.id for entry in self.entries.values() if entry.silent and entry.holder != WAITING]

    def give(self, entry_id: str, consumer: str) -> None:
        entry = self.entries[entry_id]
        entry.holder, entry.silent = consumer, consumer == RELEASED

    def delete(self, entry_id: str) -> None:
        self.entries.pop(entry_id, None)
