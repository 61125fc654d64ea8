"""Measures the memory and disk space of a job on a real server: `python benchmarks/redis_memory.py`.

It measures a waiting job, each token in a log, and an ended job, which lasts until its result's TTL. The
scripts of producers and workers write them, with one token per event, as a worker does that keeps up.
"""

import asyncio
from pathlib import Path
from tempfile import TemporaryDirectory

from redis.asyncio import Redis, from_url

from ingine.contract.calls.begin import Begun
from ingine.contract.calls.running import Append, Finish
from ingine.contract.entries import Entry
from ingine.contract.events import TerminalEvent, TokensEvent
from ingine.contract.keys import Keys
from ingine.contract.record import JobStatus
from ingine.producer import AsyncClient
from ingine.worker.embedded import EmbeddedServer
from ingine.worker.queue import Queue
from ingine.worker.served_model import ServedModel

NUM_JOBS, PROMPT_BYTES, NUM_TOKENS = 1000, 1024, 200


class Meter:
    """Growth of the server's memory and of its append-only file since the last reading, in bytes."""

    def __init__(self, redis: Redis):
        self._redis = redis
        self._last = (0, 0)

    async def growth(self) -> tuple[int, int]:
        memory, persistence = await self._redis.info("memory"), await self._redis.info("persistence")
        now = (memory["used_memory_dataset"], persistence["aof_current_size"])
        before, self._last = self._last, now
        return now[0] - before[0], now[1] - before[1]


async def begin_all(queue: Queue) -> list[tuple[Entry, str, Begun]]:
    entries = []
    while len(entries) < NUM_JOBS:
        entries += await queue.take(NUM_JOBS - len(entries))
    return [
        (entry, f"job-{n:032d}", await queue.begin(entry, f"job-{n:032d}", None))
        for n, entry in enumerate(entries)
    ]


async def append_all(queue: Queue, running: list[tuple[Entry, str, Begun]]) -> None:
    for position in range(1, NUM_TOKENS + 1):
        event = TokensEvent(position, [10_000 + position], " word")
        await queue.append([Append(job_id, begun.attempt, event, True) for _, job_id, begun in running])


async def finish_all(queue: Queue, running: list[tuple[Entry, str, Begun]]) -> None:
    usage = {"num_prompt_tokens": 250, "num_cached_tokens": 16, "num_output_tokens": NUM_TOKENS}
    timings = {"queue_ms": 3, "first_token_ms": 180.2, "total_ms": 2210.5, "attempts": 1}
    for entry, job_id, begun in running:
        event = TerminalEvent(
            NUM_TOKENS, JobStatus.FINISHED, job_id, finish_reason="length", usage=usage, timings=timings
        )
        await queue.finish(Finish(entry, begun.attempt, event, None))


async def measure(url: str) -> None:
    redis = from_url(url, protocol=2)
    model = ServedModel(frozenset({"stand-in"}), "stand-in", "none")
    queue = Queue(Keys(), "worker", redis, model, result_ttl_s=3600, max_deaths=3, model_wait_s=300)
    await queue.create_groups()
    meter = Meter(redis)
    await meter.growth()

    def report(what: str, count: int, grown: tuple[int, int]) -> None:
        print(f"{what:42} {grown[0] / count:8.0f} {grown[1] / count:8.0f}")

    print(f"{'bytes each':42} {'memory':>8} {'file':>8}")
    async with AsyncClient(url) as client:
        await client.submit_many(
            {"prompt": "x" * PROMPT_BYTES, "job_id": f"job-{n:032d}"} for n in range(NUM_JOBS)
        )
    report(f"job that waits, prompt of {PROMPT_BYTES} bytes", NUM_JOBS, await meter.growth())
    running = await begin_all(queue)
    report("its begin", NUM_JOBS, await meter.growth())
    await append_all(queue, running)
    report("token in the log", NUM_JOBS * NUM_TOKENS, await meter.growth())
    await finish_all(queue, running)
    report("its end (the job's entry is deleted)", NUM_JOBS, await meter.growth())
    await redis.aclose()


if __name__ == "__main__":
    with TemporaryDirectory() as folder, EmbeddedServer(Path(folder)) as server:
        asyncio.run(measure(server.url))
