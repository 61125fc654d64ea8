"""The heartbeat: reports that this worker is alive and its state, and reads the queue's settings."""

import asyncio
import contextlib
import itertools
import logging
import math
import time
from collections.abc import Callable

import msgpack
from redis.asyncio import Redis
from redis.exceptions import RedisError

from ingine.connect.scripts import run_script
from ingine.contract.calls.upkeep import forget
from ingine.contract.keys import SILENT_AFTER_S, Keys, Priority
from ingine.worker.logs import log_event
from ingine.worker.metrics import Metrics
from ingine.worker.retry import Backoff, never_passes
from ingine.worker.served_model import ServedModel

logger = logging.getLogger(__name__)

INTERVAL_S = 1.0
FORGET_EVERY = 60
"""Beats between two clean-ups of the data of dead workers."""

FORGET_AFTER_S = 600
"""Silence after which a worker's data is deleted."""
WORKERS_TTL_S = 24 * 3600
"""Time to live of the hashes of workers and of models, and how long a model is remembered."""
_DRAIN = b"drain:"


class Heartbeat:
    """Writes `describe()` to the workers hash once per `INTERVAL_S`.

    With each beat `learn` gets the queue's settings, and `learn_models` the seconds for which no worker has
    served each model, by name and by fingerprint.
    """

    def __init__(
        self,
        redis: Redis,
        keys: Keys,
        worker_id: str,
        model: ServedModel,
        metrics: Metrics,
        *,
        num_partitions: int,
        describe: Callable[[], dict],
        learn: Callable[[dict[str, str]], None],
        learn_models: Callable[[dict[str, float]], None],
    ):
        self._redis = redis
        self._keys = keys
        self._worker_id = worker_id
        self._model = model
        self._metrics = metrics
        self._num_partitions = num_partitions
        self._describe = describe
        self._learn = learn
        self._learn_models = learn_models
        self._early = asyncio.Event()
        self._in_contact_since_s = 0
        """When the latest unbroken series of beats began: seconds since the epoch by the server's clock."""
        self.is_known = False
        """A beat has been sent, so this worker may be in the workers hash."""
        self._had_foreign = False
        """One of the keys that a beat reads or writes has another type."""
        self.last_answer = time.monotonic()
        """When (`time.monotonic`) the server last answered, even if it takes no writes."""

    def beat_early(self) -> None:
        """Have the next beat sent at once."""
        self._early.set()

    async def run(self) -> None:
        """Beat until cancelled. Waits for a server that is away."""
        backoff = Backoff("heartbeat")
        for beat in itertools.count():
            self._early.clear()
            try:
                await self.beat()
                if beat % FORGET_EVERY == 0 and not self._had_foreign:
                    await self._forget_dead_workers()
            except (RedisError, OSError) as error:
                await backoff.sleep(error)
                continue
            backoff.reset()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(INTERVAL_S):
                    await self._early.wait()

    async def beat(self) -> None:
        """Send one beat, and pass on what it reads. Raises RedisError or OSError."""
        now_s, _ = await self._redis.time()
        if not self._in_contact_since_s or time.monotonic() - self.last_answer > SILENT_AFTER_S:
            self._in_contact_since_s = now_s
        self.last_answer = time.monotonic()
        async with self._redis.pipeline(transaction=False) as pipe:
            pipe.hset(self._keys.workers, self._worker_id, msgpack.packb(self._describe() | {"at_s": now_s}))
            pipe.expire(self._keys.workers, WORKERS_TTL_S)
            # If the server has lost the number, producers would route jobs to other partitions.
            pipe.hsetnx(self._keys.settings, "partitions", self._num_partitions)
            pipe.hgetall(self._keys.settings)
            for stream in (*self._keys.all_jobs, self._keys.dead):
                pipe.xlen(stream)
            pipe.zcard(self._keys.delayed)
            pipe.hset(self._keys.models, mapping=dict.fromkeys(self._model.aliases, now_s))
            pipe.expire(self._keys.models, WORKERS_TTL_S)
            pipe.hgetall(self._keys.models)
            self.is_known = True
            answers = await pipe.execute(raise_on_error=False)
            _, _, _, settings, *depths, num_dead, num_delayed, _, _, models = answers
        foreign = [answer for answer in answers if isinstance(answer, Exception)]
        for answer in foreign:
            if not never_passes(answer):
                raise answer
        if foreign and not self._had_foreign:
            log_event(logger, logging.ERROR, "foreign key", error=foreign[0])
        self._had_foreign = bool(foreign)
        partition = self._keys.partition or 0
        for priority, depth in zip(Priority, depths, strict=True):
            self._metrics.queue_depth.labels(priority, partition).set(_depth(depth))
        self._metrics.dead_depth.labels(partition).set(_depth(num_dead))
        self._metrics.delayed_depth.labels(partition).set(_depth(num_delayed))
        # If a key has another type, what was read before stays valid.
        if isinstance(models, dict):
            self._learn_models({_text(name): self._silence_s(now_s, at_s) for name, at_s in models.items()})
        if isinstance(settings, dict):
            self._learn({_text(name): _text(value) for name, value in settings.items()})

    def _silence_s(self, now_s: int, at_s: bytes) -> float:
        """Seconds since a model was last served, at most those for which this worker could see it.

        A time in the future was written by hand, or the server's clock was set back. Like a time older than
        `WORKERS_TTL_S` it counts as never.
        """
        silence_s = now_s - _number(at_s)
        if not 0 <= silence_s < WORKERS_TTL_S:
            return math.inf
        return min(silence_s, now_s - self._in_contact_since_s)

    async def leave(self) -> None:
        """Remove this worker from the workers hash, and the flag that asks it to drain."""
        await self._redis.hdel(self._keys.workers, self._worker_id)
        await self._redis.hdel(self._keys.settings, f"drain:{self._worker_id}")

    async def _forget_dead_workers(self) -> None:
        """Delete the data of dead workers: their ids never come back, since each start makes a new one."""
        await run_script(self._redis, forget(self._keys, idle_ms=FORGET_AFTER_S * 1000))
        now_s, _ = await self._redis.time()
        # In this order: `drain` is set for a worker in the hash, so a flag without a worker is left over.
        fields = await self._redis.hgetall(self._keys.settings)
        workers = await self._redis.hgetall(self._keys.workers)
        dead = {worker for worker, raw in workers.items() if last_beat_s(raw) < now_s - FORGET_AFTER_S}
        if dead:
            await self._redis.hdel(self._keys.workers, *dead)
        drained = {field for field in fields if field.startswith(_DRAIN)}
        if idle := drained - {_DRAIN + worker for worker in workers.keys() - dead}:
            await self._redis.hdel(self._keys.settings, *idle)
        for model, at_s in (await self._redis.hgetall(self._keys.models)).items():
            if _number(at_s) < now_s - WORKERS_TTL_S:
                await self._redis.hdel(self._keys.models, model)


def _depth(answer: int | Exception) -> int:
    """The depth of a stream; 0 if its key has another type, which must not stop the heartbeat."""
    return 0 if isinstance(answer, Exception) else answer


def _text(raw: bytes) -> str:
    return raw.decode(errors="replace")  # any client may have written it


def _number(raw: bytes) -> float:
    """The finite number in `raw`, else 0."""
    try:
        number = float(raw)
    except ValueError:
        return 0.0
    return number if math.isfinite(number) else 0.0


def last_beat_s(raw: bytes) -> float:
    """The time of a heartbeat in seconds since the epoch; 0 for a value that is no heartbeat, so that it is
    deleted too."""
    try:
        at_s = float(msgpack.unpackb(raw)["at_s"])
        return at_s if math.isfinite(at_s) else 0.0
    except (ValueError, TypeError, KeyError):
        return 0.0
