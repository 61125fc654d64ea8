"""An idempotency key lives exactly as long as its job, and then as its result."""

from collections.abc import AsyncIterator

import pytest
from redis.asyncio import Redis

from ingine.contract.calls.running import Finish
from ingine.contract.events import TerminalEvent
from ingine.contract.keys import Keys
from ingine.contract.record import JobStatus
from ingine.producer import AsyncClient
from ingine.worker.queue import Queue
from tests.producer.conftest import Server
from tests.served_models import TINY

TTL_S = 60


@pytest.fixture
async def redis(valkey: Server) -> AsyncIterator[Redis]:
    async with valkey.connect() as connection:
        yield connection


@pytest.fixture
async def client(valkey: Server, queue: str) -> AsyncIterator[AsyncClient]:
    async with valkey.client(queue) as client:
        yield client


@pytest.fixture
def worker(redis, keys) -> Queue:
    return Queue(keys, "w1", redis, TINY, result_ttl_s=TTL_S, max_deaths=3, model_wait_s=60)


async def submit(client: AsyncClient, key: str = "order 7") -> str:
    return (await client.submit("pay me once", idempotency_key=key)).job_id


async def test_a_key_has_no_end_while_its_job_lives(client: AsyncClient, redis, keys: Keys):
    first = await submit(client)
    assert await redis.pttl(keys.idem("order 7")) == -1
    assert (await client.status(first)).idempotency_key == "order 7"
    assert await submit(client) == first


@pytest.mark.parametrize("how", ["finish", "cancel"])
async def test_a_key_ends_with_the_result(client: AsyncClient, redis, keys: Keys, worker: Queue, how):
    first = await submit(client)
    if how == "cancel":
        assert await client.cancel(first) == "cancelled"
    else:
        await worker.create_groups()
        (entry,) = await worker.take(1)
        begun = await worker.begin(entry, first, None)
        event = TerminalEvent(0, JobStatus.FINISHED, first)
        await worker.finish(Finish(entry, begun.attempt, event, None, idempotency_key=begun.idempotency_key))
    ends = [await redis.expiretime(name) for name in (keys.job(first), keys.idem("order 7"))]
    assert min(ends) > 0 and max(ends) - min(ends) <= 10, "but for the script's own time"
    assert await submit(client) == first, "its result can be read"
    await redis.delete(keys.job(first), keys.tokens(first), keys.idem("order 7"))
    assert await submit(client) != first


async def test_the_same_is_never_said_of_a_job_that_is_gone(client: AsyncClient, redis, keys: Keys):
    """The record was deleted by hand or evicted. A key that outlived it would name it for ever."""
    gone, lives = await submit(client, "a"), await submit(client, "b")
    await redis.delete(keys.job(gone))
    jobs = [{"prompt": "x", "idempotency_key": key} for key in "abca"]
    ids = [handle.job_id for handle in await client.submit_many(jobs)]
    assert ids[0] == ids[3] != gone
    assert ids[1] == lives
    assert (await client.status(ids[0])).idempotency_key == "a"


async def test_a_key_that_an_older_worker_has_left_without_an_end_gets_it(
    client: AsyncClient, redis, keys: Keys
):
    """An older worker's `finish` knew no key.

    The next submission with the key sets its expiry to the result's.
    """
    first = await submit(client)
    await redis.hset(keys.job(first), "status", "finished")
    await redis.pexpire(keys.job(first), 60_000)
    assert await submit(client) == first
    assert 0 < await redis.pttl(keys.idem("order 7")) <= 60_000
    await redis.delete(keys.job(first))
    await redis.persist(keys.idem("order 7"))
    assert await submit(client) != first, "or it means nothing any more"
