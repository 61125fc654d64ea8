"""The client for code without an event loop. It is the asyncio client, run on a thread of its own.

One implementation, two faces: a second one over blocking sockets would have to repeat every rule about logs,
channels and reconnects. The price is a hop between threads a call and a chunk, some 100 microseconds. A chunk
is fetched when the caller asks for it, so a slow caller slows nothing else down and loses nothing.
"""

import asyncio
import os
import threading
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterable, Iterator
from datetime import timedelta
from functools import wraps
from typing import Any, Concatenate, ParamSpec, Self, TypeVar

from redis.asyncio import Redis

from ingine.contract.jobs import Job
from ingine.errors import ClientError
from ingine.producer.client import NOT_FOR_SENDING, AsyncClient
from ingine.producer.handle import AsyncJobHandle
from ingine.producer.home import keep_after_fork
from ingine.producer.replies import Reply
from ingine.producer.results import Chunk, JobInfo, Result

P = ParamSpec("P")
T = TypeVar("T")


_starting = threading.Lock()
"""Held while a client starts its thread."""


def _renew_lock() -> None:
    """In a forked child: the lock may have been held by a thread that the child does not have."""
    global _starting
    _starting = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew_lock)


class _Call:
    """One coroutine that a thread waits for. Ctrl-C may interrupt that thread between any two instructions,
    within the standard library's too: what it waits with has to be atomic, which `threading.Event` is not."""

    def __init__(self, loop: asyncio.AbstractEventLoop, coroutine: Coroutine[Any, Any, Any]):
        self._loop, self._coroutine = loop, coroutine
        self.task: asyncio.Task | None = None
        self._has_ended = False
        self._running = threading.Lock()
        self._running.acquire()

    def start(self) -> None:
        """On the loop."""
        self.task = self._loop.create_task(self._coroutine)
        self.task.add_done_callback(self._end)

    def cancel(self) -> None:
        """On the loop, after `start` if that was ever scheduled: callbacks run in the order they came in."""
        if self.task:
            self.task.cancel()
        else:
            self._coroutine.close()
            self._end()

    def _end(self, _: asyncio.Task | None = None) -> None:
        self._has_ended = True
        self._running.release()

    def wait(self) -> None:
        """A wait that was interrupted may have taken the lock. Then the call has ended."""
        if not self._has_ended:
            self._running.acquire()


class _LoopThread:
    """An event loop on a daemon thread: a client that was never closed does not keep a program alive."""

    def __init__(self):
        self.pid = os.getpid()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="ingine-client", daemon=True)
        self._thread.start()
        self.iterated: set[AsyncGenerator] = set()
        """Held here, so that the garbage collector never meets one before it meets who iterates it."""
        keep_after_fork(self)

    @property
    def is_here(self) -> bool:
        """False in a child that was forked since: it does not have the thread."""
        return self.pid == os.getpid()

    def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        if self.closed:
            coroutine.close()
            raise ClientError("the client is closed")
        call = _Call(self._loop, coroutine)
        try:
            self._loop.call_soon_threadsafe(call.start)
            call.wait()
        except BaseException:  # Ctrl-C: end what we wait for, too, and not before it has let go of everything
            self._loop.call_soon_threadsafe(call.cancel)
            call.wait()
            raise
        return call.task.result()

    @property
    def closed(self) -> bool:
        return self._loop.is_closed()

    def close_iterator(self, items: AsyncGenerator) -> None:
        """Returns once it has let go of everything, or at once on the loop's own thread, which has to do it.
        In a forked child it does nothing: what there is to let go of is the parent's.

        That is where the garbage collector may close the iterator of somebody who has forgotten about it.
        """
        self.iterated.discard(items)
        if self.closed or not self.is_here:
            return
        if threading.current_thread() is self._thread:
            self._loop.create_task(_close(items))
        else:
            self.run(_close(items))

    def close(self) -> None:
        self.run(self._end_all())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _end_all(self) -> None:
        """What other threads still wait for."""
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for other in others:
            other.cancel()
        await asyncio.gather(*others, return_exceptions=True)
        await self._loop.shutdown_asyncgens()


async def _close(items: AsyncGenerator) -> None:
    if not items.ag_running:  # else Ctrl-C came twice, and who was to wait for its last call did not
        await items.aclose()


def _sync(
    method: Callable[Concatenate[AsyncClient, P], Coroutine[Any, Any, T]],
) -> Callable[Concatenate["Client", P], T]:
    """The blocking face of one of AsyncClient's methods: same name, signature and docstring."""

    @wraps(method)
    def call(self: "Client", *args: P.args, **kwargs: P.kwargs) -> T:
        return self._thread.run(method(self._client, *args, **kwargs))

    return call


def _sync_submit(
    method: Callable[Concatenate[AsyncClient, P], Coroutine[Any, Any, AsyncJobHandle]],
) -> Callable[Concatenate["Client", P], "JobHandle"]:
    @wraps(method)
    def call(self: "Client", *args: P.args, **kwargs: P.kwargs) -> "JobHandle":
        return JobHandle(self, self._thread.run(method(self._client, *args, **kwargs)))

    return call


