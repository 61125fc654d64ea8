"""Retry calls to Redis. A worker survives an outage of its server: it waits, logs that once, and goes on."""

import asyncio
import logging
import random
from collections.abc import Awaitable, Callable
from typing import TypeVar

from redis.exceptions import RedisError, ResponseError

from ingine.worker.logs import log_event

logger = logging.getLogger(__name__)

FIRST_DELAY_S, LAST_DELAY_S = 0.05, 1.0

T = TypeVar("T")


class Backoff:
    """Delays that double with each failure, up to `LAST_DELAY_S`, with jitter. Call `reset` on success."""

    def __init__(self, what: str):
        self._what = what
        self._delay_s = 0.0

    async def sleep(self, error: Exception) -> None:
        if self._delay_s == 0:
            log_event(logger, logging.WARNING, "redis failed, retrying", what=self._what, error=error)
        self._delay_s = min(max(FIRST_DELAY_S, 2 * self._delay_s), LAST_DELAY_S)
        await asyncio.sleep(self._delay_s * random.uniform(0.5, 1.0))

    def reset(self) -> None:
        if self._delay_s:
            log_event(logger, logging.INFO, "redis is back", what=self._what)
        self._delay_s = 0.0


async def until_served(
    what: str, call: Callable[[], Awaitable[T]], *, failed: Callable[[Exception], None] = lambda _: None
) -> T:
    """The result of `call()`, which is repeated after each error of Redis or of the connection to it.

    `call` must be safe to repeat. Errors of the server (out of memory, read-only, loading) are waited out,
    too: they pass once an operator repairs the server, and no computed token is dropped until then. An error
    that never passes is raised, see `never_passes`. Each error that is waited out is passed to `failed`.
    """
    backoff = Backoff(what)
    while True:
        try:
            result = await call()
        except (RedisError, OSError) as error:
            if never_passes(error):
                raise
            failed(error)
            await backoff.sleep(error)
        else:
            backoff.reset()
            return result


def never_passes(error: Exception) -> bool:
    """Whether `error` says that a key holds a value of the wrong type or form, which only a client can have
    written. All other errors of a server pass."""
    return isinstance(error, ResponseError) and any(sign in str(error) for sign in _FOREIGN_KEYS)


_FOREIGN_KEYS = (
    "WRONGTYPE",
    "BADRECORD",  # raised by the scripts: a record holds what none of them writes
    "not an integer",
    "smaller than the target stream top item",
    "exhausted the last possible ID",
    "Invalid stream ID",
    "out of range",
    "would overflow",
    "attempt to ",  # raised by Lua for a value that a script did not expect
)
"""Parts of a server's error messages that are about a value or its type, and not about the server."""
