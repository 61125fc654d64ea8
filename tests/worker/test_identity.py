"""A worker's id is new with each start: what is said of one life is not of another of the same name."""

import pytest

from ingine.contract.jobs import Job
from ingine.contract.keys import GROUP
from ingine.contract.record import JobStatus
from ingine.errors import ErrorCode
from ingine.producer import AsyncClient, ClientError
from ingine.worker.identity import name_of
from tests.waiting import wait_until_async
from tests.worker.test_worker import ENDLESS


async def crash(worker, monkeypatch) -> None:
    """All that the queue sees of a `kill -9`: no hand-over, no leave taken."""

    async def no_hand_over(*_, **__) -> None:
        pass

    monkeypatch.setattr(worker.worker._hand_over, "run", no_hand_over)
    await worker.stop()


async def test_a_job_that_kills_a_worker_of_a_fixed_name_each_time_ends_as_lost(harness, monkeypatch):
    settings = {"worker_id": "pod", "lease_s": 0.5, "max_deaths": 2}
    worker = await harness(**settings)
    await worker.push(Job(id="deadly", prompt="x", sampling=ENDLESS))
    for life in (1, 2):
        await wait_until_async(lambda: runs(worker, "deadly", life), what=f"attempt {life}")  # noqa: B023
        await crash(worker, monkeypatch)
        worker = await harness(**settings)
    end = await worker.end("deadly")
    assert (end.status, end.error["code"]) == (JobStatus.FAILED, ErrorCode.WORKER_LOST)
    (letter,) = await worker.dead_letters()
    assert letter[b"code"].decode() == ErrorCode.WORKER_LOST


async def runs(worker, job_id: str, attempt: int) -> bool:
    record = await worker.redis.hmget(worker.keys.job(job_id), "attempt", "status")
    return record == [b"%d" % attempt, b"running"]


async def test_workers_of_one_name_are_drained_together_and_a_later_one_is_not(harness, redis_url, queue):
    first, second = await harness(worker_id="pod"), await harness(worker_id="pod")
    other = await harness(worker_id="pod-2")
    workers = first.keys.workers
    await wait_until_async(lambda: registered(first.redis, workers, 3), what="all to be known")
    async with AsyncClient(redis_url, queue=queue) as client:
        await client.drain("pod")
        await first.running
        await second.running
        later = await harness(worker_id="pod")
        await wait_until_async(lambda: registered(first.redis, workers, 2), what="the later one")
        with pytest.raises(ClientError, match=f"no worker '{first.worker.id}'.*{later.worker.id}"):
            await client.drain(first.worker.id)
        assert not later.worker.stopping and not other.worker.stopping
        await client.drain(other.worker.id)
        await other.running
    assert not [name for name in await first.redis.hkeys(first.keys.settings) if name.startswith(b"drain")]


async def registered(redis, workers: str, number: int) -> bool:
    return await redis.hlen(workers) == number


async def test_nothing_of_a_worker_that_died_stays(harness, monkeypatch):
    """Its consumers, its heartbeat, and an order to drain that came too late for it."""
    monkeypatch.setattr("ingine.worker.heartbeat.FORGET_AFTER_S", 1)
    monkeypatch.setattr("ingine.worker.heartbeat.FORGET_EVERY", 1)
    dead = await harness(worker_id="pod")
    keys, redis = dead.keys, dead.redis
    await dead.push(Job(id="a", prompt="x", sampling=ENDLESS))
    await wait_until_async(lambda: dead.position("a"), what="tokens")
    await crash(dead, monkeypatch)
    await redis.hset(keys.settings, f"drain:{dead.worker.id}", 1)
    heir = await harness(worker_id="pod", lease_s=0.5)
    await redis.hset(keys.settings, f"drain:{heir.worker.id}x", 1)
    assert (await heir.end("a")).position == 450

    async def left() -> set[str]:
        consumers = await redis.xinfo_consumers(keys.jobs("normal"), GROUP)
        named = {consumer["name"].decode() for consumer in consumers} | {
            name.decode() for name in await redis.hkeys(keys.workers)
        }
        flags = {name.decode() for name in await redis.hkeys(keys.settings) if name.startswith(b"drain")}
        return {name for name in named if name_of(name) == "pod"} | flags

    async def only_the_heir() -> bool:
        return await left() == {heir.worker.id}

    await wait_until_async(only_the_heir, what="the dead to be forgotten")
    assert not heir.worker.stopping


async def test_a_name_may_be_one_of_the_group_s_own_consumers(harness):
    """`released` as a consumer's name means what was handed over."""
    worker = await harness(worker_id="released")
    await worker.push(Job(id="a", prompt="x", sampling=ENDLESS))
    await wait_until_async(lambda: worker.position("a"), what="tokens")
    assert await worker.num_held() == 1
