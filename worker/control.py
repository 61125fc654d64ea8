"""The control channel: nudges that make a worker read certain keys before its next heartbeat.

Any client can publish on it, so a nudge is never trusted: the worker only reads sooner a key that it reads
anyway. However many nudges come, it does so at most once per INTERVAL_S.
"""

import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable, Callable

import msgpack
from redis.asyncio import Redis
from redis.exceptions import ConnectionError, RedisError

from ingine.connect.pubsub import PubSubConnection
from ingine.contract.control import COMMANDS, MAX_NUDGE_BYTES
from ingine.contract.keys import Keys
from ingine.worker.logs import log_event
from ingine.worker.retry import Backoff

PING_S = 5.0
"""Silence after which the server is pinged. It has as long to answer."""
INTERVAL_S = 0.1
"""Between two calls of `obey`. The first nudge of a burst is obeyed at once."""
MESSAGES_PER_INTERVAL = 100
"""Further messages are left unread for an interval, so that a flood costs the worker little. If the server
cannot buffer them it closes the connection, and the worker opens a new one."""
COMPLAIN_EVERY_S = 60.0
"""Between two log lines about ignored messages."""

logger = logging.getLogger(__name__)


class ControlListener:
    """Calls `obey(commands, cancelled)` with the nudges since the last call, while `run` runs.

    commands: the named ones of COMMANDS. cancelled: ids of running jobs that are said to be cancelled.
    `obey` must trust only what it reads from a key.
    """

    def __init__(
        self,
        redis: Redis,
        keys: Keys,
        *,
        runs: Callable[[str], bool],
        obey: Callable[[set[str], set[str]], Awaitable[None]],
    ):
        """runs(job_id): whether this worker runs the job."""
        self._redis = redis
        self._keys = keys
        self._runs = runs
        self._obey = obey
        self._commands: set[str] = set()
        self._cancelled: set[str] = set()
        self._nudged = asyncio.Event()
        self._num_ignored = 0
        self._complained_at: float | None = None

    async def run(self) -> None:
        """Listen and obey, until cancelled. Waits for a server that is away."""
        tasks = [asyncio.create_task(self._hear()), asyncio.create_task(self._act())]
        try:
            await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)

    async def _act(self) -> None:
        while True:
            await self._nudged.wait()
            self._nudged.clear()
            commands, self._commands = self._commands, set()
            cancelled, self._cancelled = self._cancelled, set()
            # The same keys are read again later without a nudge.
            with contextlib.suppress(RedisError, OSError):
                await self._obey(commands, cancelled)
            await asyncio.sleep(INTERVAL_S)

    async def _hear(self) -> None:
        backoff = Backoff("control channel")
        while True:
            connection = PubSubConnection(self._redis, ping_s=PING_S)
            try:
                await connection.connect()
                await connection.send("SSUBSCRIBE", self._keys.control)
                await self._listen(connection, backoff)
            except (RedisError, OSError) as error:
                await backoff.sleep(error)
            finally:
                await connection.disconnect()

    async def _listen(self, connection: PubSubConnection, backoff: Backoff) -> None:
        """Receive messages until the connection breaks, or the channel has moved to another node."""
        interval_began, num_messages = time.monotonic(), 0
        while True:
            message = await connection.read()
            if message is None:
                continue
            backoff.reset()
            match message:
                case [b"smessage", _, raw]:
                    self._receive(raw)
                case [b"sunsubscribe", *_]:
                    raise ConnectionError("the control channel has moved to another node")
            num_messages += 1
            if time.monotonic() - interval_began > INTERVAL_S:
                interval_began, num_messages = time.monotonic(), 0
            elif num_messages >= MESSAGES_PER_INTERVAL:
                await asyncio.sleep(INTERVAL_S)

    def _receive(self, raw: bytes) -> None:
        nudge = None
        if len(raw) <= MAX_NUDGE_BYTES:
            with contextlib.suppress(ValueError, TypeError):
                nudge = msgpack.unpackb(raw)
        match nudge:
            case {"command": str(command)} if command in COMMANDS:
                self._commands.add(command)
                self._nudged.set()
            case {"command": "cancel", "job_id": str(job_id)}:
                if self._runs(job_id):
                    self._cancelled.add(job_id)
                    self._nudged.set()
            case {"command": str()}:
                pass  # of a newer version
            case _:
                self._ignore(raw)

    def _ignore(self, raw: bytes) -> None:
        self._num_ignored += 1
        now = time.monotonic()
        if self._complained_at is None or now - self._complained_at >= COMPLAIN_EVERY_S:
            log_event(
                logger, logging.WARNING, "control message ignored",
                num_bytes=len(raw), num_messages=self._num_ignored,
            )  # fmt: skip
            self._complained_at, self._num_ignored = now, 0
