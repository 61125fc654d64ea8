"""The contract is tested on fakeredis, which is fast, and on a real server, which is right."""

from collections.abc import AsyncIterator, Awaitable, Callable

import fakeredis
import pytest
import redis.asyncio

from ingine.wire import Job, Keys, Priority, encode_job
from worker.connections import connect
from worker.queue import Entry, Queue


@pytest.fixture(params=["fake", "real"])
async def client(request) -> AsyncIterator[redis.asyncio.Redis]:
    if request.param == "fake":
        client = fakeredis.FakeAsyncRedis(server=fakeredis.FakeServer(), version=(7,))
    else:
        client = connect(request.getfixturevalue("redis_url"))
    yield client
    await client.aclose()


@pytest.fixture
def keys(queue: str) -> Keys:
    return Keys(queue)


MakeWorker = Callable[[str], Queue]


@pytest.fixture
async def make_queue(client, keys) -> MakeWorker:
    """The queue as the worker of a given name sees it."""
    await Queue(keys, "setup", client, client, result_ttl_s=60).create_groups()
    return lambda worker_id: Queue(keys, worker_id, client, client, result_ttl_s=60)


@pytest.fixture
def push(client, keys) -> Callable[..., Awaitable[str]]:
    """Submit as a producer without a library does: one XADD. Returns the entry's id."""

    async def push(job: Job | bytes, priority: Priority = Priority.NORMAL) -> str:
        raw = job if isinstance(job, bytes) else encode_job(job)
        return (await client.xadd(keys.jobs(priority), {"job": raw})).decode()

    return push


async def take(queue: Queue) -> Entry:
    """The one entry that waits."""
    (entry,) = await queue.read_new(1)
    return entry
