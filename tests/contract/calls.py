"""The calls of the machine: for workers through `Queue`, for producers through the scripts."""

import asyncio
import contextlib
from dataclasses import dataclass, field
from uuid import uuid4

from redis.asyncio import Redis

from ingine.connect.scripts import run_script
from ingine.contract.calls.running import Append, Finish, Refusal, renew
from ingine.contract.calls.upkeep import forget
from ingine.contract.entries import Entry
from ingine.contract.events import TerminalEvent, TokensEvent
from ingine.contract.expiry import expire
from ingine.contract.keys import GROUP, Keys, Priority
from ingine.contract.record import JobStatus
from ingine.errors import ClientError, JobNotFound
from ingine.producer.client import AsyncClient
from ingine.producer.submission import Submission
from ingine.worker.queue import Queue
from tests.contract.fair_order import MAX_COST
from tests.contract.model import MAX_DEATHS
from tests.contract.snapshot import SILENT_MS, take_snapshot
from tests.served_models import TINY

RESULT_TTL_S = 3600


@dataclass(frozen=True)
class Delivered:
    """An entry that was delivered to a worker, perhaps long ago."""

    worker: str
    entry: Entry
    job_id: str | None
    reply_to: str | None

    @property
    def place(self) -> tuple[str, Priority, str]:
        return self.worker, self.entry.priority, self.entry.id


@dataclass(frozen=True)
class Attempt:
    """A job that a worker has begun, perhaps long ago. The worker writes under this number of the attempt."""

    delivered: Delivered
    number: int
    key: str | None

    @property
    def worker(self) -> str:
        return self.delivered.worker

    @property
    def entry(self) -> Entry:
        return self.delivered.entry

    @property
    def job_id(self) -> str:
        return self.delivered.job_id

    @property
    def place(self) -> tuple[str, Priority, str]:
        return self.delivered.place

    def tokens(self, start: int, position: int) -> Append:
        """Tokens that identify the attempt that made them, see `broken_promises`."""
        event = TokensEvent(position, [self.number] * (position - start), self.worker)
        return Append(self.job_id, self.number, event, publish=True)

    def end(self, position: int, status: JobStatus, code: str | None) -> Finish:
        """End the job. code: the reason for a copy to the dead letters."""
        error = {"code": code, "message": "as told"} if code else None
        event = TerminalEvent(position, status, self.job_id, error=error)
        return Finish(self.entry, self.number, event, self.delivered.reply_to, code is not None, self.key)


