"""Where a client's connections and streams live: one event loop of one process."""

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
    """A forked child never collects `thing`, which is the parent's.

    A child shares its parent's epoll instances: an event loop or a connection that is closed in the child, by
    the garbage collector too, would unregister sockets that the parent waits for.
    """
    _alive.add(thing)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=lambda: _inherited.extend(_alive))


def is_cancelled(before: int = 0) -> bool:
    """The running task was cancelled, more often than `before`, even if something has swallowed that.

    Before Python 3.12 `asyncio.wait_for`, under which redis-py connects and writes, may do so. `asyncio.run`
    would wait for ever for a task that goes on.
    """
    return asyncio.current_task().cancelling() > before


async def end_tasks(tasks: Iterable[asyncio.Task]) -> None:
    """Cancel them, again if something swallows that, and return once they have ended, however they do."""
    pending = set(tasks)
    while pending:
        for task in pending:
            task.cancel()
        ended, pending = await asyncio.wait(pending, timeout=0.1)
        for task in ended:
            task.cancelled() or task.exception()  # seen, even if nobody waits for it


class Home:
    """The running event loop and this process. Made where they run."""

    def __init__(self):
        self.loop, self.pid = asyncio.get_running_loop(), os.getpid()

    def is_here(self) -> bool:
        try:
            return os.getpid() == self.pid and asyncio.get_running_loop() is self.loop
        except RuntimeError:
            return False

    def check(self, what: str, go_on: str) -> None:
        """Raises ClientError if `what` was begun elsewhere. `go_on`: the call that goes on with it here."""
        if not self.is_here():
            place = "process" if os.getpid() != self.pid else "event loop"
            raise ClientError(f"{what} was begun in another {place}: go on here with {go_on}")

    def call(self, function: Callable[[], Any]) -> None:
        """Call `function` in that event loop: now if it is this one, else soon. Never in another process."""
        if self.is_here():
            function()
        elif os.getpid() == self.pid:
            with suppress(RuntimeError):  # it is closed, so nothing is left to do there
                self.loop.call_soon_threadsafe(function)
