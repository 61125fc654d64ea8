"""The faults and their times: a pure function of the seed, so that a run can be repeated."""

import random
from dataclasses import dataclass, field, replace
from typing import Any

from tests.chaos.proxy import FAULTS as WIRE_FAULTS

PER_MINUTE = {
    "kill_worker": 8,
    "stop_worker": 2,
    "freeze_worker": 1,
    "kill_producer": 2,
    "kill_consumer": 2,
    "freeze_consumer": 1,
    "kill_server": 1,
    "failover": 0.5,
    "kill_clients": 1,
    "pause_server": 1,
    "fill_memory": 0.5,
    "refuse_writes": 0.5,
    **dict.fromkeys(WIRE_FAULTS, 4),
}
"""Faults per minute, each at least once. Signals hit a process, the others a server or its connections."""

ONLY_WITH_REPLICA = ("failover", "refuse_writes")
AMONG_SERVERS = ("kill_server", "failover", "kill_clients", "pause_server", "fill_memory", "refuse_writes")


@dataclass(frozen=True, order=True)
class Fault:
    at_s: float
    """Seconds since the start of the run."""
    kind: str
    draw: float = field(compare=False)
    """Selects the target among the present ones: uniform in [0, 1)."""
    options: dict[str, Any] = field(default_factory=dict, compare=False)


def kinds(*, replica: bool = True) -> list[str]:
    """The kinds of faults that shall happen at least once."""
    return [kind for kind in PER_MINUTE if replica or kind not in ONLY_WITH_REPLICA]


def schedule(seed: int, duration_s: float, *, replica: bool = True) -> list[Fault]:
    """The faults in order of time, all within `duration_s`."""
    draw = random.Random(f"{seed}:schedule")
    faults = []
    for kind in kinds(replica=replica):
        count = max(1, round(PER_MINUTE[kind] * duration_s / 60))
        for number in range(count):  # spread evenly, with jitter
            at_s = (number + draw.random()) / count * duration_s
            faults.append(Fault(at_s, kind, draw.random(), _options(kind, draw)))
    return _apart(sorted(faults), duration_s)


def _options(kind: str, draw: random.Random) -> dict[str, Any]:
    if kind in WIRE_FAULTS:
        return {"share": draw.choice((0.05, 0.2, 0.5)), "for_s": draw.uniform(0.2, 1.5)}
    if kind in ("pause_server", "fill_memory", "refuse_writes"):
        return {"for_s": draw.uniform(0.3, 1.5)}
    if kind in ("freeze_worker", "freeze_consumer"):
        return {"for_s": draw.uniform(2.5, 5.0)}
    if kind == "failover":
        return {"cut": draw.random() < 0.5}
    return {}


def _apart(faults: list[Fault], duration_s: float) -> list[Fault]:
    """Move faults of servers into slots of their own, one at a time, so that each has an effect."""
    servers = [fault for fault in faults if fault.kind in AMONG_SERVERS]
    slot_s = duration_s / len(servers)
    moved = [replace(f, at_s=(slot + f.draw / 2) * slot_s) for slot, f in enumerate(servers)]
    return sorted([*moved, *(fault for fault in faults if fault.kind not in AMONG_SERVERS)])


CRASH_CALLS = {
    "take": 60,
    "wait_for_new": 10,
    "claim_idle": 10,
    "own_pending": 1,
    "promote": 6,
    "begin": 12,
    "append": 400,
    "finish": 10,
    "release": 3,
    "delay": 1,
}
"""Calls of a worker's queue at which it may die, with the highest number of the call."""
WHEN = ("before", "amid", "after")


def fate(seed: int, life: int) -> dict[str, Any]:
    """The fault of the worker that is started as number `life`: see `workers.meet`."""
    draw = random.Random(f"{seed}:fate:{life}")
    dealt: dict[str, Any] = {"clock_offset_s": draw.choice((0.0, -420.0, 300.0, 3600.0))}
    if draw.random() < 0.4:
        dealt["lose_every"] = draw.choice((3, 10, 50))
    dice = draw.random()
    if dice < 0.4:
        call = draw.choice(list(CRASH_CALLS))
        number = draw.randint(1, CRASH_CALLS[call])
        dealt["crash"] = [call, number, draw.choice(WHEN)]
    elif dice < 0.5:
        dealt["raise_at_step"] = draw.randint(2, 200)
    elif dice < 0.55:
        dealt["hang_at_step"] = draw.randint(2, 200)
    return dealt
