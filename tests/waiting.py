"""Waits for a condition instead of sleeping, so that tests are as fast as the machine allows."""

import asyncio
import inspect
import time
from collections.abc import Awaitable, Callable
from typing import TypeVar

T = TypeVar("T")
INTERVAL_S = 0.01
HANGS_S = 300.0
"""Time after which a test counts as hanging. No limit in a test is shorter, unless the test runs into it on
purpose: a slow and busy machine takes twenty times as long as a quiet one."""


def wait_until(condition: Callable[[], T], timeout_s: float = HANGS_S, what: str = "the condition") -> T:
    """Wait for a true value of `condition()`, and return it. Raises TimeoutError after `timeout_s`."""
    deadline = time.monotonic() + timeout_s
    while not (value := condition()):
        if time.monotonic() > deadline:
            raise TimeoutError(f"{what} was not met within {timeout_s} s")
        time.sleep(INTERVAL_S)
    return value


async def wait_until_async(
    condition: Callable[[], T | Awaitable[T]], timeout_s: float = HANGS_S, what: str = "the condition"
) -> T:
    """Like `wait_until`, for a running event loop. `condition` may be a coroutine function."""
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
