"""A connection for sharded pub/sub, on which nothing but messages and pings travels.

It is a bare connection. One of a client's pool would be kept from its other users for ever. redis-py's
`PubSub` reconnects inside whichever call meets an error: with one coroutine reading and another subscribing,
both would. It also passes over the message that a channel's slot has gone to another node.
"""

from redis import exceptions
from redis.asyncio import Redis


class PubSubConnection:
    def __init__(self, redis: Redis, *, ping_s: float):
        """Does not connect yet, and not again once it has broken.

        ping_s: after so much silence the server is asked whether it is there, and has as long to answer.
        """
        self._connection = redis.connection_pool.make_connection()
        self._ping_s = ping_s
        self._unanswered_ping = False

    async def connect(self) -> None:
        await self._connection.connect()

    async def disconnect(self) -> None:
        await self._connection.disconnect(nowait=True)

    async def send(self, *command: str | bytes) -> None:
        """SSUBSCRIBE or SUNSUBSCRIBE. Raises RedisError or OSError."""
        try:
            await self._connection.send_command(*command, check_health=False)
        except AttributeError as error:
            # redis-py's, where the coroutine that reads has met the connection's end before we could write.
            if self._connection.is_connected:
                raise
            raise exceptions.ConnectionError("the connection has ended") from error

    async def read(self) -> list | None:
        """The next message, as the server sends it; None where there was silence, and a ping is on its way.

        Raises ConnectionError where the ping before had no answer: a connection may be half-open for hours,
        and only a ping finds out. Raises RedisError or OSError for a connection that has ended.
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
