"""The heartbeat: says that this worker lives and how it fares, and learns what the queue's settings say."""

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

from ingine.connect.scripts import load_script
from ingine.contract.keys import GROUP, SILENT_AFTER_S, Keys, Priority
from ingine.worker.logs import log_event
from ingine.worker.metrics import Metrics
from ingine.worker.retry import Backoff, never_passes
from ingine.worker.served_model import ServedModel

logger = logging.getLogger(__name__)

INTERVAL_S = 1.0
FORGET_EVERY = 60
"""Beats between two clean-ups of what dead workers left behind."""

FORGET_AFTER_S = 600
WORKERS_TTL_S = 24 * 3600
_DRAIN = b"drain:"


class Heartbeat:
    """`describe()` is what the workers hash says of us. Each beat `learn` gets the queue's settings, and
    `learn_models` for how long no worker has served each model, in seconds by name and by fingerprint.
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
        self._forget = load_script(redis, "forget")
        self._early = asyncio.Event()
        self._in_contact_since_s = 0
        """When our latest beats without a gap began, by the server's clock."""
        self.is_known = False
        """We may be among the queue's workers: a beat has been sent."""
        self._had_foreign = False
        """Another type lies under one of the keys that a beat reads or writes."""
        self.last_answer = time.monotonic()
        """When the server last answered, be it that it takes no writes."""

    def beat_early(self) -> None:
        self._early.set()

    async def run(self) -> None:
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
        now_s, _ = await self._redis.time()
        if not self._in_contact_since_s or time.monotonic() - self.last_answer > SILENT_AFTER_S:
            self._in_contact_since_s = now_s
        self.last_answer = time.monotonic()
        async with self._redis.pipeline(transaction=False) as pipe:
            pipe.hset(self._keys.workers, self._worker_id, msgpack.packb(self._describe() | {"at_s": now_s}))
            pipe.expire(self._keys.workers, WORKERS_TTL_S)
            # Should the server have lost it, producers would be sent elsewhere.
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
        # Where something else lies, what was learned before holds on.
        if isinstance(models, dict):
            self._learn_models({_text(name): self._silence_s(now_s, at_s) for name, at_s in models.items()})
        if isinstance(settings, dict):
            self._learn({_text(name): _text(value) for name, value in settings.items()})

    def _silence_s(self, now_s: int, at_s: bytes) -> float:
        """How long ago a model was last served, not counting what we could not have seen.

        A time in the future was written by hand, or the server's clock was set back: that is no sign of life,
        nor is one so long ago that it is about to be forgotten.
        """
        silence_s = now_s - _number(at_s)
        if not 0 <= silence_s < WORKERS_TTL_S:
            return math.inf
        return min(silence_s, now_s - self._in_contact_since_s)

    async def leave(self) -> None:
        """Nobody is to count on us any more."""
        await self._redis.hdel(self._keys.workers, self._worker_id)
        await self._redis.hdel(self._keys.settings, f"drain:{self._worker_id}")

    async def _forget_dead_workers(self) -> None:
        """An id never comes back, so all that bears it can go."""
        await self._forget(keys=self._keys.all_jobs, args=[GROUP, FORGET_AFTER_S * 1000])
        now_s, _ = await self._redis.time()
        # In this order: who drains a worker has seen it, so a flag without one is of a worker that has gone.
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
    """0 of a key of another type, which somebody has written: that must not silence a worker."""
    return 0 if isinstance(answer, Exception) else answer


def _text(raw: bytes) -> str:
    return raw.decode(errors="replace")  # whoever may write there may write anything


def _number(raw: bytes) -> float:
    """0 for what is no number."""
    try:
        number = float(raw)
    except ValueError:
        return 0.0
    return number if math.isfinite(number) else 0.0


def last_beat_s(raw: bytes) -> float:
    """0 for what is no heartbeat: it goes too."""
    try:
        at_s = float(msgpack.unpackb(raw)["at_s"])
        return at_s if math.isfinite(at_s) else 0.0
    except (ValueError, TypeError, KeyError):
        return 0.0
