"""The control channel: nudges that spare waiting for the next heartbeat. What they say is always in a key.

Anybody can publish here, so a nudge does nothing by itself: it makes the worker look sooner at what it looks
at anyway. However many come, it looks at most once in INTERVAL_S.
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
"""After so much silence the server is asked whether it is there, and has as long to answer."""
INTERVAL_S = 0.1
"""Between two looks that nudges have caused. The first one of a burst is at once."""
MESSAGES_PER_INTERVAL = 100
"""More are left unread for that long: a flood costs the worker little. The server drops what it cannot keep
for us, with the connection, and we make a new one."""
COMPLAIN_EVERY_S = 60.0

logger = logging.getLogger(__name__)


class ControlListener:
    """Calls `obey(commands, cancelled)` with what was nudged since the last call, until it is cancelled.

    commands: those of COMMANDS that were named. cancelled: ids of jobs of ours that are said to be cancelled.
    `obey` trusts nothing that it has not read from a key.
    """

    def __init__(
        self,
        redis: Redis,
        keys: Keys,
        *,
        runs: Callable[[str], bool],
        obey: Callable[[set[str], set[str]], Awaitable[None]],
    ):
        """runs: whether we run the job of this id."""
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
            # Whatever it was about is looked at again by itself, later.
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
        """Until the connection breaks, or may as well have."""
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
