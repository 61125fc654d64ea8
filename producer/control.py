"""The client's methods for operators: inspect a queue, control it, handle its dead letters."""

import asyncio
import math
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence

from redis.asyncio import Redis

from ingine.byte_sizes import parse_bytes
from ingine.connect.scripts import run_script
from ingine.contract.calls.producing import RequeueVerdict, requeue
from ingine.contract.control import nudge
from ingine.contract.jobs import decode_job
from ingine.contract.keys import JOB_FIELD, MAX_PARTITIONS, Keys
from ingine.errors import ClientError, InvalidArgument, InvalidJob
from ingine.producer import arguments
from ingine.producer.arguments import ENTRY_ID
from ingine.producer.partitions import Partition, Partitions
from ingine.producer.queue_info import merge, read_partition, text
from ingine.producer.repartition import repartition
from ingine.producer.results import DeadLetter, QueueInfo
from ingine.producer.sessions import Session, Sessions

_TENANT = re.compile(r"[A-Za-z0-9_.:-]{1,128}")


class QueueControl:
    """Base of `AsyncClient`: the methods that concern the queue as a whole."""

    def __init__(self, queue: str, sessions: Sessions):
        self.queue = queue
        self._sessions = sessions

    @property
    def _session(self) -> Session:
        """The session of the running event loop."""
        return self._sessions.current()

    @property
    def _partitions(self) -> Partitions:
        return self._session.partitions

    async def queue_info(self) -> QueueInfo:
        """Return depth by priority, limits, switches, workers and dead letters.

        Each partition is read at one moment, but not all at the same one.
        """
        partitions = await self._partitions.each(read_partition)
        return merge(self.queue, [info for _, info in partitions])

    async def pause(self) -> None:
        """Make workers take no further jobs. Running jobs go on, and `submit` still accepts."""
        await self._partitions.each(lambda redis, keys: redis.hset(keys.settings, "paused", 1))
        await self._nudge("pause")

    async def resume(self) -> None:
        """Undo `pause`."""
        await self._partitions.each(lambda redis, keys: redis.hdel(keys.settings, "paused"))
        await self._nudge("resume")

    async def drain(self, worker_id: str) -> None:
        """Make one worker hand its jobs over and exit, or all living workers of one name.

        A worker that starts later under the same name is not affected. Raises ClientError if no such worker
        is alive.
        """
        workers = (await self.queue_info()).workers
        meant = [each for each, beat in workers.items() if worker_id in (each, beat.get("name"))]
        if not meant:
            alive = ", ".join(sorted(workers)) or "none"
            raise ClientError(f"no worker {worker_id!r} in queue {self.queue!r}; there are: {alive}")
        switches = {f"drain:{each}": 1 for each in meant}
        await self._partitions.each(lambda redis, keys: redis.hset(keys.settings, mapping=switches))
        await self._nudge("drain", worker=worker_id)

    async def set_limits(
        self,
        *,
        max_jobs: int | None = None,
        max_job_bytes: int | str | None = None,
        max_bytes: int | str | None = None,
        max_jobs_per_s: float | None = None,
        weights: Mapping[str, float] | None = None,
    ) -> None:
        """Set the limits of each partition, from now on. None leaves a limit unchanged.

        max_jobs, max_bytes: number and bytes of all jobs that wait or run. max_job_bytes: bytes of one job.
        Bytes may be text such as "2GiB".
        max_jobs_per_s: submissions of each tenant; 0 removes the limit.
        weights: tenant -> its share of the work while others wait too; other tenants have weight 1.

        Raises InvalidArgument for a value that is no valid limit.
        """
        sizes = {"max_job_bytes": max_job_bytes, "max_bytes": max_bytes}
        counts = {"max_jobs": max_jobs} | {name: _bytes(name, size) for name, size in sizes.items()}
        for name, limit in counts.items():
            if limit is not None:
                counts[name] = arguments.integer(name, limit, at_least=1)
        if max_jobs_per_s is not None:
            max_jobs_per_s = arguments.number("max_jobs_per_s", max_jobs_per_s)
            if not 0 <= max_jobs_per_s < math.inf:
                raise InvalidArgument(f"max_jobs_per_s is 0 or more, not {max_jobs_per_s}")
        weights = _checked_weights(weights or {})
        given = counts | {"max_jobs_per_s": max_jobs_per_s}
        limits = {name: limit for name, limit in given.items() if limit is not None}
        limits |= {f"weight:{tenant}": weight for tenant, weight in weights.items()}
        if limits:
            await self._partitions.each(lambda redis, keys: redis.hset(keys.settings, mapping=limits))

    async def set_partitions(self, number: int) -> None:
        """Spread the queue over `number` partitions, each with the limits of the queue.

        Raises InvalidArgument below 1 and above 64, and ClientError unless the queue is empty: no job waits
        or runs, and there are no dead letters. Results of jobs that have ended can no longer be read.
        Workers exit, and have to be started again. If this fails halfway, `submit` is refused until it is
        called again.
        """
        number = arguments.integer("number", number)
        if not 1 <= number <= MAX_PARTITIONS:
            raise InvalidArgument(f"a queue has 1 to {MAX_PARTITIONS} partitions, not {number}")
        await repartition(self._partitions, number)

    async def dead_letters(self, limit: int = 100) -> list[DeadLetter]:
        """Return the oldest `limit` dead letters: entries that no worker could answer."""
        limit = arguments.integer("limit", limit, at_least=1)
        answers = await self._partitions.each(lambda redis, keys: redis.xrange(keys.dead, count=limit))
        letters = [
            _dead_letter(partition.keys, *entry) for partition, entries in answers for entry in entries
        ]
        return sorted(letters, key=_age)[:limit]

    async def dead_letter(self, entry_id: str) -> DeadLetter:
        """Return one dead letter. Raises ClientError if none has this id."""
        partition, entry = _locate(await self._partitions.latest(), entry_id)
        entries = await partition.call(lambda redis, keys: redis.xrange(keys.dead, min=entry, max=entry))
        if not entries:
            raise ClientError(_no_letter(entry_id))
        return _dead_letter(partition.keys, *entries[0])

    async def requeue(self, entry_id: str) -> str:
        """Put a dead letter back into its stream, as it was sent. Returns its new entry id there.

        Raises ClientError if there is no such dead letter, if it has no job, or if a job with a record has
        its job id (as a duplicate it would be buried again): submit its contents as a new job instead.
        """
        letter = await self.dead_letter(entry_id)
        partition, entry = _locate(await self._partitions.all(), entry_id)
        keys = partition.keys
        if letter.stream not in keys.all_jobs:
            raise ClientError(f"dead letter {entry_id} came from {letter.stream!r}, which is no jobs stream")
        call = requeue(keys, entry, stream=letter.stream, job_id=letter.job_id)
        reply = await partition.call(lambda redis, _: run_script(redis, call))
        if reply.verdict is RequeueVerdict.KNOWN:
            raise ClientError(
                f"job {letter.job_id} of dead letter {entry_id} is known and {reply.detail}: an id cannot "
                "run twice. Submit its contents again under another id"
            )
        if reply.verdict is RequeueVerdict.NO_JOB:
            raise ClientError(
                f"dead letter {entry_id} has no field `job`, so there is nothing to requeue: purge it"
            )
        if reply.verdict is RequeueVerdict.MISSING:
            raise ClientError(_no_letter(entry_id))
        return reply.detail

    async def purge(self, entry_ids: Sequence[str] | None = None) -> int:
        """Delete dead letters for good: all, or those named. Returns how many were deleted."""
        if isinstance(entry_ids, str):
            raise InvalidArgument("entry_ids must be a list of dead letters' ids, not a string")
        if entry_ids is None:
            return sum(num_letters for _, num_letters in await self._partitions.each(_purge_all))
        partitions, named = await self._partitions.latest(), dict[Partition, list[str]]()
        for partition, entry in [_locate(partitions, entry_id) for entry_id in entry_ids]:
            named.setdefault(partition, []).append(entry)
        counts = [
            partition.call(lambda redis, keys, entries=entries: redis.xdel(keys.dead, *entries))
            for partition, entries in named.items()
        ]
        return sum(await asyncio.gather(*counts))

    async def _nudge(self, command: str, **fields: str) -> None:
        """Make workers read the settings at once. A nudge may get lost: they also read them periodically."""
        message = nudge(command, **fields)
        await self._partitions.each(lambda redis, keys: redis.spublish(keys.control, message))


