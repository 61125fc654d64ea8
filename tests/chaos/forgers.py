"""A forger: it publishes messages on job and control channels that no worker and no client has sent.

It publishes and reads, but writes no key. Its messages must change nothing.
"""

import asyncio
import random
import time
from collections import Counter, deque
from pathlib import Path

import msgpack
from redis.exceptions import RedisError

from ingine.connect.servers import Servers
from ingine.contract.events import TerminalEvent, TokensEvent, encode_event
from ingine.contract.keys import Keys, keys_of
from ingine.contract.record import JobStatus
from tests.chaos.journal import Journal, Tail

KINDS = ("tokens", "end", "another job's end", "repeat", "garbage", "nudge")
INTERVAL_S = 0.02
NUM_RECENT = 48
"""Number of latest jobs whose events it forges."""
TEXT = "FORGED"
NUDGES = ("drain", "pause", "resume", "released", "cancel", "nonsense")


def run(**options) -> None:
    asyncio.run(_Forger(**options).run())


class _Forger:
    """Forges for `duration_s`, and records the count of each kind."""

    def __init__(
        self, *, url: str, queue: str, num_partitions: int, journal: str, sources: list[str], seed: int,
        duration_s: float,
    ):  # fmt: skip
        self._servers = Servers(url, client_name="forger", retries=1)
        self._queue, self._num_partitions = queue, num_partitions
        self._journal = Journal(Path(journal))
        self._sources = [Tail(Path(source)) for source in sources]
        self._recent: deque[str] = deque(maxlen=NUM_RECENT)
        self._random = random.Random(f"{seed}:forger")
        self._ends_at = time.monotonic() + duration_s

    async def run(self) -> None:
        forged: Counter[str] = Counter()
        while time.monotonic() < self._ends_at:
            for record in (record for source in self._sources for record in source.read()):
                if "job_id" in record:
                    self._recent.append(record["job_id"])
            if self._recent:
                kind = self._random.choice(KINDS)
                try:
                    forged[kind] += await self._forge(kind, self._random.choice(self._recent))
                except (RedisError, OSError):
                    await asyncio.sleep(0.2)
            await asyncio.sleep(INTERVAL_S)
        self._journal.write(forged=forged)
        await self._servers.aclose()

    async def _forge(self, kind: str, job_id: str) -> int:
        """Publish one forgery. Returns the number of receivers."""
        keys = keys_of(self._queue, job_id, self._num_partitions)
        redis = self._servers.client(keys)
        if kind == "nudge":
            command = {"command": self._random.choice(NUDGES), "job_id": job_id}
            return await redis.spublish(keys.control, msgpack.packb(command))
        return await redis.spublish(keys.channel(job_id), await self._event(kind, job_id, keys))

    async def _event(self, kind: str, job_id: str, keys: Keys) -> bytes:
        redis = self._servers.client(keys)
        position = int(await redis.hget(keys.job(job_id), "position") or 0)
        if kind == "tokens":
            number = self._random.randint(1, 3)
            return encode_event(TokensEvent(position + number, [1] * number, TEXT))
        if kind == "repeat":
            entries = await redis.xrevrange(keys.tokens(job_id), count=3)
            if entries:
                return self._random.choice(entries)[1][b"event"]
        if kind in ("end", "another job's end"):
            status = self._random.choice([status for status in JobStatus if status.terminal])
            named = job_id if kind == "end" else "another"
            return encode_event(TerminalEvent(position, status, named, TEXT, finish_reason="stop"))
        return self._random.randbytes(self._random.randint(0, 40))