@dataclass
class Calls:
    redis: Redis
    loop: asyncio.AbstractEventLoop = field(default_factory=asyncio.new_event_loop)
    keys: Keys = field(default_factory=lambda: Keys(f"contract-{uuid4().hex[:12]}"))

    def __post_init__(self):
        self._client = AsyncClient(queue=self.keys.queue, redis=self.redis)
        self._queues: dict[str, Queue] = {}
        self.run(self.queue("setup").create_groups())

    def run(self, call):
        return self.loop.run_until_complete(call)

    def queue(self, worker: str) -> Queue:
        if worker not in self._queues:
            self._queues[worker] = Queue(
                self.keys,
                worker,
                self.redis,
                TINY,
                result_ttl_s=RESULT_TTL_S,
                max_deaths=MAX_DEATHS,
                max_cost=MAX_COST,
                model_wait_s=SILENT_MS / 1000,
            )
        return self._queues[worker]

    def close(self) -> None:
        self.run(self._leave())
        self.loop.close()

    async def _leave(self) -> None:
        if names := await self.redis.keys(f"{self.keys.prefix}:*"):
            await self.redis.delete(*names)
        await self.redis.aclose()

    # ---------------------------------------------------------------------------------- producers

    def submit(self, submission: Submission, num_partitions: int = 1) -> tuple[str, str]:
        reply = self.run(run_script(self.redis, submission.script_call(self.keys, num_partitions)))
        return reply.verdict, reply.detail

    def cancel(self, job_id: str) -> str:
        try:
            return self.run(self._client.cancel(job_id))
        except JobNotFound:
            return "unknown"

    def expire_job(self, job_id: str) -> str:
        return self.run(expire(self.redis, self.keys, [job_id], result_ttl_s=RESULT_TTL_S))[job_id]

    def requeue(self, letter_id: str) -> str | None:
        """Requeue a dead letter. Returns the id of the new entry, or None if its job id is taken."""
        try:
            return self.run(self._client.requeue(letter_id))
        except ClientError:
            return None

    def letter_ids(self) -> list[str]:
        return [letter.entry_id for letter in self.run(self._client.dead_letters())]

    def queue_is_empty(self) -> bool:
        """True if the queue is empty, so that its number of partitions can be changed."""
        try:
            self.run(self._client.set_partitions(1))
        except ClientError:
            return False
        return True

    def xadd(self, priority: Priority, raw: bytes, **fields: str | int) -> str:
        return self.run(self.redis.xadd(self.keys.jobs(priority), {"job": raw} | fields)).decode()

    def entry_of(self, job_id: str) -> str:
        """The id of the job's entry at the server."""
        return (self.run(self.redis.hget(self.keys.job(job_id), "entry")) or b"").decode()

    # ------------------------------------------------------------------------------------ workers

    def renew(self, worker: str, attempts: list[Attempt]) -> list[Refusal | None]:
        leases = [(attempt.entry, attempt.job_id, attempt.number) for attempt in attempts]
        return self.run(run_script(self.redis, renew(self.keys, leases, worker_id=worker)))

    def adopt(self) -> None:
        while self.run(self.queue("w1").adopt())[1]:
            pass

    def delete_consumer(self, name: str) -> None:
        for stream in self.keys.all_jobs:
            self.run(self.redis.xgroup_delconsumer(stream, GROUP, name))

    def forget_consumers(self) -> None:
        """Forget consumers with nothing pending, as if they had been gone for long."""
        self.run(run_script(self.redis, forget(self.keys, idle_ms=-1)))

    # --------------------------------------------------------------------------------------- time

    def silence(self, worker: str, priority: Priority, entry_id: str) -> None:
        """Let a lease pass without a sign of life from the worker."""
        stream = self.keys.jobs(priority)
        self.run(self.redis.xclaim(stream, GROUP, worker, 0, [entry_id], idle=SILENT_MS, justid=True))

    def let_deadline_pass(self, job_id: str) -> None:
        self.run(self.redis.hset(self.keys.job(job_id), "deadline_at", 1))

    def set_due(self, job_id: str, due_ms: float) -> None:
        self.run(self.redis.zadd(self.keys.delayed, {job_id: due_ms}, xx=True))

    def due_ms(self, job_id: str) -> float:
        return self.run(self.redis.zscore(self.keys.delayed, job_id))

    def now_ms(self) -> float:
        seconds, microseconds = self.run(self.redis.time())
        return seconds * 1000 + microseconds // 1000

    def expire(self, *names: str) -> None:
        """Let the TTL of keys pass. Each must have one."""
        for name in names:
            assert self.run(self.redis.pttl(name)) > 0, name
        self.run(self.redis.delete(*names))

    @contextlib.contextmanager
    def forgotten(self):
        """Undo all writes of this block, as when the server restarts without its last second."""
        kept = self.run(self._dump())
        yield
        self.run(self._restore(kept))

    async def _dump(self) -> dict[bytes, tuple[int, bytes]]:
        """Key -> TTL in ms (0: none) and full contents, with the consumer and idle time of each entry."""
        names = await self.redis.keys(f"{self.keys.prefix}:*")
        return {n: (max(0, await self.redis.pttl(n)), await self.redis.dump(n)) for n in names}

    async def _restore(self, kept: dict[bytes, tuple[int, bytes]]) -> None:
        await self.redis.delete(*await self.redis.keys(f"{self.keys.prefix}:*"))
        for name, (ttl_ms, value) in kept.items():
            await self.redis.restore(name, ttl_ms, value)

    def snapshot(self):
        return self.run(take_snapshot(self.redis, self.keys))
