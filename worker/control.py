"""The control channel: nudges that spare waiting for the next heartbeat. What they say is always in a key."""

import contextlib
import logging
from collections.abc import Awaitable, Callable

import msgpack
from redis.asyncio import Redis
from redis.exceptions import RedisError

from ingine.wire import Keys
from worker.logs import log_event
from worker.retry import Backoff

MAX_NUDGE_BYTES = 1024

logger = logging.getLogger(__name__)


class ControlListener:
    """Calls `obey(command)` for each map that arrives, until cancelled. Anybody can publish here: whatever is
    not a map with a command is ignored, and `obey` trusts nothing that it has not read from a key."""

    def __init__(self, redis: Redis, keys: Keys, obey: Callable[[dict], Awaitable[None]]):
        self._redis = redis
        self._keys = keys
        self._obey = obey

    async def run(self) -> None:
        backoff = Backoff("control channel")
        while True:
            try:
                async with self._redis.pubsub() as pubsub:
                    await pubsub.ssubscribe(self._keys.control)
                    while True:
                        message = await pubsub.get_message(ignore_subscribe_messages=True, timeout=1.0)
                        backoff.reset()
                        if message:
                            await self._receive(message["data"])
            except (RedisError, OSError) as error:
                await backoff.sleep(error)

    async def _receive(self, raw: bytes) -> None:
        command = None
        if len(raw) <= MAX_NUDGE_BYTES:
            with contextlib.suppress(ValueError, TypeError):
                command = msgpack.unpackb(raw)
        if isinstance(command, dict) and isinstance(command.get("command"), str):
            await self._obey(command)
        else:
            log_event(logger, logging.WARNING, "control message ignored", num_bytes=len(raw))
