"""Everything that is left on the servers after a run, as plain values for the audit."""

from dataclasses import dataclass, field

from redis.asyncio import Redis

from ingine.contract.events import Event, decode_event
from ingine.contract.keys import EVENT_FIELD, GROUP, Keys

TTL_FREE = ("queue", "workers", "models", "dead", "jobs:high", "jobs:normal", "jobs:low")
"""Names, after the queue's prefix, of keys that may stay for ever."""


@dataclass
class Log:
    """One job as stored on the servers."""

    status: str | None = None
    deaths: int = 0
    position: int | None = None
    waited_s: float | None = None
    """Seconds from its submission to its first token, by the server's clock."""
    lived_s: float | None = None
    """Seconds from its submission to its end."""
    entries: list[tuple[str, Event]] = field(default_factory=list)


@dataclass
class Snapshot:
    logs: dict[str, Log] = field(default_factory=dict)
    """Every record and every token log, by job id."""
    replies: list[Event] = field(default_factory=list)
    dead: list[dict[str, bytes]] = field(default_factory=list)
    orphans: list[str] = field(default_factory=list)
    """Leftovers: keys that lack a TTL, entries in jobs streams, pending entries."""


async def take(redis: Redis, keys: Keys, into: Snapshot) -> None:
    """Add one partition, from its server."""
    async for raw in redis.scan_iter(f"{keys.prefix}:*", count=1000):
        key = raw.decode()
        name = key.removeprefix(f"{keys.prefix}:")
        kind, _, job_id = name.partition(":")
        if name not in TTL_FREE and await redis.ttl(key) < 0:
            into.orphans.append(f"{key} has no TTL")
        if kind == "job":
            fields = await redis.hgetall(key)
            record = {field.decode(): value.decode(errors="replace") for field, value in fields.items()}
            log = into.logs.setdefault(job_id, Log())
            log.status, log.deaths = record.get("status"), int(record.get("deaths", 0))
            log.position = int(record.get("position", 0))
            log.waited_s = _seconds(record, "first_token_at")
            log.lived_s = _seconds(record, "finished_at")
        elif kind == "tokens":
            log = into.logs.setdefault(job_id, Log())
            log.entries = [(entry.decode(), _event(fields)) for entry, fields in await redis.xrange(key)]
        elif kind == "replies":
            into.replies += [_event(fields) for _, fields in await redis.xrange(key)]
        elif name == "dead":
            for _, fields in await redis.xrange(key):
                into.dead.append({field.decode(): value for field, value in fields.items()})
    for stream in keys.all_jobs:
        if await redis.exists(stream):
            if length := await redis.xlen(stream):
                into.orphans.append(f"{stream} has {length} entries")
            if pending := (await redis.xpending(stream, GROUP))["pending"]:
                into.orphans.append(f"{stream} has {pending} pending entries")


def _seconds(record: dict[str, str], until: str) -> float | None:
    """Seconds from the submission."""
    return (int(record[until]) - int(record["submitted_at"])) / 1000 if until in record else None


def _event(fields: dict[bytes, bytes]) -> Event:
    return decode_event(fields[EVENT_FIELD.encode()])
