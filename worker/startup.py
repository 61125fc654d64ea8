"""What a worker does to a queue before it serves it. May be repeated."""

from redis.asyncio import Redis
from redis.exceptions import AuthenticationError, ResponseError

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


async def check_server(redis: Redis, url: str) -> None:
    """Raises ConfigError for a server that lets nobody in, or that would throw jobs and logs away.

    url: as it may be shown.
    """
    try:
        policy = (await redis.config_get("maxmemory-policy")).get("maxmemory-policy", "")
    except AuthenticationError as error:
        raise ConfigError(f"INGINE_REDIS_URL: the server at {url} says: {error}") from None
    except ResponseError:
        return  # CONFIG is forbidden to us, which speaks for whoever set the server up.
    if policy.startswith("allkeys-"):
        raise ConfigError(
            f"the server's maxmemory-policy is {policy}: it would delete jobs and logs. Set noeviction."
        )


async def prepare(redis: Redis, url: str, queue: Queue, settings: WorkerSettings) -> None:
    """One partition, on its own server. Raises ConfigError as `check_server` does."""
    await check_server(redis, url)
    await set_limits(redis, queue.keys, settings)
    await queue.create_groups()


async def set_limits(redis: Redis, keys: Keys, settings: WorkerSettings) -> None:
    """The queue's limits live in the queue, so that all producers agree; a worker may bring new ones."""
    names = ("max_jobs", "max_job_bytes", "max_bytes", "max_jobs_per_s")
    limits = {name: getattr(settings, name) for name in names}
    if given := {name: value for name, value in limits.items() if value is not None}:
        await redis.hset(keys.settings, mapping=given)
