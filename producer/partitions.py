"""A queue's partitions: how many there are, where each is, and in which one a job lives."""

import asyncio
import random
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TypeVar

from redis.asyncio import Redis

from ingine.connect.servers import Servers
from ingine.contract.keys import Keys, all_partitions, partition_of, read_num_partitions
from ingine.errors import ClientError
from ingine.producer.connection import Server

T = TypeVar("T")

MAX_MOVES = 10
"""How often a job is looked for anew because the number of partitions has changed meanwhile."""
MOVE_PAUSE_S = 0.05, 0.15
"""Before it is looked for there, at least and at most."""


@dataclass(frozen=True)
class Partition:
    keys: Keys
    server: Server

    async def call(self, command: Callable[[Redis, Keys], Awaitable[T]]) -> T:
        """Await `command(redis, keys)`. Raises ServerUnavailable."""
        return await self.server.call(lambda: command(self.server.redis, self.keys))


class Partitions:
    """Asks once how many there are. Who finds nothing where it should be asks again: `moved`."""

    def __init__(self, queue: str, where: Servers | Redis):
        """`where`: a client of the caller's own serves all partitions."""
        self.queue = queue
        self._where = where
        self._servers: dict[Redis, Server] = {}
        self.base = self._partition(Keys(queue))
        """Whose settings say how many there are. With one, it is that one."""
        self._known: list[Partition] = []

    async def all(self) -> list[Partition]:
        """As many as there were when last asked. Raises ServerUnavailable if it has to ask and cannot."""
        return self._known or await self.latest()

    async def latest(self) -> list[Partition]:
        """As many as there are now. Raises ServerUnavailable, and ClientError if that is no number."""
        field = await self.base.call(lambda redis, keys: redis.hget(keys.settings, "partitions"))
        try:
            self._known = self.among(read_num_partitions(field))
        except ValueError as error:
            raise ClientError(f"queue {self.queue!r}: {error}") from None
        return self._known

    async def of(self, job_id: str) -> Partition:
        """Where the job lives."""
        partitions = await self.all()
        return partitions[partition_of(job_id, len(partitions))]

    async def moved(self, job_id: str, before: Partition) -> bool:
        """Ask anew how many there are. True if the job lives elsewhere now than where the caller looked.

        After a pause then, in which the change may come to its end."""
        await self.latest()
        if await self.of(job_id) == before:
            return False
        await asyncio.sleep(random.uniform(*MOVE_PAUSE_S))
        return True

    def unsettled(self) -> ClientError:
        """What to raise where it has changed too often for one call."""
        return ClientError(
            f"the number of partitions of queue {self.queue!r} is being changed: "
            "try again, or complete the change with `ingine queue partition`"
        )

    def among(self, number: int) -> list[Partition]:
        """As if there were so many."""
        return [self._partition(keys) for keys in all_partitions(self.queue, number)]

    async def each(self, command: Callable[[Redis, Keys], Awaitable[T]]) -> list[tuple[Partition, T]]:
        """All that there are now, in their order, with their answers. Raises ServerUnavailable."""
        partitions = await self.latest()
        answers = await asyncio.gather(*(partition.call(command) for partition in partitions))
        return list(zip(partitions, answers, strict=True))

    def _partition(self, keys: Keys) -> Partition:
        servers = self._where if isinstance(self._where, Servers) else None
        redis = servers.client(keys) if servers else self._where
        if redis not in self._servers:
            self._servers[redis] = Server(redis, servers)
        return Partition(keys, self._servers[redis])
