"""Limits of a queue: exact however many submit at once, each with connections of its own, and given back."""

import asyncio
from contextlib import AsyncExitStack
from itertools import chain

import pytest
from redis.asyncio import Redis

from ingine.contract.keys import Keys
from ingine.producer import AsyncClient, ClientError, QueueFull, RateLimited
from tests.producer.conftest import Server

NUM_PRODUCERS = 50


async def all_at_once(redis_url: str, queue: str, *, jobs_each: int, **job) -> tuple[int, list[Exception]]:
    """Submit from 50 producers. Returns the number of accepted jobs, and the errors of the others."""

    async def produce(client: AsyncClient) -> list[object]:
        submissions = (client.submit("x", **job) for _ in range(jobs_each))
        return await asyncio.gather(*submissions, return_exceptions=True)

    async with AsyncExitStack() as stack:
        clients = [
            await stack.enter_async_context(AsyncClient(redis_url, queue=queue)) for _ in range(NUM_PRODUCERS)
        ]
        outcomes = list(chain.from_iterable(await asyncio.gather(*map(produce, clients))))
    refusals = [outcome for outcome in outcomes if isinstance(outcome, Exception)]
    return len(outcomes) - len(refusals), refusals


async def test_the_limit_of_jobs_is_exact_under_50_producers(redis_url: str, queue: str):
    async with AsyncClient(redis_url, queue=queue) as client:
        await client.set_limits(max_jobs=77)
        accepted, refusals = await all_at_once(redis_url, queue, jobs_each=4)
        info = await client.queue_info()
    assert accepted == 77 == sum(info.waiting.values())
    assert {type(refusal) for refusal in refusals} == {QueueFull}
    assert "77 jobs" in str(refusals[0])


async def test_the_limit_of_bytes_is_exact_under_50_producers(redis_url: str, queue: str):
    job = {"metadata": {"filler": "y" * 100}}
    async with AsyncClient(redis_url, queue=queue) as client:
        first = await client.submit("x", **job)
        size = (await client.queue_info()).num_bytes
        await first.cancel()
        await client.set_limits(max_bytes=33 * size + size // 2)
        accepted, refusals = await all_at_once(redis_url, queue, jobs_each=2, **job)
        assert (await client.queue_info()).num_bytes == 33 * size
    assert accepted == 33
    assert {type(refusal) for refusal in refusals} == {QueueFull}
    assert f"{33 * size + size // 2} bytes" in str(refusals[0])


async def test_delayed_jobs_count_too(client: AsyncClient):
    await client.set_limits(max_jobs=2)
    await client.submit("x", not_before_s=3600)
    await client.submit("x")
    with pytest.raises(QueueFull):
        await client.submit("x", not_before_s=3600)


async def test_room_is_given_back_when_jobs_end(client: AsyncClient, redis: Redis, keys: Keys):
    jobs = [await client.submit("x"), await client.submit("x", not_before_s=3600), await client.submit("x")]
    assert int(await redis.get(keys.bytes)) > 0
    for job in jobs:
        assert await job.cancel() == "cancelled"
    assert not await redis.exists(keys.bytes)


async def test_a_tenant_that_submits_too_fast_is_told_when_to_come_back(client: AsyncClient):
    await client.set_limits(max_jobs_per_s=0.5)
    await client.submit("x", tenant="eager")
    with pytest.raises(RateLimited, match="'eager'") as refusal:
        await client.submit("x", tenant="eager")
    assert 1 < refusal.value.retry_after_s <= 2
    await client.submit("x", tenant="other")


async def test_a_seconds_worth_of_jobs_may_come_at_once(server: Server, queue: str):
    async with server.client(queue) as client:
        await client.set_limits(max_jobs_per_s=20)
        outcomes = await asyncio.gather(
            *(client.submit("x", tenant="t") for _ in range(60)), return_exceptions=True
        )
    accepted = sum(not isinstance(outcome, Exception) for outcome in outcomes)
    assert 20 <= accepted < 60
    assert {type(outcome) for outcome in outcomes if isinstance(outcome, Exception)} == {RateLimited}


@pytest.mark.parametrize(("name", "says"), [("max_jobs", "max_jobs is 'many'"), ("partitions", "1 to 64")])
async def test_a_setting_that_is_no_number_is_named(
    client: AsyncClient, redis: Redis, keys: Keys, name, says
):
    await redis.hset(keys.settings, name, "many")
    with pytest.raises(ClientError, match=says):
        await client.queue_info()
