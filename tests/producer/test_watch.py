"""What a board reads of a queue: running jobs and their texts, and the tenants of those that wait."""

from collections import Counter
from collections.abc import AsyncIterator

import msgpack
import pytest
from redis.asyncio import Redis
from redis.exceptions import NoPermissionError

from ingine.contract.keys import GROUP, WAITING, Keys
from ingine.producer import AsyncClient, ServerUnavailable
from ingine.producer.watch import MAX_JOBS, MAX_SAMPLED, QueueWatch
from tests.producer.conftest import Server
from tests.producer.fake_worker import FakeWorker


@pytest.fixture
async def client(valkey: Server, queue: str) -> AsyncIterator[AsyncClient]:
    async with valkey.client(queue) as client:
        yield client


@pytest.fixture
async def redis(valkey: Server) -> AsyncIterator[Redis]:
    async with valkey.connect() as redis:
        yield redis


@pytest.fixture
async def worker(redis: Redis, keys: Keys) -> FakeWorker:
    """A worker that has sent a heartbeat."""
    now_s, _ = await redis.time()
    await redis.hset(keys.workers, "fake", msgpack.packb({"state": "serving", "num_jobs": 1, "at_s": now_s}))
    return FakeWorker(redis, keys)


async def test_running_jobs_by_priority_with_the_end_of_their_texts(client, worker):
    for job_id, priority in (("later", "low"), ("first", "high"), ("waits", "normal")):
        await client.submit("hi", job_id=job_id, priority=priority, tenant="acme")
    first = await worker.take()
    await worker.commit(first.id, 0, 3)
    watch = QueueWatch(client)
    (job,) = (await watch.read(with_text=False)).jobs
    assert (job.job_id, job.priority, job.tenant, job.worker) == ("first", "high", "acme", "fake")
    assert (job.position, job.attempt, job.text) == (3, 1, "")
    assert 0 <= job.age_s < 300 and job.submitted_at_ms

    for position in range(3, 203):
        await worker.commit(first.id, position, position + 1)
    await worker.take(), await worker.take()
    jobs = (await watch.read(with_text=True)).jobs
    assert [job.job_id for job in jobs] == ["first", "waits", "later"]
    assert jobs[0].text.endswith("<201><202><203>") and "<100>" not in jobs[0].text
    assert jobs[1].text == ""

    await worker.end("first", 203)
    assert [job.job_id for job in (await watch.read(with_text=True)).jobs] == ["waits", "later"]


async def test_a_body_is_read_once(client, worker, redis, keys):
    await client.submit("hi", job_id="a")
    await worker.take()
    watch = QueueWatch(client)
    assert [job.job_id for job in (await watch.read(with_text=False)).jobs] == ["a"]

    async def num_ranges() -> int:
        stats = await redis.info("commandstats")
        return stats.get("cmdstat_xrange", {}).get("calls", 0)

    before = await num_ranges()
    assert [job.job_id for job in (await watch.read(with_text=False)).jobs] == ["a"]
    assert await num_ranges() == before


async def test_the_work_does_not_grow_with_the_queue(client, worker, redis, keys):
    await client.submit_many([{"prompt": "hi", "tenant": "big"} for _ in range(MAX_SAMPLED + 100)])
    for _ in range(MAX_JOBS + 5):
        await worker.take()
    await client.submit_many([{"prompt": "hi", "priority": "low"} for _ in range(3)])
    watch = QueueWatch(client)
    snapshot = await watch.read(with_text=False)
    assert len(snapshot.jobs) == MAX_JOBS and sum(snapshot.info.running.values()) >= MAX_JOBS + 5
    tenants = await watch.waiting_tenants(snapshot.info)
    assert 0 < tenants["big"] <= MAX_SAMPLED and tenants[""] == 3


async def test_large_jobs_are_sampled_sparingly(client, worker):
    await client.submit_many([{"prompt": "x" * 400_000} for _ in range(5)])
    snapshot = await QueueWatch(client).read(with_text=False)
    assert await QueueWatch(client).waiting_tenants(snapshot.info) == Counter({"": 2})


async def test_jobs_in_the_fair_order_wait(client, worker, redis, keys):
    await client.submit("hi", tenant="acme")
    await worker.take()
    await client.submit("hi", tenant="acme")
    await redis.xreadgroup(GROUP, WAITING, {keys.jobs("normal"): ">"})
    watch = QueueWatch(client)
    snapshot = await watch.read(with_text=False)
    assert len(snapshot.jobs) == 1
    assert await watch.waiting_tenants(snapshot.info) == Counter(acme=1)


async def test_nonsense_in_keys_hides_only_its_job(client, worker, redis, keys):
    for job_id in ("good", "bad", "wrong"):
        await client.submit("hi", job_id=job_id)
        await worker.take()
        await worker.commit(job_id, 0, 1)
    await redis.hset(keys.job("bad"), "position", "many")
    await redis.delete(keys.tokens("wrong"))
    await redis.set(keys.tokens("wrong"), "no log")
    jobs = (await QueueWatch(client).read(with_text=True)).jobs
    assert [(job.job_id, job.text) for job in jobs] == [("good", "<1>"), ("wrong", "")]


async def test_partitions_are_read_together(client, redis, queue):
    await client.set_partitions(3)
    now_s, _ = await redis.time()
    await client.submit_many([{"prompt": "hi", "job_id": f"job-{n}", "tenant": "acme"} for n in range(12)])
    num_taken = 0
    for number in range(3):
        keys = Keys(queue, number)
        beat = {"state": "serving", "num_jobs": 3, "at_s": now_s}
        await redis.hset(keys.workers, "fake", msgpack.packb(beat))
        if await redis.xlen(keys.jobs("normal")):
            await FakeWorker(redis, keys).take()
            num_taken += 1
    watch = QueueWatch(client)
    snapshot = await watch.read(with_text=False)
    assert len(snapshot.jobs) == num_taken > 1
    assert (await watch.waiting_tenants(snapshot.info)).total() == 12 - num_taken


async def test_a_user_without_the_right_to_list_jobs_sees_the_rest(client, worker, monkeypatch):
    await client.submit("hi")
    await worker.take()

    async def refuse(*_):
        raise ServerUnavailable("refused") from NoPermissionError("no permissions to run 'xrange'")

    monkeypatch.setattr("ingine.producer.watch._entries", refuse)
    snapshot = await QueueWatch(client).read(with_text=True)
    assert (snapshot.jobs, snapshot.refused) == ([], "no permissions to run 'xrange'")
    assert sum(snapshot.info.running.values()) == 1
