"""The state of one queue at a server, in the model's terms, so that the two can be compared."""

from collections import defaultdict
from dataclasses import dataclass, field, fields
from typing import Any

from redis.asyncio import Redis

from ingine.contract.events import Event, TerminalEvent, decode_event
from ingine.contract.keys import GROUP, Keys, Priority
from ingine.contract.record import JobStatus
from tests.contract.fair_order import LOST
from tests.contract.model import Model, Record

SILENT_MS = 10**9
"""Idle time of entries that their holder has released; far longer than a test or a lease."""

COMPARED = ("status", "attempt", "position", "deaths", "cancel", "worker", "entry", "priority", "reply_to")


@dataclass
class Snapshot:
    records: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Job id -> the fields of its record that belong to the contract."""
    logs: dict[str, list[str]] = field(default_factory=dict)
    """Job id -> ids of its token log."""
    entries: dict[str, list[tuple[str, str | None, bool, str]]] = field(default_factory=dict)
    """Priority -> (entry id, consumer that has it, whether it is silent, field `choices`)."""
    order: dict[str, dict[str, float]] = field(default_factory=dict)
    """Priority -> entry id -> virtual start."""
    ends: dict[str, dict[str, float]] = field(default_factory=dict)
    delayed: list[str] = field(default_factory=list)
    deadlines: list[str] = field(default_factory=list)
    num_bytes: int = 0
    replies: dict[str, list[tuple[str, str]]] = field(default_factory=dict)
    dead: list[tuple[str, str, bytes]] = field(default_factory=list)
    """Dead letters: (code, entry id, job)."""
    lasting: list[str] = field(default_factory=list)
    """Keys without a TTL, except those of the queue itself: streams, dead letters, and settings."""


def expected(model: Model, keys: Keys) -> Snapshot:
    """The state that the server should have."""
    snapshot = Snapshot(num_bytes=model.num_bytes, delayed=sorted(model.delayed), replies=model.replies)
    snapshot.dead = [(letter.code, letter.entry.id, letter.entry.raw) for letter in model.dead]
    for job_id, record in model.records.items():
        snapshot.records[job_id] = _compared(record)
        if record.log:
            snapshot.logs[job_id] = record.log
        if not record.status.terminal:
            snapshot.lasting += [keys.job(job_id), *([keys.tokens(job_id)] if record.log else [])]
            snapshot.lasting += [keys.idem(record.key)] if record.key else []
            snapshot.deadlines += [job_id] if record.has_deadline else []
    snapshot.deadlines.sort()
    if snapshot.deadlines:
        snapshot.lasting.append(keys.deadlines)
    for priority, stream in model.streams.items():
        if stream.entries:
            snapshot.entries[priority] = [
                (e.id, e.holder if e.holder != LOST else None, e.silent, e.choices)
                for e in stream.entries.values()
            ]
        if stream.order.starts:
            snapshot.order[priority] = stream.order.starts
            snapshot.lasting.append(keys.fair(priority))
        if stream.order.ahead:
            snapshot.ends[priority] = stream.order.ahead
            snapshot.lasting.append(keys.ends(priority))
    if model.delayed:
        snapshot.lasting.append(keys.delayed)
    if model.num_bytes:
        snapshot.lasting.append(keys.bytes)
    snapshot.lasting.sort()
    return snapshot


def _compared(record: Record) -> dict[str, Any]:
    compared = {name: getattr(record, name) for name in COMPARED}
    return compared | {"raw": record.delayed.raw if record.delayed else None}


async def take_snapshot(redis: Redis, keys: Keys) -> tuple[Snapshot, dict[str, list[Event]]]:
    """Read the snapshot, and the events of each log, in two round trips."""
    names = sorted(key.decode() for key in await redis.keys(f"{keys.prefix}:*"))
    kinds = defaultdict(list)
    pipeline = redis.pipeline(transaction=False)
    for name in names:
        kind, _, rest = name.removeprefix(keys.prefix + ":").partition(":")
        kinds[kind].append(rest)
        pipeline.pttl(name)
        match kind:
            case "jobs":
                pipeline.xrange(name)
                pipeline.xpending_range(name, GROUP, "-", "+", 1000)
            case "tokens" | "replies" | "dead":
                pipeline.xrange(name)
            case "job":
                pipeline.hgetall(name)
            case "fair" | "ends" | "delayed" | "deadlines":
                pipeline.zrange(name, 0, -1, withscores=True)
            case "bytes":
                pipeline.get(name)
    answers = iter(await pipeline.execute())
    snapshot, events = Snapshot(), {}
    for name in names:
        kind, _, rest = name.removeprefix(keys.prefix + ":").partition(":")
        if next(answers) < 0 and kind not in ("jobs", "dead", "queue"):
            snapshot.lasting.append(name)
        match kind:
            case "jobs":
                _read_stream(snapshot, rest, next(answers), next(answers))
            case "tokens":
                entries = next(answers)
                snapshot.logs[rest] = [entry_id.decode() for entry_id, _ in entries]
                events[rest] = [decode_event(f[b"event"]) for _, f in entries]
            case "replies":
                ends = [decode_event(f[b"event"]) for _, f in next(answers)]
                snapshot.replies[rest] = [(end.job_id, str(end.status)) for end in ends]
            case "dead":
                snapshot.dead = [
                    (f[b"code"].decode(), f[b"entry"].decode(), f[b"job"]) for _, f in next(answers)
                ]
            case "job":
                snapshot.records[rest] = _read_record(next(answers))
            case "ends":
                snapshot.ends[rest] = {name.decode(): end for name, end in next(answers)}
            case "fair":
                snapshot.order[rest] = {entry_id.decode(): start for entry_id, start in next(answers)}
            case "delayed":
                snapshot.delayed = sorted(job_id.decode() for job_id, _ in next(answers))
            case "deadlines":
                snapshot.deadlines = sorted(job_id.decode() for job_id, _ in next(answers))
            case "bytes":
                snapshot.num_bytes = int(next(answers))
    return snapshot, events


def _read_stream(snapshot: Snapshot, priority: str, entries: list, pending: list) -> None:
    holders = {p["message_id"]: (p["consumer"].decode(), p["time_since_delivered"]) for p in pending}
    rows = []
    for entry_id, named in entries:
        holder, idle_ms = holders.pop(entry_id, (None, 0))
        rows.append((entry_id.decode(), holder, idle_ms >= SILENT_MS, named.get(b"choices", b"").decode()))
    rows += [
        (entry_id.decode(), f"{holder}, but deleted", False, "") for entry_id, (holder, _) in holders.items()
    ]
    if rows:
        snapshot.entries[Priority(priority)] = rows


def _read_record(raw: dict[bytes, bytes]) -> dict[str, Any]:
    def text(name: str) -> str:
        return raw.get(name.encode(), b"").decode()

    status = JobStatus(text("status"))
    numbers = {name: int(text(name) or 0) for name in ("attempt", "position", "deaths")}
    record = numbers | {name: text(name) for name in ("worker", "entry", "reply_to")}
    return record | {
        "status": status,
        "cancel": text("cancel") == "1",
        "priority": Priority(text("priority")),
        "raw": raw.get(b"raw"),
    }


def differences(snapshot: Snapshot, expected: Snapshot) -> list[str]:
    return [
        f"{one.name}: the server has {there!r}, the model {here!r}"
        for one in fields(Snapshot)
        if (there := getattr(snapshot, one.name)) != (here := getattr(expected, one.name))
    ]


def broken_promises(snapshot: Snapshot, events: dict[str, list[Event]]) -> list[str]:
    """The violations of what must hold for any queue at any time, independent of the model."""
    broken = [f"{job_id} has a log and no record" for job_id in events.keys() - snapshot.records.keys()]
    for job_id, record in snapshot.records.items():
        *tokens, end = events.get(job_id) or [None]
        if not isinstance(end, TerminalEvent):
            tokens, end = [*tokens, end] if end else tokens, None
        position, authors = 0, {0: ""}
        for event in tokens:
            if isinstance(event, TerminalEvent) or event.position - len(event.token_ids) != position:
                broken.append(f"{job_id} goes on from {position} with {event}")
            position = event.position
            # A token's id names its attempt, its text the worker.
            attempt = event.token_ids[0]
            if attempt < max(authors) or authors.setdefault(attempt, event.text) != event.text:
                broken.append(f"{job_id}: {event.text} wrote under attempt {attempt} after {authors}")
        if position != record["position"]:
            broken.append(f"{job_id} is at {record['position']}, its log at {position}")
        if (end and end.status) != (record["status"] if record["status"].terminal else None):
            broken.append(f"{job_id} is {record['status']}, its log ends with {end}")
        if end and end.position != position:
            broken.append(f"{job_id} ends at {end.position}, its tokens at {position}")
    return broken
