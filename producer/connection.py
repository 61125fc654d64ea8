"""Commands on the server: one small pool, retries, and errors that say what to do."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import TypeVar

from redis import exceptions
from redis.asyncio import BlockingConnectionPool, Redis
from redis.asyncio.retry import Retry
from redis.backoff import EqualJitterBackoff

from ingine.errors import ConfigError, ServerUnavailable

T = TypeVar("T")
MAX_CONNECTIONS = 8
"""Enough to keep several round trips under way; a thousand streams share them."""
RETRIES = 5
"""At most about three seconds in all. Whatever a client sends may be sent twice: see `scripts/submit.lua`."""
TIMEOUT_S = 10.0


def connect(redis_url: str) -> Redis:
    """A client with its own pool. Does not connect yet. Raises ConfigError if the URL cannot be parsed."""
    try:
        pool = BlockingConnectionPool.from_url(
            redis_url,
            max_connections=MAX_CONNECTIONS,
            protocol=2,
            retry=Retry(EqualJitterBackoff(cap=1.0, base=0.1), RETRIES),
            socket_connect_timeout=TIMEOUT_S,
            socket_timeout=TIMEOUT_S,
            socket_keepalive=True,
            client_name="ingine-producer",
        )
    except ValueError as error:
        raise ConfigError(f"INGINE_REDIS_URL (--redis-url): {error}") from None
    return Redis.from_pool(pool)


class Server:
    """The commands of one client. Its pool may be shared; nothing here keeps state between calls."""

    def __init__(self, redis: Redis):
        if redis.connection_pool.connection_kwargs.get("decode_responses"):
            raise ConfigError("jobs and events are bytes: give a redis client without decode_responses")
        self.redis = redis

    async def call(self, command: Callable[[], Awaitable[T]]) -> T:
        """Await one command. Raises ServerUnavailable for whatever the server or the wire has against it.

        A caller that is cancelled leaves at once, but its command runs on to its end: a connection that is
        left between a command and its reply is lost for everyone else.
        """
        running = asyncio.ensure_future(command())
        running.add_done_callback(lambda done: done.cancelled() or done.exception())  # seen, even if we left
        try:
            return await asyncio.shield(running)
        except exceptions.RedisError as error:
            raise self.unavailable(error) from error

    def unavailable(self, error: exceptions.RedisError) -> ServerUnavailable:
        return ServerUnavailable(f"{self._where()} {_what_to_do(error)}")

    def _where(self) -> str:
        options = self.redis.connection_pool.connection_kwargs
        address = f"{options.get('host', 'localhost')}:{options.get('port', 6379)}"
        return f"Redis at {options.get('path', address)}"


def _what_to_do(error: exceptions.RedisError) -> str:
    match error:
        case exceptions.AuthenticationError() | exceptions.NoPermissionError():
            return f"refuses these credentials ({error}): set user and password in INGINE_REDIS_URL"
        case exceptions.ReadOnlyError():
            return "is a read-only replica: point INGINE_REDIS_URL at the primary"
        case exceptions.OutOfMemoryError():
            return "is out of memory: let workers drain, or raise maxmemory, and try again"
        case exceptions.BusyLoadingError():
            return "is loading its files: try again in a moment"
        case exceptions.ConnectionError() | exceptions.TimeoutError():
            return f"cannot be reached ({error}): is it running, and is INGINE_REDIS_URL right?"
        case _:
            return f"refuses the command: {error}"