def _locate(partitions: list[Partition], entry_id: str) -> tuple[Partition, str]:
    """Split a dead letter's id into partition and entry id. With one partition, the id names none."""
    number, _, entry = arguments.text("entry_id", entry_id).rpartition(":")
    if not ENTRY_ID.fullmatch(entry):
        raise ClientError(_no_letter(entry_id))
    if len(partitions) == 1 and not number:
        return partitions[0], entry
    if len(partitions) > 1 and number in map(str, range(len(partitions))):
        return partitions[int(number)], entry
    raise ClientError(_no_letter(entry_id))


def _checked_weights(weights: Mapping[str, float]) -> dict[str, float]:
    if not isinstance(weights, Mapping):
        raise InvalidArgument(f"weights must be a dict of tenants and numbers, not {type(weights).__name__}")
    checked = {}
    for tenant, weight in weights.items():
        if not isinstance(tenant, str) or not _TENANT.fullmatch(tenant):
            raise InvalidArgument(f"a tenant's name matches {_TENANT.pattern}, {tenant!r} does not")
        checked[tenant] = arguments.number(f"the weight of tenant {tenant!r}", weight)
        if not 0 < checked[tenant] < math.inf:
            raise InvalidArgument(f"the weight of tenant {tenant!r} is more than 0, not {weight}")
    return checked


