"""An event loop on a thread of its own, on which the blocking client runs the asyncio client's coroutines."""

import asyncio
import os
import threading
from collections.abc import AsyncGenerator, Coroutine
from typing import Any, TypeVar

from ingine.errors import ClientError
from ingine.producer.home import keep_after_fork

T = TypeVar("T")


class Call:
    """One coroutine that a thread waits for.

    Ctrl-C may interrupt that thread between any two instructions, even within the standard library, so the
    thread has to wait with an atomic primitive. A lock is one; `threading.Event` is not.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, coroutine: Coroutine[Any, Any, Any]):
        self._loop, self._coroutine = loop, coroutine
        self.task: asyncio.Task | None = None
        self._has_ended = False
        self._running = threading.Lock()
        self._running.acquire()

    def start(self) -> None:
        """Start the coroutine. Runs on the loop."""
        self.task = self._loop.create_task(self._coroutine)
        self.task.add_done_callback(self._end)

    def cancel(self) -> None:
        """Cancel the coroutine. Runs on the loop; if `start` was scheduled, it has run before."""
        if self.task:
            self.task.cancel()
        else:
            self._coroutine.close()
            self._end()

    def _end(self, _: asyncio.Task | None = None) -> None:
        self._has_ended = True
        self._running.release()

    def wait(self) -> None:
        """Wait for the end. An interrupted wait may have taken the lock already; then the call has ended."""
        if not self._has_ended:
            self._running.acquire()


class LoopThread:
    """An event loop on a daemon thread, so that a client left open does not keep the program alive."""

    def __init__(self):
        self.pid = os.getpid()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="ingine-client", daemon=True)
        self._thread.start()
        self.iterated: set[AsyncGenerator] = set()
        """Referenced here, so that none is garbage collected before the generator that reads it."""
        keep_after_fork(self)

    @property
    def is_here(self) -> bool:
        """False in a child process forked since, which does not have the thread."""
        return self.pid == os.getpid()

    def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine on the loop, and return its result. Raises ClientError if the client is closed."""
        if self.closed:
            coroutine.close()
            raise ClientError("the client is closed")
        call = Call(self._loop, coroutine)
        try:
            self._loop.call_soon_threadsafe(call.start)
            call.wait()
        except BaseException:  # Ctrl-C: cancel the call, and wait until it has released everything
            self._loop.call_soon_threadsafe(call.cancel)
            call.wait()
            raise
        return call.task.result()

    @property
    def closed(self) -> bool:
        return self._loop.is_closed()

    def close_iterator(self, items: AsyncGenerator) -> None:
        """Close an iterator, and wait until it has released everything.

        On the loop's own thread, where the garbage collector may close an abandoned iterator, this only
        schedules the close. In a forked child it does nothing: the parent holds what would be released.
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
        """Cancel the calls that other threads still wait for."""
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for other in others:
            other.cancel()
        await asyncio.gather(*others, return_exceptions=True)
        await self._loop.shutdown_asyncgens()


async def _close(items: AsyncGenerator) -> None:
    if not items.ag_running:  # it runs if a second Ctrl-C interrupted the wait for its last call
        await items.aclose()