def _iterate(client: "Client", items: AsyncGenerator[T], how: Callable[[Any], str]) -> Iterator[T]:
    """What an asynchronous iterator gives, fetched one by one as the caller asks for it.

    `how`: the call that goes on after a position, for who goes on with this iterator in a forked child.
    """
    end = object()

    async def fetch() -> T | object:
        return await anext(items, end)

    thread = client._thread
    thread.iterated.add(items)
    try:
        while (item := thread.run(fetch())) is not end:
            yield item
            if not thread.is_here:
                raise ClientError(f"this was begun in another process: go on here with {how(item.position)}")
    finally:
        thread.close_iterator(items)


class JobHandle:
    """One job, from the outside. Cheap: it holds an id and a position, and talks to the server when asked."""

    def __init__(self, client: "Client", handle: AsyncJobHandle):
        self._client, self._handle = client, handle

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.job_id!r})"

    @property
    def job_id(self) -> str:
        return self._handle.job_id

    @property
    def from_position(self) -> int:
        return self._handle.from_position

    @wraps(AsyncJobHandle.stream)
    def stream(
        self, from_position: int | None = None, timeout: float | timedelta | None = None
    ) -> Iterator[Chunk]:
        return _iterate(self._client, self._handle.stream(from_position, timeout), "stream({!r})".format)

    @wraps(AsyncJobHandle.result)
    def result(self, timeout: float | timedelta | None = None, *, cancel: bool = False) -> Result:
        return self._client._thread.run(self._handle.result(timeout, cancel=cancel))

    @wraps(AsyncJobHandle.cancel)
    def cancel(self) -> str:
        return self._client._thread.run(self._handle.cancel())

    @wraps(AsyncJobHandle.status)
    def status(self) -> JobInfo:
        return self._client._thread.run(self._handle.status())


class Client:
    """A producer's or consumer's view of one queue. Threads share it, and processes that are forked: each of
    them has connections of its own.

    All its streams on one server share a pub/sub connection, all commands there a pool of a few. Every method
    raises ServerUnavailable, with what to do about it, if a server cannot be reached or refuses the command.
    """

    def __init__(
        self,
        redis_url: str | None = None,
        *,
        queue: str | None = None,
        redis: Redis | None = None,
        require_worker: bool = False,
    ):
        """Does not connect yet. Raises ConfigError for a wrong setting.

        redis_url, queue: default to INGINE_REDIS_URL and INGINE_QUEUE, from the environment or `.env`.
        redis: an asyncio client of your own instead, for all partitions, used by nobody else and in this
        process alone; it stays yours to close.
        require_worker: refuse submissions with NoWorker while no worker serves the queue.
        """
        self._client = AsyncClient(redis_url, queue=queue, redis=redis, require_worker=require_worker)
        self._started: _LoopThread | None = None
        self._closed = False

    @property
    def _thread(self) -> _LoopThread:
        """This process's, from the first call on. Raises ClientError if the client is closed."""
        with _starting:
            if self._closed:
                raise ClientError("the client is closed")
            if self._started is None or not self._started.is_here:
                self._started = _LoopThread()
            return self._started

    submit = _sync_submit(AsyncClient.submit)
    status = _sync(AsyncClient.status)
    cancel = _sync(AsyncClient.cancel)
    queue_info = _sync(AsyncClient.queue_info)
    jobs = _sync(AsyncClient.jobs)
    purge_jobs = _sync(AsyncClient.purge_jobs)
    pause = _sync(AsyncClient.pause)
    resume = _sync(AsyncClient.resume)
    drain = _sync(AsyncClient.drain)
    set_limits = _sync(AsyncClient.set_limits)
    set_partitions = _sync(AsyncClient.set_partitions)
    dead_letters = _sync(AsyncClient.dead_letters)
    dead_letter = _sync(AsyncClient.dead_letter)
    requeue = _sync(AsyncClient.requeue)
    purge = _sync(AsyncClient.purge)

    @wraps(AsyncClient.submit_many)
    def submit_many(self, jobs: Iterable[dict[str, Any] | Job]) -> list[JobHandle]:
        try:
            handles = self._thread.run(self._client.submit_many(jobs))
        except Exception as error:
            if hasattr(error, "accepted"):
                error.accepted = [JobHandle(self, handle) for handle in error.accepted]
            raise
        return [JobHandle(self, handle) for handle in handles]

    @wraps(AsyncClient.attach)
    def attach(self, job_id: str, from_position: int = 0) -> JobHandle:
        return JobHandle(self, self._client.attach(job_id, from_position))

    @wraps(AsyncClient.replies)
    def replies(self, name: str, position: str = "") -> Iterator[Reply]:
        return _iterate(self, self._client.replies(name, position), f"replies({name!r}, {{!r}})".format)

    def close(self) -> None:
        """End all streams of this client and close its connections. Jobs go on. Safe to call twice."""
        with _starting:
            self._closed, thread, self._started = True, self._started, None
        if thread and thread.is_here:
            thread.run(self._client.aclose())
            thread.close()

    def __reduce__(self):
        raise TypeError(NOT_FOR_SENDING)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_) -> None:
        self.close()
