"""Change the number of partitions: a protocol between servers that do not know each other.

    step               where                                     if it fails there
    1 ensure_empty     each old partition; writes nothing        nothing has changed
    2 copy_settings    reads those of the first old partition    nothing has changed
    3 prepare_unused   new partitions that are no old ones       nothing has changed: they are not used yet
    4 close_old        each old partition, the base last         not empty any more: what was closed is opened
                                                                 again. No answer: producers are refused until
                                                                 the change is made again
    5 open_new         new partitions that are old ones too,     no answer: as in 4
                       then the base

The base is the queue's own settings (`Partitions.base`), which hold the number of partitions; a queue with
one partition has no others. They are written last, so a process that has read the new number finds each
partition ready. Each step may be repeated, and so may the whole change.
"""

from functools import partial

from redis.asyncio import Redis

from ingine.connect.scripts import run_script
from ingine.contract.calls import producing
from ingine.contract.keys import Keys
from ingine.errors import ClientError
from ingine.producer.partitions import Partition, Partitions

KEPT_SETTINGS = b"max_", b"weight:", b"paused"
"""Prefixes of the settings that the new partitions keep: limits, weights, and `paused`."""

Settings = dict[str | bytes, bytes | int]


async def repartition(partitions: Partitions, number: int) -> None:
    """Give a queue `number` partitions. Raises ClientError if it is not empty: nothing was changed then."""
    change = _Repartition(partitions, await partitions.latest(), number)
    await change.ensure_empty()
    settings = await change.copy_settings()
    await change.prepare_unused(settings)
    await change.close_old()
    await change.open_new(settings)
    await partitions.latest()


class _Repartition:
    """One change, with a method for each step above."""

    def __init__(self, partitions: Partitions, old: list[Partition], number: int):
        self._queue = partitions.queue
        self._base = partitions.base
        self._old = old
        self._new = partitions.among(number)
        self._number = number

    async def ensure_empty(self) -> None:
        """Raise ClientError for the first partition that is not empty."""
        for partition in self._old:
            if what := await _close_if_empty(partition, number=None):
                raise self._not_empty(what)

    async def copy_settings(self) -> Settings:
        """Return the settings of each new partition."""
        settings = await self._old[0].call(lambda redis, keys: redis.hgetall(keys.settings))
        kept = {name: value for name, value in settings.items() if name.startswith(KEPT_SETTINGS)}
        return {"partitions": self._number} | kept

    async def prepare_unused(self, settings: Settings) -> None:
        """Write the settings of new partitions that no producer or worker uses yet."""
        for partition in self._new:
            if partition not in self._old and partition != self._base:
                await partition.call(partial(_write_settings, settings=settings))

    async def close_old(self) -> None:
        """Announce the new number to producers in each old partition, if it is still empty at that moment.

        Raises ClientError at the first that is not: a job was submitted since `ensure_empty`.
        """
        closed: list[Partition] = []
        for partition in sorted(self._old, key=lambda partition: partition == self._base):  # the base last
            if what := await _close_if_empty(partition, self._number):
                await self._reopen(closed)
                raise self._not_empty(what)
            closed.append(partition)

    async def _reopen(self, closed: list[Partition]) -> None:
        for partition in closed:
            await partition.call(lambda redis, keys: redis.hset(keys.settings, "partitions", len(self._old)))

    async def open_new(self, settings: Settings) -> None:
        """Write the settings where the new number is announced. Jobs are accepted after the last."""
        reused = [partition for partition in self._new if partition in self._old and partition != self._base]
        for partition in (*reused, self._base):
            await partition.call(partial(_write_settings, settings=settings))

    def _not_empty(self, what: str) -> ClientError:
        return ClientError(f"queue {self._queue!r} is not empty ({what}): nothing was changed")


async def _close_if_empty(partition: Partition, number: int | None) -> str:
    """Announce a new number, if the partition is empty; None: only check. Returns what it holds, or ''."""
    return await partition.call(
        lambda redis, keys: run_script(redis, producing.partition(keys, number=number))
    )


async def _write_settings(redis: Redis, keys: Keys, settings: Settings) -> None:
    """Replace the settings. Old ones may be left from when the queue had this number before."""
    pipeline = redis.pipeline(transaction=True)
    await pipeline.delete(keys.settings).hset(keys.settings, mapping=settings).execute()
