"""The mode through a real server and a real `ingine worker`. This process submits and streams."""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from ingine.bench.measure import Measurement, Stopwatch
from ingine.bench.workload import NUM_OUTPUT_TOKENS, SAMPLING
from ingine.producer import AsyncClient
from ingine.worker.embedded import EmbeddedServer
from ingine.worker.local import LocalWorkers

QUEUE = "bench"


@contextmanager
def worker_on_own_server(**settings: object) -> Iterator[str]:
    """Start a server and one worker with these `settings`, and yield the server's URL once they are ready.

    The worker ignores the model's generation_config.json, as the modes without a server do.
    """
    settings = {"generation_config": "vllm"} | settings
    with (
        TemporaryDirectory(prefix="ingine-bench-") as folder,
        EmbeddedServer(Path(folder, "valkey")) as server,
        LocalWorkers(["worker"], redis_url=server.url, queue=QUEUE, folder=Path(folder), **settings),
    ):
        yield server.url


def through_redis(url: str, prompts: list[list[int]]) -> Measurement:
    return asyncio.run(_submit_and_stream(url, prompts))


async def _submit_and_stream(url: str, prompts: list[list[int]]) -> Measurement:
    async with AsyncClient(url, queue=QUEUE) as client:
        watch = Stopwatch(len(prompts))
        handles = await client.submit_many({"prompt": prompt, "sampling": SAMPLING} for prompt in prompts)

        async def consume(index: int) -> None:
            async for chunk in handles[index].stream():
                watch.tokens(index, len(chunk.token_ids))

        async with asyncio.TaskGroup() as group:
            for index in range(len(handles)):
                group.create_task(consume(index))
    return watch.read(expected=NUM_OUTPUT_TOKENS)
