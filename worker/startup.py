"""What a worker does to a queue before it serves it. May be repeated."""

from redis.asyncio import Redis

from ingine.errors import ConfigError
from ingine.keys import Keys, read_num_partitions
from worker.queue import Queue
from worker.settings import WorkerSettings


async def num_partitions(redis: Redis, queue: str) -> int:
    """What the queue's own hash says, for all to agree on."""
    try:
        return read_num_partitions(await redis.hget(Keys(queue).settings, "partitions"))
    except ValueError as error:
        raise ConfigError(f"INGINE_QUEUE {queue!r}: {error}") from None


async def prepare(redis: Redis, queue: Queue, settings: WorkerSettings) -> None:
    """One partition, on its own server, which has been checked."""
    await set_limits(redis, queue.keys, settings)
    await queue.create_groups()


async def set_limits(redis: Redis, keys: Keys, settings: WorkerSettings) -> None:
    """The queue's limits live in the queue, so that all producers agree; a worker may bring new ones."""
    names = ("max_jobs", "max_job_bytes", "max_bytes", "max_jobs_per_s")
    limits = {name: getattr(settings, name) for name in names}
    if given := {name: value for name, value in limits.items() if value is not None}:
        await redis.hset(keys.settings, mapping=given)
