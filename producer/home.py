"""The event loop and the process that a client's connections and streams belong to."""

import asyncio
import os
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import Any
from weakref import WeakSet

from ingine.errors import ClientError

_alive: WeakSet = WeakSet()
_inherited: list[Any] = []


def keep_after_fork(thing: Any) -> None:
    """Keep `thing`, which belongs to this process, from garbage collection in forked children.

    A child shares its parent's epoll instances. If the child closed an event loop or a connection, even by
    garbage collection, it would unregister sockets that the parent waits for.
    """
    _alive.add(thing)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=lambda: _inherited.extend(_alive))


def is_cancelled(before: int = 0) -> bool:
    """True if the running task was cancelled more than `before` times, even if the CancelledError was lost.

    Before Python 3.12 `asyncio.wait_for`, which redis-py uses to connect and to write, may swallow one.
    `asyncio.run` would then wait for ever for the task to end.
    """
    return asyncio.current_task().cancelling() > before


async def end_tasks(tasks: Iterable[asyncio.Task]) -> None:
    """Cancel the tasks, repeatedly if a cancellation is swallowed, and wait until all have ended."""
    pending = set(tasks)
    while pending:
        for task in pending:
            task.cancel()
        ended, pending = await asyncio.wait(pending, timeout=0.1)
        for task in ended:
            task.cancelled() or task.exception()  # mark the exception as retrieved, or asyncio logs it


class Home:
    """The event loop and the process in which it was created."""

    def __init__(self):
        self.loop, self.pid = asyncio.get_running_loop(), os.getpid()

    def is_here(self) -> bool:
        """True in that process, while that event loop runs."""
        try:
            return os.getpid() == self.pid and asyncio.get_running_loop() is self.loop
        except RuntimeError:
            return False

    def check(self, what: str, go_on: str) -> None:
        """Raise ClientError if `what` was begun elsewhere. `go_on`: the call that continues it here."""
        if not self.is_here():
            place = "process" if os.getpid() != self.pid else "event loop"
            raise ClientError(f"{what} was begun in another {place}: continue here with {go_on}")

    def call(self, function: Callable[[], Any]) -> None:
        """Call `function` in that event loop: at once if it is running here, else soon. A no-op in another
        process."""
        if self.is_here():
            function()
        elif os.getpid() == self.pid:
            with suppress(RuntimeError):  # the loop is closed, so nothing is left to do there
                self.loop.call_soon_threadsafe(function)
