"""Ends of tasks."""

import asyncio


async def cancel_all(running: set[asyncio.Task]) -> None:
    """Until all have ended. Asks again, since a library may swallow a cancellation that comes with a reply:
    `asyncio.wait_for` does before Python 3.12, and redis-py writes under it."""
    while running:
        for each in running:
            each.cancel()
        _, running = await asyncio.wait(running, timeout=1.0)
