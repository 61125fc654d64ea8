"""A connection that is used for sharded pub/sub alone.

It is a bare connection: one from a client's pool would never return to it. redis-py's `PubSub` reconnects
inside whichever call meets an error, so with one coroutine reading and another subscribing, both would
reconnect. It also ignores the message that a channel's slot has moved to another node.
"""

from redis import exceptions
from redis.asyncio import Redis


class PubSubConnection:
    """One connection, for one coroutine that reads and one that subscribes."""

    def __init__(self, redis: Redis, *, ping_s: float):
        """Does not connect yet, and never reconnects.

        ping_s: seconds of silence after which a PING is sent, and also the time for its answer.
        """
        self._connection = redis.connection_pool.make_connection()
        self._ping_s = ping_s
        self._unanswered_ping = False

    async def connect(self) -> None:
        await self._connection.connect()

    async def disconnect(self) -> None:
        await self._connection.disconnect(nowait=True)

    async def send(self, *command: str | bytes) -> None:
        """Send SSUBSCRIBE or SUNSUBSCRIBE. Raises RedisError or OSError."""
        try:
            await self._connection.send_command(*command, check_health=False)
        except AttributeError as error:
            # redis-py raises it if the reading coroutine has closed the connection before this write.
            if self._connection.is_connected:
                raise
            raise exceptions.ConnectionError("the connection has ended") from error

    async def read(self) -> list | None:
        """Return the next message, as the server sent it. None after `ping_s` of silence; a PING was sent.

        Raises ConnectionError if the previous PING had no answer: a connection may stay half-open for hours,
        and only a PING detects that. Raises RedisError or OSError if the connection has ended.
        """
        message = await self._connection.read_response(timeout=self._ping_s, push_request=True)
        if message is not None:
            self._unanswered_ping = False
        elif self._unanswered_ping:
            raise exceptions.ConnectionError(f"no answer to PING for {self._ping_s:g} s")
        else:
            await self.send("PING")
            self._unanswered_ping = True
        return message
