"""Cancel asyncio tasks."""

import asyncio


async def cancel_all(running: set[asyncio.Task]) -> None:
    """Cancel tasks, and wait until all have ended.

    Cancels them again each second, since a library may swallow a cancellation that coincides with a reply:
    `asyncio.wait_for`, which redis-py uses for writes, does so before Python 3.12.
    """
    while running:
        for each in running:
            each.cancel()
        _, running = await asyncio.wait(running, timeout=1.0)
