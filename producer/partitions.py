"""A queue's partitions: their number, the server of each, and the partition of a job."""

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
"""How often one call looks for a job again because the number of partitions has changed meanwhile."""
MOVE_PAUSE_S = 0.05, 0.15
"""Shortest and longest pause before the job is looked for again."""


@dataclass(frozen=True)
class Partition:
    keys: Keys
    server: Server

    async def call(self, command: Callable[[Redis, Keys], Awaitable[T]]) -> T:
        """Await `command(redis, keys)`. Raises ServerUnavailable."""
        return await self.server.call(lambda: command(self.server.redis, self.keys))


class Partitions:
    """The partitions of one queue. Their number is read once, and again if a job is not found (`moved`)."""

    def __init__(self, queue: str, where: Servers | Redis):
        """where: the servers, or a client of the caller's own that serves all partitions."""
        self.queue = queue
        self._where = where
        self._servers: dict[Redis, Server] = {}
        self.base = self._partition(Keys(queue))
        """Its settings hold the number of partitions. A queue with one partition has only this one."""
        self._known: list[Partition] = []

    async def all(self) -> list[Partition]:
        """The partitions as last read, or read now if never before. Raises as `latest` does."""
        return self._known or await self.latest()

    async def latest(self) -> list[Partition]:
        """Read the number of partitions, and return them.

        Raises ServerUnavailable, and ClientError if the setting is not a valid number.
        """
        field = await self.base.call(lambda redis, keys: redis.hget(keys.settings, "partitions"))
        try:
            self._known = self.among(read_num_partitions(field))
        except ValueError as error:
            raise ClientError(f"queue {self.queue!r}: {error}") from None
        return self._known

    async def of(self, job_id: str) -> Partition:
        """The partition that the job belongs to."""
        partitions = await self.all()
        return partitions[partition_of(job_id, len(partitions))]

    async def moved(self, job_id: str, before: Partition) -> bool:
        """Read the number again. True if the job belongs to another partition than `before`.

        It then pauses first, so that the change may complete.
        """
        await self.latest()
        if await self.of(job_id) == before:
            return False
        await asyncio.sleep(random.uniform(*MOVE_PAUSE_S))
        return True

    def unsettled(self) -> ClientError:
        """The error for a call during which the number has changed too often."""
        return ClientError(
            f"the number of partitions of queue {self.queue!r} is being changed: "
            "try again, or complete the change with `ingine queue partition`"
        )

    def among(self, number: int) -> list[Partition]:
        """The partitions of this queue if it had `number` of them."""
        return [self._partition(keys) for keys in all_partitions(self.queue, number)]

    async def each(self, command: Callable[[Redis, Keys], Awaitable[T]]) -> list[tuple[Partition, T]]:
        """Run `command` on every partition there is now. Returns (partition, answer) in partition order.

        Raises ServerUnavailable.
        """
        partitions = await self.latest()
        answers = await asyncio.gather(*(partition.call(command) for partition in partitions))
        return list(zip(partitions, answers, strict=True))

    def _partition(self, keys: Keys) -> Partition:
        servers = self._where if isinstance(self._where, Servers) else None
        redis = servers.client(keys) if servers else self._where
        if redis not in self._servers:
            self._servers[redis] = Server(redis, servers)
        return Partition(keys, self._servers[redis])