async def _purge_all(redis: Redis, keys: Keys) -> int:
    num_letters, _ = await redis.pipeline(transaction=True).xlen(keys.dead).delete(keys.dead).execute()
    return num_letters


def _dead_letter(keys: Keys, entry_id: bytes, fields: dict[bytes, bytes]) -> DeadLetter:
    """Read one entry. Any client may have written it, so missing fields become empty."""
    found = defaultdict(str, {text(name): text(value) for name, value in fields.items()})
    raw = fields.get(JOB_FIELD.encode(), b"")
    return DeadLetter(
        entry_id=entry_id.decode() if keys.partition is None else f"{keys.partition}:{entry_id.decode()}",
        job=raw,
        job_id=_readable_id(raw),
        code=found["code"],
        reason=found["reason"],
        stream=found["stream"],
        entry=found["entry"],
        deliveries=_count(found["deliveries"]),
        worker=found["worker"],
    )


def _count(text: str) -> int:
    """The number in a field, or 0 if it is none that our scripts write."""
    return int(text) if text.isascii() and text.isdigit() and len(text) < 20 else 0


def _readable_id(raw: bytes) -> str | None:
    try:
        return decode_job(raw, max_bytes=len(raw)).id
    except InvalidJob as error:
        return error.job_id


def _age(letter: DeadLetter) -> tuple[int, ...]:
    """Sort key: entry ids begin with the time, by the server's clock."""
    return tuple(map(int, letter.entry_id.rpartition(":")[2].split("-")))


def _no_letter(entry_id: str) -> str:
    return f"no dead letter {entry_id!r}: requeued or purged already"


def _bytes(name: str, size: int | str | None) -> int | None:
    try:
        return parse_bytes(size)
    except ValueError as error:
        raise InvalidArgument(f"{name} {error}, not {size!r}") from None
