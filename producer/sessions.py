"""A client's sessions: the connections, streams and replies of each event loop that uses the client."""

import asyncio
import os

from redis.asyncio import Redis

from ingine.errors import ClientError
from ingine.producer.connection import Server, connect
from ingine.producer.home import Home, keep_after_fork
from ingine.producer.partitions import Partitions
from ingine.producer.replies import Replies
from ingine.producer.settings import ProducerSettings
from ingine.producer.streams import Streams
from ingine.producer.submitter import Submitter


class Session:
    """The part of a client that belongs to one event loop."""

    def __init__(self, settings: ProducerSettings, redis: Redis | None, *, require_worker: bool):
        """redis: the caller's own client, which is not closed here. None: connect to `settings.redis_url`, or
        without one to the default server.
        """
        self.home = Home()
        self._servers = connect(settings.redis_url) if redis is None else None
        self.partitions = Partitions(settings.queue, self._servers or redis)
        self.streams = Streams(self.partitions)
        self.replies = Replies(self.partitions)
        self.submitter = Submitter(self.partitions, require_worker=require_worker)
        self._ending: asyncio.Task | None = None
        keep_after_fork(self)

    async def aclose(self) -> None:
        await self.streams.aclose()
        await self.replies.aclose()
        if self._servers:
            await self._servers.aclose()

    def end(self) -> None:
        """Close the session soon. Runs in its event loop."""
        self._ending = asyncio.create_task(self.aclose())


class Sessions:
    """The sessions of one client, by event loop."""

    def __init__(self, settings: ProducerSettings, redis: Redis | None, *, require_worker: bool):
        """Raises ConfigError if `redis` is a client that cannot be used."""
        self._settings, self._redis, self._require_worker = settings, redis, require_worker
        if redis is not None:
            Server(redis)
        self._by_loop: dict[asyncio.AbstractEventLoop, Session] = {}
        self._redis_is_taken = False
        self._closed = False

    def current(self) -> Session:
        """The running event loop's session, begun at the first call. Raises ClientError without one."""
        if self._closed:
            raise ClientError("the client is closed")
        try:
            loop = asyncio.get_running_loop()
        except RuntimeError:
            raise ClientError(
                "no event loop runs here: use AsyncClient under asyncio.run(), or Client"
            ) from None
        session = self._by_loop.get(loop)
        if session is None:
            session = self._by_loop[loop] = self._begin()
        elif session.home.pid != os.getpid():
            raise ClientError(
                "this event loop was made before the process was forked, and belongs to the parent: "
                "start another one here, with asyncio.run()"
            )
        return session

    def _begin(self) -> Session:
        if self._redis is not None and self._redis_is_taken:
            raise ClientError(
                "the connections of redis= belong to the event loop and the process that used them first: "
                "give redis_url instead, or make a client for each"
            )
        for loop in [loop for loop in self._by_loop if loop.is_closed()]:
            del self._by_loop[loop]
        self._redis_is_taken = True
        return Session(self._settings, self._redis, require_worker=self._require_worker)

    async def aclose(self) -> None:
        """End the sessions of all event loops of this process. Safe to call twice."""
        self._closed = True
        sessions, self._by_loop = list(self._by_loop.values()), {}
        for session in sessions:
            if session.home.is_here():
                await session.aclose()
            else:
                session.home.call(session.end)
