"""A worker driven by a test: it writes what workers write under the contract, when the test asks for it."""

from collections import deque
from collections.abc import Awaitable, Callable
from contextlib import suppress

from redis.asyncio import Redis
from redis.exceptions import ResponseError

from ingine.contract.events import TerminalEvent, TokensEvent, encode_event
from ingine.contract.jobs import Job, decode_job
from ingine.contract.keys import EVENT_FIELD, GROUP, JOB_FIELD, Keys, log_id
from ingine.contract.record import JobStatus


class FakeWorker:
    """A worker whose token at position n is `<n>`. `publish=False` commits to the log without publishing."""

    def __init__(self, redis: Redis, keys: Keys):
        self.redis, self.keys = redis, keys
        self._delivered: deque[bytes] = deque()
        self._stopped = False

    async def take(self) -> Job:
        """Wait for a job, begin it, and return it."""
        while (job := await self._poll()) is None:
            pass
        return job

    async def serve(self, answer: Callable[["FakeWorker", Job], Awaitable[None]]) -> None:
        """Take jobs and answer them one after the other, until `stop`."""
        while not self._stopped:
            if job := await self._poll():
                await answer(self, job)

    def stop(self) -> None:
        """Stop `serve`. Cancelling it could be lost in asyncio.wait_for (redis-py, Python < 3.12)."""
        self._stopped = True

    async def _poll(self) -> Job | None:
        for jobs in self.keys.all_jobs:
            with suppress(ResponseError):  # BUSYGROUP: the group exists
                await self.redis.xgroup_create(jobs, GROUP, id="0", mkstream=True)
        if not self._delivered:
            streams = dict.fromkeys(self.keys.all_jobs, ">")
            for _, entries in await self.redis.xreadgroup(GROUP, "fake", streams, count=1, block=50) or []:
                self._delivered += [fields[JOB_FIELD.encode()] for _, fields in entries]
        if not self._delivered:
            return None
        job = decode_job(self._delivered.popleft())
        began = {"status": "running", "worker": "fake", "attempt": 1}
        await self.redis.hset(self.keys.job(job.id), mapping=began)
        return job

    async def commit(self, job_id: str, start: int, position: int, *, publish: bool = True) -> bytes:
        """Commit tokens start+1 ... position as one event. Returns its bytes."""
        positions = range(start + 1, position + 1)
        event = encode_event(TokensEvent(position, [*positions], "".join(f"<{n}>" for n in positions)))
        async with self.redis.pipeline(transaction=True) as step:
            step.xadd(self.keys.tokens(job_id), {EVENT_FIELD: event}, id=log_id(position))
            step.hset(self.keys.job(job_id), "position", position)
            await step.execute()
        if publish:
            await self.publish(job_id, event)
        return event

    async def end(
        self,
        job_id: str,
        position: int,
        status: JobStatus = JobStatus.FINISHED,
        *,
        publish: bool = True,
        **fields,
    ) -> bytes:
        if status is JobStatus.FINISHED:
            fields.setdefault("finish_reason", "length")
        event = encode_event(TerminalEvent(position=position, status=status, job_id=job_id, **fields))
        record = await self.redis.hgetall(self.keys.job(job_id))
        jobs = self.keys.jobs(record[b"priority"].decode())
        async with self.redis.pipeline(transaction=True) as step:
            step.xadd(self.keys.tokens(job_id), {EVENT_FIELD: event}, id=log_id(position, terminal=True))
            step.hset(self.keys.job(job_id), "status", str(status))
            step.xack(jobs, GROUP, record[b"entry"])
            step.xdel(jobs, record[b"entry"])
            await step.execute()
        if publish:
            await self.publish(job_id, event)
        return event

    async def run(self, job_id: str, num_tokens: int, *, publish: bool = True, **fields) -> None:
        """Run the whole job, with one token per event."""
        await self.run_from(job_id, 0, num_tokens, publish=publish, **fields)

    async def run_from(
        self, job_id: str, position: int, num_tokens: int, *, publish: bool = True, **fields
    ) -> None:
        """Run the rest of the job after `position`."""
        for start in range(position, num_tokens):
            await self.commit(job_id, start, start + 1, publish=publish)
        await self.end(job_id, num_tokens, publish=publish, **fields)

    async def publish(self, job_id: str, event: bytes) -> int:
        return await self.redis.spublish(self.keys.channel(job_id), event)
