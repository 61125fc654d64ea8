"""A producer that is killed again and again. It records each answer before it does anything else."""

import asyncio
import os
import random
import signal
from pathlib import Path

from ingine.errors import DuplicateJob, QueueFull, RateLimited, ServerUnavailable
from ingine.producer import AsyncClient, AsyncJobHandle
from tests.chaos import jobs
from tests.chaos.journal import Journal, read

BURST_EVERY, BURST = 80, 30
"""Of every BURST_EVERY jobs, a producer submits the first BURST as fast as it can, over the queue's limit."""


def run(**options) -> None:
    asyncio.run(_Producer(**options).run())


class _Producer:
    """Submits the jobs `first`, `first + step` ... below `end`, and starts where its journal ends.

    die_after: number of submissions after which it dies, between the answer and the journal.
    """

    def __init__(
        self, *, url: str, queue: str, journal: str, seed: int, first: int, step: int, end: int,
        interval_s: float, poison_every: int, die_after: int | None,
    ):  # fmt: skip
        self._client = AsyncClient(url, queue=queue)
        self._seed, self._poison_every = seed, poison_every
        done = {record["number"] for record in read(Path(journal)) if "job_id" in record}
        self._numbers = [number for number in range(first, end, step) if number not in done]
        self._again = sorted(done)[-3:]  # submitted twice on purpose: the server recognises them
        self._journal = Journal(Path(journal))
        self._interval_s, self._step, self._die_after = interval_s, step, die_after
        self._random = random.Random(f"{seed}:producer:{first}")

    async def run(self) -> None:
        async with asyncio.TaskGroup() as self._cancels:
            for number in (*self._again, *self._numbers):
                await self._submit(jobs.spec(self._seed, number, poison_every=self._poison_every))
                if number // self._step % BURST_EVERY >= BURST:
                    await asyncio.sleep(self._interval_s * self._random.uniform(0.5, 1.5))
        await self._client.aclose()

    async def _submit(self, spec: jobs.JobSpec) -> None:
        while True:
            self._journal.write(number=spec.number, intent=True)
            try:
                handle = await self._client.submit(**spec.arguments())
            except DuplicateJob:  # this producer submitted it before a restart, or got no answer
                handle = self._client.attach(f"job-{spec.number}")
                break
            except (QueueFull, RateLimited):
                self._journal.write(number=spec.number, refused="full")
                await asyncio.sleep(self._random.uniform(0.5, 1.0))
            except ServerUnavailable as error:
                self._journal.write(number=spec.number, unavailable=str(error))
                await asyncio.sleep(self._random.uniform(0.1, 0.5))
            else:
                break
        if self._die_after is not None:
            self._die_after -= 1
            if self._die_after < 0:
                os.kill(os.getpid(), signal.SIGKILL)
        self._journal.write(number=spec.number, job_id=handle.job_id)
        if spec.cancel_after_s is not None:
            self._cancels.create_task(self._cancel(spec.number, handle, spec.cancel_after_s))

    async def _cancel(self, number: int, handle: AsyncJobHandle, after_s: float) -> None:
        await asyncio.sleep(after_s)
        while True:
            try:
                return self._journal.write(number=number, cancel=await handle.cancel())
            except ServerUnavailable:
                await asyncio.sleep(0.3)
