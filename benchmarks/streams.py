"""Runs 1,000 consumers in one client process: do all streams complete, and at what cost for the client?

    python benchmarks/streams.py [--streams 1000] [--max-tokens 16] [--model NAME] [--json PATH]

Starts a server and a worker of its own. All jobs are submitted at once and all streams opened at once; the
worker runs a fraction of them at a time, so nearly all streams wait, connected, for most of the run.
"""

import asyncio
import json
import resource
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated

import typer
from redis.asyncio import Redis

from ingine.bench.percentile import percentile
from ingine.producer import AsyncClient, AsyncJobHandle
from ingine.worker.embedded import EmbeddedServer
from ingine.worker.local import LocalWorkers


def main(
    streams: Annotated[int, typer.Option(min=1, help="Concurrent consumers.")] = 1000,
    max_tokens: Annotated[int, typer.Option(min=1, help="Output tokens of each job.")] = 16,
    model: Annotated[str | None, typer.Option(help="As of `ingine worker`.")] = None,
    json_path: Annotated[Path | None, typer.Option("--json", help="Write the figures here too.")] = None,
) -> None:
    with (
        TemporaryDirectory(prefix="ingine-streams-") as folder,
        EmbeddedServer(Path(folder, "valkey")) as server,
        LocalWorkers(["worker"], redis_url=server.url, folder=Path(folder), model=model, max_model_len=256),
    ):
        figures = asyncio.run(measure(server.url, num_streams=streams, max_tokens=max_tokens))
    for name, value in figures.items():
        print(f"{name:32} {value}")
    if json_path:
        json_path.write_text(json.dumps(figures, indent=2) + "\n")
    if figures["num_complete"] != streams:
        sys.exit(1)


async def measure(url: str, *, num_streams: int, max_tokens: int) -> dict:
    memory_before = peak_memory_mib()
    async with Redis.from_url(url) as observer, AsyncClient(url) as client:
        connections_before = len(await observer.client_list())
        started = time.perf_counter()
        sampling = {"temperature": 0, "max_tokens": max_tokens, "ignore_eos": True}
        handles = await client.submit_many(
            {"prompt": f"Story number {number}:", "sampling": sampling} for number in range(num_streams)
        )
        submitted_s = time.perf_counter() - started
        async with sampled(observer) as connections:
            ends = await asyncio.gather(*(consume(handle, max_tokens, started) for handle in handles))
        complete = [seconds for seconds in ends if seconds is not None]
    return {
        "num_streams": num_streams,
        "num_complete": len(complete),
        "num_tokens": len(complete) * max_tokens,
        "submit_s": round(submitted_s, 3),
        "last_end_s": round(max(complete, default=0), 2),
        "end_p50_s": round(percentile(complete, 50), 2) if complete else None,
        "most_connections_of_client": max(connections) - connections_before,
        "client_memory_before_mib": memory_before,
        "client_memory_peak_mib": peak_memory_mib(),
        "client_cpu_s": round(time.process_time(), 2),
    }


async def consume(handle: AsyncJobHandle, num_tokens: int, started: float) -> float | None:
    """Consume a stream.

    Returns the seconds until its end; None if it did not bring every position once, in order.
    """
    position = 0
    async for chunk in handle.stream():
        if chunk.position - len(chunk.token_ids) != position:
            return None
        position = chunk.position
    return time.perf_counter() - started if position == num_tokens else None


@asynccontextmanager
async def sampled(observer: Redis) -> AsyncIterator[list[int]]:
    """Sample the server's number of connections every second while the context lasts."""
    counts = [len(await observer.client_list())]

    async def sample() -> None:
        while True:
            await asyncio.sleep(1)
            counts.append(len(await observer.client_list()))

    sampling = asyncio.create_task(sample())
    try:
        yield counts
    finally:
        sampling.cancel()


def peak_memory_mib() -> float:
    """Peak resident memory of this process, in MiB."""
    unit = 1 << 20 if sys.platform == "darwin" else 1 << 10
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit, 1)


if __name__ == "__main__":
    typer.run(main)
