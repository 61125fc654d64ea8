"""The lease thread on a real server: what it renews, how often it tries, and of what it tells."""

import pytest
import redis.asyncio
from redis.exceptions import ConnectionError

from ingine.connect.servers import Servers
from ingine.contract.calls.running import Refusal
from ingine.contract.jobs import Job, encode_job
from ingine.contract.keys import GROUP, Keys
from ingine.worker.jobs import JobTable, RunningJob
from ingine.worker.leases import RENEWALS_PER_LEASE, LeaseThread
from ingine.worker.queue import Queue
from tests.served_models import TINY
from tests.waiting import wait_until_async

LEASE_S = 1.2


@pytest.fixture
async def client(redis_url):
    async with redis.asyncio.from_url(redis_url, protocol=2) as client:
        yield client


@pytest.fixture
def begin(client):
    """Makes a queue's job that `w1` runs."""

    async def begin(keys: Keys, job_id: str) -> tuple[Queue, RunningJob]:
        queue = Queue(keys, "w1", client, TINY, result_ttl_s=60, max_deaths=3, model_wait_s=60)
        await queue.create_groups()
        job = Job(id=job_id, prompt="x")
        await client.xadd(keys.jobs("normal"), {"job": encode_job(job)})
        (entry,) = await queue.take(1)
        return queue, RunningJob(queue, job, entry, await queue.begin(entry, job_id, None), position=0)

    return begin


class Answers:
    """A lease thread's, until left."""

    def __init__(self, redis_url: str, jobs: JobTable, queues: list[Queue]):
        self.told: list[tuple[str, int]] = []
        self._queues = queues
        self.thread = LeaseThread(
            lambda: Servers(redis_url, client_name="test"), "w1", jobs, lease_s=LEASE_S,
            answered=lambda job, answer: self.told.append((job.id, answer)), failed=self.told.append,
        )  # fmt: skip

    def __enter__(self):
        self.thread.start(self._queues)
        return self

    def __exit__(self, *_):
        self.thread.stop()


async def idle_ms(client, keys: Keys, job: RunningJob) -> int:
    (pending,) = await client.xpending_range(keys.jobs("normal"), GROUP, job.entry.id, job.entry.id, 1)
    return pending["time_since_delivered"]


async def make_idle(client, keys: Keys, job: RunningJob) -> None:
    await client.xclaim(keys.jobs("normal"), GROUP, "w1", 0, [job.entry.id], idle=3_600_000, justid=True)


async def test_jobs_of_each_partition_are_renewed_and_what_is_amiss_is_told(client, begin, redis_url, queue):
    jobs, all_keys = JobTable(), [Keys(queue, 0), Keys(queue, 1)]
    (first, a), (second, b) = [await begin(keys, name) for keys, name in zip(all_keys, "ab", strict=True)]
    _, c = await begin(all_keys[0], "c")
    c.queue = first
    for job in (a, b, c):
        jobs.add(job)
    for keys, job in zip(all_keys, (a, b), strict=True):
        await make_idle(client, keys, job)
    await client.hset(all_keys[1].job("b"), "cancel", 1)
    await client.hset(all_keys[0].job("c"), "worker", "w2")
    with Answers(redis_url, jobs, [first, second]) as answers:
        await wait_until_async(lambda: len(set(answers.told)) == 2, what="the answers")
        for keys, job in zip(all_keys, (a, b), strict=True):
            await wait_until_async(lambda: renewed(client, keys, job), what="a renewal")  # noqa: B023
    assert set(answers.told) == {("b", Refusal.CANCELLED), ("c", Refusal.STALE)}


async def renewed(client, keys: Keys, job: RunningJob) -> bool:
    return await idle_ms(client, keys, job) < 3_600_000


async def test_a_renewal_that_failed_is_tried_more_often(client, begin, redis_url, queue, monkeypatch):
    """After a success the normal interval applies. Two thirds of the lease are left for retries."""
    keys, waits, outage = Keys(queue), [], [True] * 3
    first, job = await begin(keys, "a")
    jobs = JobTable()
    jobs.add(job)
    renew_all = LeaseThread._renew_all

    async def stopped_within(self, seconds: float) -> bool:
        waits.append(seconds)
        if len(waits) < 8:
            return False
        await self._stopped.wait()
        return True

    async def renew_unless_away(self, *args) -> None:
        if outage and len(waits) > 1:
            outage.pop()
            raise ConnectionError("gone")
        await renew_all(self, *args)

    monkeypatch.setattr(LeaseThread, "_stopped_within", stopped_within)
    monkeypatch.setattr(LeaseThread, "_renew_all", renew_unless_away)
    with Answers(redis_url, jobs, [first]):
        await wait_until_async(lambda: len(waits) == 8, what="all renewals")
    usual = LEASE_S / RENEWALS_PER_LEASE
    assert waits == [usual] * 2 + [usual / 4] * 3 + [usual] * 3


async def test_an_outage_is_one_line(client, begin, redis_url, queue, monkeypatch, caplog):
    first, job = await begin(Keys(queue), "a")
    jobs, num_failed = JobTable(), []
    jobs.add(job)

    async def away(self, *args) -> None:
        num_failed.append(1)
        raise ConnectionError("gone")

    monkeypatch.setattr(LeaseThread, "_renew_all", away)
    with caplog.at_level("WARNING"), Answers(redis_url, jobs, [first]):
        await wait_until_async(lambda: len(num_failed) >= 3, what="three failures")
    assert [record.getMessage() for record in caplog.records] == ["leases not renewed"]


async def test_a_fault_of_ours_is_told_and_stopping_twice_does_nothing(redis_url, queue, client, monkeypatch):
    async def broken(self, *args) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(LeaseThread, "_renew_all", broken)
    first = Queue(Keys(queue), "w1", client, TINY, result_ttl_s=60, max_deaths=3, model_wait_s=60)
    with Answers(redis_url, JobTable(), [first]) as answers:
        await wait_until_async(lambda: answers.told, what="the failure")
    (error,) = answers.told
    assert isinstance(error, ZeroDivisionError)
    answers.thread.stop()
    LeaseThread(None, "w1", JobTable(), lease_s=1, answered=None, failed=None).stop()  # never started
