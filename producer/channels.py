"""Wake-ups for a client's streams: their jobs' channels, over one pub/sub connection for each server."""

import asyncio
import logging
import math
import random
from collections import Counter

import msgpack
from redis import exceptions
from redis.asyncio import Redis

from ingine.connect.pubsub import PubSubConnection
from ingine.connect.server_errors import is_lacking
from ingine.contract.events import UNREADABLE
from ingine.producer.home import end_tasks, is_cancelled

MAX_MESSAGE_BYTES = 64 << 10
"""A larger message is not parsed. Like any other, it makes the stream read the log."""
MESSAGES_AT_ONCE = 32
"""Messages handled before other tasks run, so that a flood of them starves no stream."""
PING_S = 10.0
MIN_BACKOFF_S, MAX_BACKOFF_S = 0.05, 2.0

log = logging.getLogger(__name__)


Place = tuple[float, bool]
"""How far a log reaches: a position, and whether the job has ended there."""
NOWHERE: Place = (0, False)
ANYWHERE: Place = (math.inf, True)


def place_of(message: bytes) -> Place:
    """How far the job's log reaches according to `message`; ANYWHERE if it is not an event.

    It is only a reason to read the log: any client can publish anything.
    """
    if len(message) > MAX_MESSAGE_BYTES:
        return ANYWHERE
    try:
        fields = msgpack.unpackb(message, strict_map_key=False)
        position, is_end = fields["position"], fields["type"] != "tokens"
    except UNREADABLE:
        return ANYWHERE
    return (position, is_end) if type(position) is int else ANYWHERE


class Subscription:
    """One stream's subscription: how far it has read its log, and how far the log may reach by now."""

    def __init__(self, *, ends_only: bool = False):
        """ends_only: only a message that may be the end wakes the stream, not one with tokens."""
        self.heard = ANYWHERE
        """How far the log may reach. At first anywhere: it may have events from before the subscription."""
        self._read = NOWHERE
        self._ends_only = ends_only
        self._wake = asyncio.Event()
        self._timer: asyncio.TimerHandle | None = None

    @property
    def has_news(self) -> bool:
        return self.heard > self._read

    def push(self, place: Place) -> None:
        """Note that the log may reach to `place`, and wake the stream if that is news."""
        if place > self.heard and (place[1] or not self._ends_only):
            self.heard = place
            self._wake.set()

    def mark_stale(self) -> None:
        """Make the stream read the log again."""
        self.push(ANYWHERE)

    def forget(self) -> None:
        """Forget what was heard. To be called before a read, which may miss what is published from now on."""
        self.heard = NOWHERE

    def has_read(self, position: int) -> None:
        """Note that the log was read up to `position`. Messages up to there are no news."""
        self._read = (position, False)
        self.heard = max(self.heard, self._read)

    async def wait(self, until: float) -> None:
        """Wait for news, or until this time of the event loop's clock."""
        loop = asyncio.get_running_loop()
        while not self.has_news and loop.time() < until:
            self._wake.clear()
            if self._timer is None:  # one for many waits: a timer for each would cost more than the wait
                self._timer = loop.call_at(until, self._time_out)
            await self._wake.wait()

    def _time_out(self) -> None:
        self._timer = None
        self._wake.set()

    def close(self) -> None:
        if self._timer:
            self._timer.cancel()


class ChannelHub:
    """One pub/sub connection to one server. Dispatches messages to streams; never waits for a consumer.

    Channels are sharded, so that in a cluster, too, they are on the node that has their partition's keys.
    """

    def __init__(self, redis: Redis):
        self._redis = redis
        self._subscriptions: dict[bytes, list[Subscription]] = {}
        self._changed = asyncio.Event()
        self._runner: asyncio.Task | None = None
        self._backoff_s = MIN_BACKOFF_S
        self._warned = False
        """True once this outage was logged. An outage ends with a confirmed subscription."""
        self._closed = False

    def subscribe(self, channel: str, *, ends_only: bool = False) -> Subscription:
        """Subscribe a stream, which reads its log at once. Never fails and never waits."""
        subscription = Subscription(ends_only=ends_only)
        self._subscriptions.setdefault(channel.encode(), []).append(subscription)
        self._changed.set()
        if self._runner is None:
            self._runner = asyncio.create_task(self._run())
        return subscription

    def unsubscribe(self, channel: str, subscription: Subscription) -> None:
        remaining = self._subscriptions[channel.encode()]
        remaining.remove(subscription)
        subscription.close()
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
            connection = PubSubConnection(self._redis, ping_s=PING_S)
            try:
                await connection.connect()
                if is_cancelled():
                    raise asyncio.CancelledError
                await self._serve(connection)
            except (exceptions.RedisError, OSError) as error:
                if not self._closed and not self._warned:
                    self._warned = True
                    log.warning("no live events (%s), streams go on from the log", error)
                if is_lacking(error):
                    self._closed = True  # the server will not know the command later either
            finally:
                await connection.disconnect()
            if not is_cancelled():
                await asyncio.sleep(self._backoff_s * random.uniform(0.5, 1.0))
                self._backoff_s = min(2 * self._backoff_s, MAX_BACKOFF_S)

    async def _serve(self, connection: PubSubConnection) -> None:
        """Read and write until either fails.

        This uses no task group: in Python 3.11 one leaves the task in the state of a cancelled one.
        """
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

    async def _keep_subscribed(self, connection: PubSubConnection, leaving: Counter[bytes]) -> None:
        """Subscribe and unsubscribe channels as streams come and go.

        It compares the wanted channels with the subscribed ones, so all changes since the last time take one
        command each. leaving: channels whose SUNSUBSCRIBE the server has not confirmed yet.
        """
        subscribed: set[bytes] = set()
        while not (self._closed or is_cancelled()):
            self._changed.clear()
            wanted = set(self._subscriptions)
            if new := wanted - subscribed:
                await connection.send("SSUBSCRIBE", *new)
            if old := subscribed - wanted:
                leaving.update(old)
                await connection.send("SUNSUBSCRIBE", *old)
            subscribed = wanted
            if not is_cancelled():
                await self._changed.wait()

    async def _read(self, connection: PubSubConnection, leaving: Counter[bytes]) -> None:
        num_messages = 0
        while not (self._closed or is_cancelled()):
            num_messages += 1
            if num_messages % MESSAGES_AT_ONCE == 0:
                await asyncio.sleep(0)  # a read of messages that have already arrived does not yield
            match await connection.read():
                case [b"smessage", channel, message]:
                    place = place_of(message)
                    for subscription in self._subscriptions.get(channel, ()):
                        subscription.push(place)
                case [b"ssubscribe", channel, _]:
                    self._backoff_s, self._warned = MIN_BACKOFF_S, False
                    for subscription in self._subscriptions.get(channel, ()):
                        subscription.mark_stale()
                case [b"sunsubscribe", channel, _] if leaving[channel]:
                    leaving[channel] -= 1
                    if not leaving[channel]:
                        del leaving[channel]
                case [b"sunsubscribe", *_]:
                    raise exceptions.ConnectionError("the channels have moved to another node")
