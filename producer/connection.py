"""Commands on a server: one small pool, retries, and errors that say what to do."""

import asyncio
import hashlib
import re
from collections.abc import Awaitable, Callable
from typing import TypeVar

from redis import exceptions
from redis.asyncio import Redis

from ingine.connect.server_errors import NoSuchDatabase, WrongServer, is_lacking
from ingine.connect.servers import Servers
from ingine.contract.scripts import read_script
from ingine.errors import ConfigError, ServerUnavailable

T = TypeVar("T")
SCRIPTS = ("submit", "cancel", "partition", "requeue")
"""What a producer may be running when a server complains of a line of a script."""
MAX_CONNECTIONS = 8
"""Enough to keep several round trips under way; a thousand streams share them."""
RETRIES = 5
"""At most about three seconds in all where nobody listens. Whatever a client sends may be sent twice: see
`scripts/submit.lua`."""
TIMEOUT_S = 5.0
"""For each attempt, so that a connection which died in silence is not all that a command has tried."""
DEADLINE_S = 10.0
"""For a command and all its attempts, also while it waits for one of the connections."""


def connect(redis_url: str | None) -> Servers:
    """Does not connect yet. Raises ConfigError if the URL cannot be used. None: see `Servers`."""
    return Servers(
        redis_url,
        client_name="ingine-producer",
        retries=RETRIES,
        timeout_s=TIMEOUT_S,
        max_connections=MAX_CONNECTIONS,
    )


class Server:
    """The commands on one server. Its pool may be shared; nothing here keeps state between calls."""

    def __init__(self, redis: Redis, servers: Servers | None = None):
        """`servers` are for errors, if the client itself does not know: it may find its server by asking."""
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
        """Await one command. Raises ServerUnavailable for whatever the server or the wire has against it.

        So it does after DEADLINE_S. As with any lost reply, the command may have been executed, or be it yet.

        A caller that is cancelled leaves at once, but its command runs on to its end: a connection that is
        left between a command and its reply is lost for everyone else.
        """
        running = asyncio.ensure_future(self.in_time(command, DEADLINE_S))
        running.add_done_callback(lambda done: done.cancelled() or done.exception())  # seen, even if we left
        try:
            return await asyncio.shield(running)
        except exceptions.RedisError as error:
            raise self.unavailable(error) from error

    async def in_time(self, command: Callable[[], Awaitable[T]], limit_s: float) -> T:
        """Await one command. Raises RedisError. Cancelled, or after `limit_s`, it closes its connection."""
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
            return f"cannot be reached ({error}): is it running, and is INGINE_REDIS_URL right?"
        case _ if is_lacking(error):
            return (
                f"lacks a command ({error}{_called_in_script(error)}): ingine needs Redis 7 or later, or "
                "Valkey 8 or later, without rename-command"
            )
        case _:
            return f"refuses the command: {error}{_called_in_script(error)}"


def _called_in_script(error: exceptions.RedisError) -> str:
    """The command at the line of our script that the server names: often it tells no more than that."""
    line = re.search(r"@user_script:(\d+)", str(error))
    if line is None:
        return ""
    digest, number = re.search(r"[0-9a-f]{40}", str(error)), int(line[1])
    names = set()
    for name in SCRIPTS:
        text = read_script(name)
        if digest is None or digest[0] == hashlib.sha1(text.encode()).hexdigest():  # Valkey leaves it out
            names |= set(re.findall(r"redis\.call\('(\w+)'", "".join(text.splitlines()[number - 1 : number])))
    return f", which calls {' or '.join(sorted(names))}" if names else ""
