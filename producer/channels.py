"""The fast lane: live events of all of a client's streams on one server, over one pub/sub connection."""

import asyncio
import logging
import random
from collections import Counter, deque

from redis import exceptions
from redis.asyncio import Redis
from redis.asyncio.connection import AbstractConnection

from ingine.servers import is_lacking
from producer.home import end_tasks, is_cancelled

MAX_UNREAD_EVENTS = 256
"""Live events kept for one stream. A slower consumer goes on from the log instead."""
PING_S = 10.0
MIN_BACKOFF_S, MAX_BACKOFF_S = 0.05, 2.0

log = logging.getLogger(__name__)


class Subscription:
    """One stream's end of the hub: the live events that it has not read, and whether the log has others."""

    def __init__(self):
        self.events: deque[bytes] = deque()
        self.stale = True
        """The log must be read before any live event: it may have more than we were sent."""
        self._wake = asyncio.Event()

    def push(self, event: bytes) -> None:
        if len(self.events) >= MAX_UNREAD_EVENTS:
            self.mark_stale()
        elif not self.stale:
            self.events.append(event)
        self._wake.set()

    def mark_stale(self) -> None:
        self.events.clear()
        self.stale = True
        self._wake.set()

    async def wait(self, timeout_s: float) -> None:
        """Until something is pushed; after `timeout_s` of silence the subscription is stale."""
        try:
            async with asyncio.timeout(timeout_s):
                await self._wake.wait()
        except TimeoutError:
            self.stale = True
        self._wake.clear()


class ChannelHub:
    """One pub/sub connection to one server. Dispatches what comes in; never waits for a consumer.

    Channels are sharded: they live where their partition's keys do, in a cluster too.

    It works on a bare connection instead of redis-py's `PubSub`, which reconnects inside whichever call meets
    the error: with one coroutine reading and another subscribing, both would.
    """

    def __init__(self, redis: Redis):
        self._redis = redis
        self._subscriptions: dict[bytes, list[Subscription]] = {}
        self._changed = asyncio.Event()
        self._runner: asyncio.Task | None = None
        self._backoff_s = MIN_BACKOFF_S
        self._told = False
        """That there are no live events. Once an outage, which ends with a subscription that is confirmed."""
        self._closed = False

    def subscribe(self, channel: str) -> Subscription:
        """Starts at once as stale, since the log may have something already. Never fails and never waits."""
        subscription = Subscription()
        self._subscriptions.setdefault(channel.encode(), []).append(subscription)
        self._changed.set()
        if self._runner is None:
            self._runner = asyncio.create_task(self._run())
        return subscription

    def unsubscribe(self, channel: str, subscription: Subscription) -> None:
        remaining = self._subscriptions[channel.encode()]
        remaining.remove(subscription)
        if not remaining:
            del self._subscriptions[channel.encode()]
            self._changed.set()

    async def aclose(self) -> None:
        self._closed = True
        self._changed.set()
        if self._runner:
            await end_tasks([self._runner])
        for subscriptions in self._subscriptions.values():
            for subscription in subscriptions:
                subscription.mark_stale()

    async def _run(self) -> None:
        while not (self._closed or is_cancelled()):
            connection = self._redis.connection_pool.make_connection()
            try:
                await connection.connect()
                if is_cancelled():
                    raise asyncio.CancelledError
                await self._serve(connection)
            except (exceptions.RedisError, OSError) as error:
                if not self._closed and not self._told:
                    self._told = True
                    log.warning("no live events (%s), streams go on from the log", error)
                if is_lacking(error):
                    self._closed = True  # it will not be known later either
            finally:
                await connection.disconnect(nowait=True)
            if not is_cancelled():
                await asyncio.sleep(self._backoff_s * random.uniform(0.5, 1.0))
                self._backoff_s = min(2 * self._backoff_s, MAX_BACKOFF_S)

    async def _serve(self, connection: AbstractConnection) -> None:
        """Until reading or writing fails. No task group: in Python 3.11 it leaves us as if cancelled."""
        leaving = Counter()
        tasks = [
            asyncio.create_task(self._read(connection, leaving)),
            asyncio.create_task(self._keep_subscribed(connection, leaving)),
        ]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            await end_tasks(tasks)
        for task in tasks:
            if not task.cancelled():
                task.result()

    async def _keep_subscribed(self, connection: AbstractConnection, leaving: Counter[bytes]) -> None:
        """Level-triggered: whatever came and went since the last look travels as one command each.

        `leaving`: channels that the server has been asked to end, and has not confirmed yet.
        """
        subscribed: set[bytes] = set()
        while not (self._closed or is_cancelled()):
            self._changed.clear()
            wanted = set(self._subscriptions)
            if new := wanted - subscribed:
                await _send(connection, "SSUBSCRIBE", *new)
            if old := subscribed - wanted:
                leaving.update(old)
                await _send(connection, "SUNSUBSCRIBE", *old)
            subscribed = wanted
            if not is_cancelled():
                await self._changed.wait()

    async def _read(self, connection: AbstractConnection, leaving: Counter[bytes]) -> None:
        unanswered_ping = False
        while not (self._closed or is_cancelled()):
            message = await connection.read_response(timeout=PING_S, push_request=True)
            if message is None:  # a connection may be half-open for hours; only a ping finds out
                if unanswered_ping:
                    raise exceptions.ConnectionError(f"no answer to PING for {PING_S:.0f} s")
                await _send(connection, "PING")
                unanswered_ping = True
                continue
            unanswered_ping = False
            match message:
                case [b"smessage", channel, event]:
                    for subscription in self._subscriptions.get(channel, ()):
                        subscription.push(event)
                case [b"ssubscribe", channel, _]:
                    self._backoff_s, self._told = MIN_BACKOFF_S, False
                    for subscription in self._subscriptions.get(channel, ()):
                        subscription.mark_stale()
                case [b"sunsubscribe", channel, _] if leaving[channel]:
                    leaving[channel] -= 1
                    if not leaving[channel]:
                        del leaving[channel]
                case [b"sunsubscribe", *_]:
                    raise exceptions.ConnectionError("the channels have moved to another node")


async def _send(connection: AbstractConnection, *command: str | bytes) -> None:
    try:
        await connection.send_command(*command, check_health=False)
    except AttributeError as error:
        # redis-py's, where the coroutine that reads has met the connection's end before we could write.
        if connection.is_connected:
            raise
        raise exceptions.ConnectionError("the connection has ended") from error
