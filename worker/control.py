"""The control channel: nudges that spare waiting for the next heartbeat. What they say is always in a key."""

import contextlib
import logging
from collections.abc import Awaitable, Callable

import msgpack
from redis.asyncio import Redis
from redis.asyncio.connection import AbstractConnection
from redis.exceptions import ConnectionError, RedisError

from ingine.keys import Keys
from worker.logs import log_event
from worker.retry import Backoff

MAX_NUDGE_BYTES = 1024
PING_S = 5.0
"""After so much silence the server is asked whether it is there, and has as long to answer."""

logger = logging.getLogger(__name__)


class ControlListener:
    """Calls `obey(command)` for each map that arrives, until cancelled. Anybody can publish here: whatever is
    not a map with a command is ignored, and `obey` trusts nothing that it has not read from a key.

    On a bare connection: one of the client's pool would be kept from its other users for ever, and redis-py's
    `PubSub` passes over the message that the channel's slot has gone to another node.
    """

    def __init__(self, redis: Redis, keys: Keys, obey: Callable[[dict], Awaitable[None]]):
        self._redis = redis
        self._keys = keys
        self._obey = obey

    async def run(self) -> None:
        backoff = Backoff("control channel")
        while True:
            connection = self._redis.connection_pool.make_connection()
            try:
                await connection.connect()
                await connection.send_command("SSUBSCRIBE", self._keys.control)
                await self._listen(connection, backoff)
            except (RedisError, OSError) as error:
                await backoff.sleep(error)
            finally:
                await connection.disconnect(nowait=True)

    async def _listen(self, connection: AbstractConnection, backoff: Backoff) -> None:
        """Until the connection breaks, or may as well have."""
        unanswered_ping = False
        while True:
            message = await connection.read_response(timeout=PING_S, push_request=True)
            if message is None:  # a connection may be half-open for hours; only a ping finds out
                if unanswered_ping:
                    raise ConnectionError(f"no answer to PING for {PING_S:g} s")
                await connection.send_command("PING", check_health=False)
                unanswered_ping = True
                continue
            unanswered_ping = False
            backoff.reset()
            match message:
                case [b"smessage", _, raw]:
                    await self._receive(raw)
                case [b"sunsubscribe", *_]:
                    raise ConnectionError("the control channel has moved to another node")

    async def _receive(self, raw: bytes) -> None:
        command = None
        if len(raw) <= MAX_NUDGE_BYTES:
            with contextlib.suppress(ValueError, TypeError):
                command = msgpack.unpackb(raw)
        if isinstance(command, dict) and isinstance(command.get("command"), str):
            await self._obey(command)
        else:
            log_event(logger, logging.WARNING, "control message ignored", num_bytes=len(raw))
