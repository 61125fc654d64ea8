"""Commands on one server: a small pool, retries, and errors that say what to do."""

import asyncio
import hashlib
import re
from collections.abc import Awaitable, Callable
from typing import TypeVar

from redis import exceptions
from redis.asyncio import Redis

from ingine.connect.server_errors import NoSuchDatabase, WrongServer, is_lacking
from ingine.connect.servers import Servers
from ingine.contract.calls import producing
from ingine.errors import ConfigError, ServerUnavailable

T = TypeVar("T")
MAX_CONNECTIONS = 8
"""Connections to one server: enough for several round trips at once. All streams share them."""
RETRIES = 5
"""Attempts after the first, at most about three seconds in all if nothing listens on the port. Every command
of a client may be sent twice: see `scripts/submit.lua`."""
TIMEOUT_S = 5.0
"""Limit for each attempt. Shorter than DEADLINE_S, so that a command survives one half-open connection."""
DEADLINE_S = 10.0
"""Limit for a command with all its attempts, including the wait for a free connection."""


def connect(redis_url: str | None) -> Servers:
    """Make the clients for a queue's servers; see `Servers`. Does not connect yet.

    Raises ConfigError if the URL cannot be used.
    """
    return Servers(
        redis_url,
        client_name="ingine-producer",
        retries=RETRIES,
        timeout_s=TIMEOUT_S,
        max_connections=MAX_CONNECTIONS,
    )


class Server:
    """Runs commands on one server. Keeps no state between calls."""

    def __init__(self, redis: Redis, servers: Servers | None = None):
        """servers: names the server in errors, for a client whose address is looked up at each connect."""
        if not isinstance(redis, Redis):
            module = type(redis).__module__.partition(".")[0]
            raise ConfigError(
                f"redis= must be a redis.asyncio.Redis, not {module}'s {type(redis).__qualname__}"
            )
        options = redis.connection_pool.connection_kwargs
        if options.get("decode_responses"):
            raise ConfigError("jobs and events are bytes: give a redis client without decode_responses")
        self.redis = redis
        address = f"{options.get('host', 'localhost')}:{options.get('port', 6379)}"
        self._servers, self._address = servers, options.get("path", address)

    async def call(self, command: Callable[[], Awaitable[T]]) -> T:
        """Await one command. Raises ServerUnavailable for any error of the server or the connection, and
        after DEADLINE_S. As after any lost reply, the command may have been executed, or still be.

        If the caller is cancelled, it returns at once, but the command runs to its end: a connection that is
        abandoned between a command and its reply cannot be used again.
        """
        running = asyncio.ensure_future(self.in_time(command, DEADLINE_S))
        running.add_done_callback(lambda done: done.cancelled() or done.exception())  # or asyncio logs it
        try:
            return await asyncio.shield(running)
        except exceptions.RedisError as error:
            raise self.unavailable(error) from error

    async def in_time(self, command: Callable[[], Awaitable[T]], limit_s: float) -> T:
        """Await one command. Raises RedisError. If cancelled, or after `limit_s`, closes its connection."""
        try:
            async with asyncio.timeout(limit_s):
                return await command()
        except TimeoutError:
            raise exceptions.TimeoutError(f"no answer within {limit_s:g} s") from None

    def unavailable(self, error: exceptions.RedisError) -> ServerUnavailable:
        where = self._servers.where if self._servers else self._address
        if self._servers and isinstance(error, exceptions.ConnectionError | exceptions.TimeoutError):
            where += self._servers.looked_in
        return ServerUnavailable(f"Redis at {where} {_what_to_do(error)}")


def _what_to_do(error: exceptions.RedisError) -> str:
    match error:
        case NoSuchDatabase():
            return f"cannot be used: {error}: name another in INGINE_REDIS_URL, usually 0"
        case exceptions.AuthenticationError() | exceptions.NoPermissionError():
            return f"refuses these credentials ({error}): set user and password in INGINE_REDIS_URL"
        case WrongServer() | exceptions.ReadOnlyError() | exceptions.MovedError():
            return f"cannot serve the queue ({error}): point INGINE_REDIS_URL at the primary"
        case exceptions.OutOfMemoryError():
            return "is out of memory: let workers drain, or raise maxmemory, and try again"
        case exceptions.BusyLoadingError():
            return "is loading its files: try again in a moment"
        case exceptions.ConnectionError() | exceptions.TimeoutError():
            what = str(error).rstrip(".")
            return f"cannot be reached ({what}): is it running, and is INGINE_REDIS_URL right?"
        case _ if is_lacking(error):
            return (
                f"lacks a command ({error}{_called_in_script(error)}): ingine needs Redis 7 or later, or "
                "Valkey 8 or later, without rename-command"
            )
        case _:
            return f"refuses the command: {error}{_called_in_script(error)}"


def _called_in_script(error: exceptions.RedisError) -> str:
    """Name the command at the script line that the error cites; often the error itself does not."""
    line = re.search(r"@user_script:(\d+)", str(error))
    if line is None:
        return ""
    digest, number = re.search(r"[0-9a-f]{40}", str(error)), int(line[1])
    names = set()
    for text in producing.sources():
        if digest is None or digest[0] == hashlib.sha1(text.encode()).hexdigest():  # Valkey leaves it out
            names |= set(re.findall(r"redis\.call\('(\w+)'", "".join(text.splitlines()[number - 1 : number])))
    return f", which calls {' or '.join(sorted(names))}" if names else ""
