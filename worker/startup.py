"""Set up a queue before a worker serves it. Every step may be repeated."""

import msgpack
from redis.asyncio import Redis
from redis.exceptions import ResponseError

from ingine.connect.scripts import run_script
from ingine.contract.calls.upkeep import agree_on_model
from ingine.contract.keys import SILENT_AFTER_S, Keys, read_num_partitions
from ingine.errors import ConfigError
from ingine.worker.heartbeat import Heartbeat
from ingine.worker.queue import Queue
from ingine.worker.retry import never_passes
from ingine.worker.settings import WorkerSettings

MAX_REPLACED = 10
"""Models of dead workers that a starting worker replaces one after another. Each but the first was written
after it had begun to ask, so even a second one is rare."""


async def num_partitions(redis: Redis, queue: str) -> int:
    """The number of partitions in the queue's own settings hash. Raises ConfigError if it is none."""
    try:
        return read_num_partitions(await redis.hget(Keys(queue).settings, "partitions"))
    except ValueError as error:
        raise ConfigError(f"INGINE_QUEUE {queue!r}: {error}") from None
    except ResponseError as error:
        if never_passes(error):
            raise foreign_key(queue, error) from None
        raise


def foreign_key(queue: str, error: ResponseError) -> ConfigError:
    """The error of a worker that cannot start because a key of the queue's settings has another type."""
    return ConfigError(
        f"INGINE_QUEUE {queue!r}: {Keys(queue).settings}, or the same key of a partition, has another type "
        f"({error}): look with TYPE, and delete it"
    )


async def prepare(redis: Redis, queue: Queue, settings: WorkerSettings) -> None:
    """Set up one partition on its own server, which has been checked."""
    await set_limits(redis, queue.keys, settings)
    await queue.create_groups()


async def set_limits(redis: Redis, keys: Keys, settings: WorkerSettings) -> None:
    """Write the limits that the worker's settings have to the queue, where all producers read them."""
    names = ("max_jobs", "max_job_bytes", "max_bytes", "max_jobs_per_s")
    limits = {name: getattr(settings, name) for name in names}
    if given := {name: value for name, value in limits.items() if value is not None}:
        await redis.hset(keys.settings, mapping=given)


async def enter(redis: Redis, queue: Queue, heartbeat: Heartbeat, settings: WorkerSettings) -> None:
    """Send the first heartbeat, and agree with the queue's other workers on the model.

    Raises ConfigError if the queue has workers of another model, unless the settings allow that. The
    heartbeat comes first, so that a worker that has set the queue's model is visibly alive to all that ask
    later.
    """
    await heartbeat.beat()
    if settings.mixed_models:
        return
    try:
        await _agree_on_model(redis, queue)
    except ConfigError:
        await heartbeat.leave()
        raise


async def _agree_on_model(redis: Redis, queue: Queue) -> None:
    """Set the queue's model to this worker's. Raises ConfigError if a live worker has another one."""
    ours, replaces = queue.model.fingerprint, b""
    for _ in range(MAX_REPLACED + 1):
        call = agree_on_model(queue.keys, fingerprint=ours, replaces=replaces)
        if (holds := await run_script(redis, call)) == ours.encode():
            return
        if worker := await _live_worker_of(redis, queue.keys, holds):
            raise ConfigError(
                f"queue {queue.keys.queue!r} is served with another model ({holds.decode()} at {worker}) "
                f"than this worker has ({ours}, {queue.model.name}): the same prompt would get different "
                "answers. Use another queue (INGINE_QUEUE), stop the others first, or set "
                "INGINE_MIXED_MODELS=true"
            )
        replaces = holds
    raise ConfigError(
        f"queue {queue.keys.queue!r}: a client keeps writing models that no worker has to the field "
        f"`model` of {queue.keys.settings}, most recently {holds[:100]!r}: find that client, or set "
        "INGINE_MIXED_MODELS=true"
    )


async def _live_worker_of(redis: Redis, keys: Keys, fingerprint: bytes) -> str | None:
    now_s, _ = await redis.time()
    for worker_id, raw in (await redis.hgetall(keys.workers)).items():
        try:
            beat = msgpack.unpackb(raw)
            if beat["fingerprint"].encode() == fingerprint and abs(now_s - beat["at_s"]) <= SILENT_AFTER_S:
                return worker_id.decode(errors="replace")
        except (ValueError, TypeError, KeyError, AttributeError):
            continue  # not a heartbeat that has a model
    return None
