"""Waiting for a condition instead of sleeping: tests are as fast as the machine, and no faster."""

import asyncio
import inspect
import time
from collections.abc import Awaitable, Callable
from typing import TypeVar

T = TypeVar("T")
INTERVAL_S = 0.01
HANGS_S = 300.0
"""What takes this long hangs. A limit of time in a test is no shorter, unless the test runs into it: a slow
and busy machine takes twenty times as long as a quiet one."""


def wait_until(condition: Callable[[], T], timeout_s: float = HANGS_S, what: str = "the condition") -> T:
    """The first true value of `condition()`. Raises TimeoutError after `timeout_s`."""
    deadline = time.monotonic() + timeout_s
    while not (value := condition()):
        if time.monotonic() > deadline:
            raise TimeoutError(f"{what} was not met within {timeout_s} s")
        time.sleep(INTERVAL_S)
    return value


async def wait_until_async(
    condition: Callable[[], T | Awaitable[T]], timeout_s: float = HANGS_S, what: str = "the condition"
) -> T:
    """As `wait_until`, for a running event loop. `condition` may be a coroutine function."""
    deadline = time.monotonic() + timeout_s
    while True:
        value = condition()
        if inspect.isawaitable(value):
            value = await value
        if value:
            return value
        if time.monotonic() > deadline:
            raise TimeoutError(f"{what} was not met within {timeout_s} s")
        await asyncio.sleep(INTERVAL_S)
