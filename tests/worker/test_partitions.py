"""A queue of several partitions is one queue: to its producers, its consumers, and a worker's room."""

import pytest

from ingine.contract.jobs import Job, encode_job
from ingine.contract.keys import Keys, all_partitions, keys_of, partition_of
from ingine.contract.record import JobStatus
from ingine.errors import EngineError
from tests.waiting import wait_until_async
from tests.worker.test_worker import ENDLESS, GREEDY

NUM = 3


@pytest.fixture
async def partitioned(harness, redis_url, queue):
    """Makes a queue of several partitions, and starts a worker on it."""

    async def start(engine=None, **settings):
        import redis.asyncio

        client = redis.asyncio.from_url(redis_url, protocol=2)
        for keys in (*all_partitions(queue, NUM), Keys(queue)):
            await client.hset(keys.settings, "partitions", NUM)
        await client.aclose()
        return await harness(engine, **settings)

    return start


async def push(worker, queue: str, job: Job) -> Keys:
    keys = keys_of(queue, job.id, NUM)
    await worker.redis.xadd(keys.jobs("normal"), {"job": encode_job(job)})
    return keys


def test_the_partition_follows_from_the_id_in_any_language():
    assert [partition_of(name, 8) for name in ("a", "job-1", "ünï")] == [3, 7, 2]
    assert keys_of("q", "a", 1) == Keys("q") and Keys("q").prefix == "ingine:{q}"
    assert keys_of("q", "a", 8).prefix == "ingine:{q.3}"


async def test_one_worker_serves_all_partitions_within_its_room(partitioned, queue, tiny_engine):
    worker = await partitioned(tiny_engine(max_num_seqs=4))
    jobs = [Job(id=f"job-{number}", prompt="x", sampling=GREEDY) for number in range(30)]
    assert {partition_of(job.id, NUM) for job in jobs} == set(range(NUM))
    for job in jobs:
        await push(worker, queue, job)
    most = 0

    async def all_ended() -> bool:
        nonlocal most
        most = max(most, len(worker.worker._jobs))
        ends = [await worker.redis.hget(keys_of(queue, j.id, NUM).job(j.id), "status") for j in jobs]
        return set(ends) == {b"finished"}

    await wait_until_async(all_ended, what="the end of all jobs")
    assert 1 < most <= 4


async def test_a_hand_over_releases_the_jobs_of_all_partitions(partitioned, queue):
    worker = await partitioned()
    jobs = [Job(id=f"job-{number}", prompt="x", sampling=ENDLESS) for number in range(6)]
    for job in jobs:
        await push(worker, queue, job)

    async def all_run() -> bool:
        records = [await worker.redis.hget(keys_of(queue, j.id, NUM).job(j.id), "position") for j in jobs]
        return all(position and int(position) for position in records)

    await wait_until_async(all_run, what="tokens of all")
    await worker.stop()
    for job in jobs:
        record = await worker.redis.hgetall(keys_of(queue, job.id, NUM).job(job.id))
        assert record[b"status"].decode() == JobStatus.QUEUED and record[b"deaths"] == b"0"


async def test_a_worker_ends_when_the_number_of_partitions_changes(partitioned, queue):
    worker = await partitioned()
    await wait_until_async(lambda: worker.redis.exists(Keys(queue, 0).workers), what="the start")
    await worker.redis.hset(Keys(queue).settings, "partitions", 2)
    with pytest.raises(EngineError, match="2 partitions now, not 3"):
        await worker.running


async def test_a_worker_outlives_a_change_that_was_refused_or_broke_off(partitioned, queue):
    worker = await partitioned()
    for keys in all_partitions(queue, NUM):
        await worker.redis.hset(keys.settings, mapping={"partitions": 2, "paused": 1})
    await worker.redis.hset(Keys(queue).settings, "partitions", "nonsense")
    intakes = [partition.intake for partition in worker.worker._partitions]
    await wait_until_async(lambda: all(intake.paused for intake in intakes), what="the settings being read")
    for keys in all_partitions(queue, NUM):
        await worker.redis.hdel(keys.settings, "paused")
    job = Job(id="after", prompt="x", sampling=GREEDY)
    keys = await push(worker, queue, job)

    async def ended() -> bool:
        return await worker.redis.hget(keys.job(job.id), "status") == b"finished"

    await wait_until_async(ended, what="the end of a job")
    assert not worker.worker.stopping


async def test_no_partition_starves_while_the_worker_is_full(partitioned, queue, tiny_engine):
    worker = await partitioned(tiny_engine(max_num_seqs=1))
    jobs = [Job(id=f"job-{number}", prompt="x", sampling=GREEDY) for number in range(60)]
    for job in jobs:
        await push(worker, queue, job)

    async def num_finished(partition: int) -> int:
        keys = Keys(queue, partition)
        mine = [job.id for job in jobs if partition_of(job.id, NUM) == partition]
        return [await worker.redis.hget(keys.job(name), "status") for name in mine].count(b"finished")

    async def counts() -> list[int] | None:
        found = [await num_finished(partition) for partition in range(NUM)]
        return found if sum(found) >= 18 else None

    found = await wait_until_async(counts, what="the end of some")
    assert min(found) >= 3


async def test_a_partition_whose_server_came_back_empty_is_served_on(partitioned, queue):
    """All of its keys are gone, the number of partitions with them."""
    worker = await partitioned()
    lost, base = Keys(queue, 1), Keys(queue)
    await wait_until_async(lambda: worker.redis.exists(lost.workers), what="the start")
    doomed = [key async for key in worker.redis.scan_iter(f"{lost.prefix}:*")]
    await worker.redis.delete(*doomed, base.settings)
    for keys in (lost, base):
        field = await wait_until_async(
            lambda: worker.redis.hget(keys.settings, "partitions"),  # noqa: B023
            what="the number of partitions",
        )
        assert int(field) == NUM
    job = next(Job(id=f"job-{n}", prompt="x") for n in range(99) if partition_of(f"job-{n}", NUM) == 1)
    await push(worker, queue, job)
    await wait_until_async(lambda: worker.redis.exists(lost.tokens(job.id)), what="its tokens")
    assert not worker.worker.stopping
