"""What a worker does to a queue before it serves it. May be repeated."""

import msgpack
from redis.asyncio import Redis

from ingine.errors import ConfigError
from ingine.keys import SILENT_AFTER_S, Keys, read_num_partitions
from worker.heartbeat import Heartbeat
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


async def enter(redis: Redis, queue: Queue, heartbeat: Heartbeat, settings: WorkerSettings) -> None:
    """The first beat. Raises ConfigError if a worker of another model serves the queue, unless that is meant.

    Asked again after the beat: of two workers that start at the same moment, the later one gives way.
    """
    if settings.mixed_models:
        await heartbeat.beat()
        return
    await _refuse_other_models(redis, queue)
    await heartbeat.beat()
    try:
        await _refuse_other_models(redis, queue)
    except ConfigError:
        await heartbeat.leave()
        raise


async def _refuse_other_models(redis: Redis, queue: Queue) -> None:
    model = queue.model
    now_s, _ = await redis.time()
    raw_beats = await redis.hgetall(queue.keys.workers)
    beats = {name.decode(errors="replace"): _beat(raw) for name, raw in raw_beats.items()}
    own = beats.get(queue.worker_id) or {"since_s": now_s + 1}
    for worker_id, beat in beats.items():
        live = beat and beat["at_s"] > now_s - SILENT_AFTER_S
        earlier = live and (beat["since_s"], worker_id) < (own["since_s"], queue.worker_id)
        if earlier and beat["fingerprint"] != model.fingerprint:
            raise ConfigError(
                f"queue {queue.keys.queue!r} is served by {beat['model']} ({beat['fingerprint']}) at worker "
                f"{worker_id}, and this worker has {model.name} ({model.fingerprint}): the same prompt would "
                "get different answers. Use another queue (INGINE_QUEUE), stop the others first, or set "
                "INGINE_MIXED_MODELS=true"
            )


def _beat(raw: bytes) -> dict | None:
    """None for what is no heartbeat of a worker that tells its model."""
    try:
        beat = msgpack.unpackb(raw)
        beat = {name: beat[name] for name in ("at_s", "since_s", "model", "fingerprint")}
    except (ValueError, TypeError, KeyError):
        return None
    return beat if isinstance(beat["at_s"], int) and isinstance(beat["since_s"], int) else None
