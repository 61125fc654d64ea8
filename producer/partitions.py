"""A queue's partitions: how many there are, where each is, and in which one a job lives."""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TypeVar

from redis.asyncio import Redis

from ingine.errors import ClientError
from ingine.servers import Servers
from ingine.wire import Keys, all_partitions, partition_of, read_num_partitions
from producer.connection import Server

T = TypeVar("T")


@dataclass(frozen=True)
class Partition:
    keys: Keys
    server: Server

    async def call(self, command: Callable[[Redis, Keys], Awaitable[T]]) -> T:
        """Await `command(redis, keys)`. Raises ServerUnavailable."""
        return await self.server.call(lambda: command(self.server.redis, self.keys))


class Partitions:
    """Asks once how many there are. Who finds nothing where it should be asks again: `changed`."""

    def __init__(self, queue: str, where: Servers | Redis):
        """`where`: a client of the caller's own serves all partitions."""
        self.queue = queue
        self._where = where
        self._servers: dict[Redis, Server] = {}
        self.base = self._partition(Keys(queue))
        """Whose settings say how many there are. With one, it is that one."""
        self._known: list[Partition] = []

    async def all(self) -> list[Partition]:
        """Raises ServerUnavailable if it has to ask and cannot."""
        if not self._known:
            await self.changed()
        return self._known

    async def of(self, job_id: str) -> Partition:
        """Where the job lives."""
        partitions = await self.all()
        return partitions[partition_of(job_id, len(partitions))]

    async def changed(self) -> bool:
        """Ask anew how many there are. True if it is another number than before."""
        field = await self.base.call(lambda redis, keys: redis.hget(keys.settings, "partitions"))
        try:
            number, before = read_num_partitions(field), len(self._known)
        except ValueError as error:
            raise ClientError(f"queue {self.queue!r}: {error}") from None
        if number != before:
            self._known = self.among(number)
        return number != before

    def among(self, number: int) -> list[Partition]:
        """As if there were so many."""
        return [self._partition(keys) for keys in all_partitions(self.queue, number)]

    async def each(self, command: Callable[[Redis, Keys], Awaitable[T]]) -> list[T]:
        """The answers of all partitions to one command, in their order. Raises ServerUnavailable."""
        return await asyncio.gather(*(partition.call(command) for partition in await self.all()))

    def _partition(self, keys: Keys) -> Partition:
        where = None
        if isinstance(self._where, Servers):
            redis, where = self._where.client(keys), self._where.where
        else:
            redis = self._where
        if redis not in self._servers:
            self._servers[redis] = Server(redis, where)
        return Partition(keys, self._servers[redis])
