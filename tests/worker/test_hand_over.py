"""A hand-over while the server of one partition is away, or comes back only during it."""

import asyncio
import itertools
import logging
import threading

import pytest
import redis.asyncio
from redis.exceptions import ConnectionError, ResponseError

from ingine.contract.jobs import Job, encode_job
from ingine.contract.keys import Keys, all_partitions
from ingine.errors import EngineError
from ingine.worker.releasing import release_job
from tests.waiting import HANGS_S, wait_until_async
from tests.worker.test_failures import break_steps
from tests.worker.test_worker import ENDLESS


async def gone(*_, **__):
    raise ConnectionError("gone")


@pytest.fixture
async def two(harness, redis_url, queue):
    """A worker on two partitions, with a job under way in each."""
    partitions = all_partitions(queue, 2)
    async with redis.asyncio.from_url(redis_url, protocol=2) as client:
        for keys in (*partitions, Keys(queue)):
            await client.hset(keys.settings, "partitions", 2)
        worker = await harness(drain_timeout_s=2.0)
        for n, keys in enumerate(partitions):
            await client.xadd(
                keys.jobs("normal"), {"job": encode_job(Job(id=f"j{n}", prompt="x", sampling=ENDLESS))}
            )
        for n, keys in enumerate(partitions):
            key = keys.job(f"j{n}")
            await wait_until_async(lambda key=key: client.hget(key, "position"), what="tokens of both")
        yield worker


async def test_one_partition_s_server_keeps_no_job_of_another(two, queue, monkeypatch):
    away, there = (partition.queue for partition in two.worker._partitions)
    for name in ("release", "tell_released"):
        monkeypatch.setattr(away, name, gone)
    told = asyncio.Event()
    tell = there.tell_released

    async def tell_released():
        await tell()
        told.set()

    monkeypatch.setattr(there, "tell_released", tell_released)
    await two.stop()
    assert await two.redis.hget(there.keys.job("j1"), "status") == b"queued"
    assert told.is_set()
    assert await two.redis.hget(away.keys.job("j0"), "status") == b"running"


async def test_a_job_is_held_until_its_release_is_answered(harness, monkeypatch):
    """Otherwise the intake, which reads pending entries after an outage, would begin it again."""
    worker = await harness()
    await worker.push(Job(id="a", prompt="x", sampling=ENDLESS))
    await wait_until_async(lambda: worker.position("a"), what="tokens")
    (job,) = worker.worker._jobs
    queue, release, held = worker.queue, worker.queue.release, []

    async def release_at_last(*args):
        held.append(worker.worker._jobs.holds(job.entry))
        if len(held) == 1:
            await gone()
        return await release(*args)

    monkeypatch.setattr(queue, "release", release_at_last)
    await worker.stop()
    assert held == [True, True]
    assert not worker.worker._jobs.holds(job.entry)


async def test_a_renewal_that_comes_too_late_for_a_release_is_no_fencing(harness, monkeypatch):
    worker = await harness(lease_s=0.5)
    await worker.push(Job(id="a", prompt="x", sampling=ENDLESS))
    await wait_until_async(lambda: worker.position("a"), what="tokens")
    release, answers = worker.queue.release, []
    monkeypatch.setattr(worker.worker._leases, "_answered", lambda job, answer: answers.append((job, answer)))

    async def lose_the_reply(*args):
        released = await release(*args)
        await wait_until_async(lambda: answers, what="a renewal")
        worker.worker._publisher.lease_answered(*answers[0])
        return released

    monkeypatch.setattr(worker.queue, "release", lose_the_reply)
    await worker.stop()
    assert worker.worker._metrics.fenced_writes._value.get() == 0


async def test_a_job_that_cannot_be_released_keeps_no_other(harness, monkeypatch):
    """Somebody has put something else under its keys."""
    worker = await harness()
    for name in "ab":
        await worker.push(Job(id=name, prompt="x", sampling=ENDLESS))
    await wait_until_async(lambda: worker.position("b"), what="tokens")
    release = worker.queue.release

    async def release_unless_foreign(entry, job_id, attempt):
        if job_id == "a":
            raise ResponseError("WRONGTYPE Operation against a key holding the wrong kind of value")
        return await release(entry, job_id, attempt)

    monkeypatch.setattr(worker.queue, "release", release_unless_foreign)
    await worker.stop()
    assert await worker.redis.hget(worker.keys.job("b"), "status") == b"queued"


async def test_a_job_that_is_not_ours_any_more_is_not_said_to_be_released(harness, caplog):
    worker = await harness()
    for name in "ab":
        await worker.push(Job(id=name, prompt="x", sampling=ENDLESS))
    await wait_until_async(lambda: worker.position("b"), what="tokens")
    (job,) = (job for job in worker.worker._jobs if job.id == "a")  # its next step may find it fenced
    await worker.redis.hset(worker.keys.job("a"), "worker", "another")
    with caplog.at_level(logging.INFO):
        await release_job(worker.worker._jobs, job)
        await worker.stop()
    said = {
        (record.message, record.fields["job_id"]) for record in caplog.records if "released" in record.message
    }
    assert said == {("job not released", "a"), ("job released", "b")}


async def test_no_job_is_released_before_its_last_step_is_committed(harness, tiny_engine, monkeypatch):
    """First the step is still being computed, then its tokens are on their way to the log."""
    engine = tiny_engine()
    hold, held, go_on = threading.Event(), threading.Event(), threading.Event()
    forward = engine._runner.forward

    def forward_and_hold(batch):
        if hold.is_set():
            held.set()
            assert go_on.wait(HANGS_S)
        return forward(batch)

    monkeypatch.setattr(engine._runner, "forward", forward_and_hold)
    worker = await harness(engine, drain_timeout_s=HANGS_S)
    await worker.push(Job(id="a", prompt="x", sampling=ENDLESS))
    await wait_until_async(lambda: worker.position("a"), what="tokens")
    queue = worker.queue
    append, release = queue.append, queue.release
    appending, commit, released = asyncio.Event(), asyncio.Event(), []

    async def append_late(appends):
        appending.set()
        await commit.wait()
        return await append(appends)

    async def noted(entry, job_id, attempt):
        released.append(job_id)
        return await release(entry, job_id, attempt)

    async def what_may_happen_has_happened():
        for _ in range(20):
            await worker.redis.ping()

    hold.set()
    try:
        await wait_until_async(held.is_set, what="the step")
        [seq] = engine._scheduler.running
        before = seq.num_output_tokens
        await wait_until_async(lambda: engine_is_committed(worker, before), what="the steps before it")
        monkeypatch.setattr(queue, "append", append_late)
        monkeypatch.setattr(queue, "release", noted)
        worker.worker.stop()
        await wait_until_async(lambda: worker.worker._admission.stopping, what="the hand-over")
        await what_may_happen_has_happened()
        assert not released, "its step is still under way"
    finally:
        go_on.set()
    await appending.wait()
    await what_may_happen_has_happened()
    assert not released, "its tokens are not committed"
    commit.set()
    await worker.running
    assert released == ["a"]
    record = await worker.redis.hmget(worker.keys.job("a"), "status", "position")
    assert record == [b"queued", str(before + 1).encode()]


def engine_is_committed(worker, num_tokens: int) -> bool:
    (job,) = worker.worker._jobs
    return job.position == num_tokens


# --------------------------------------------------------------------- what the intake has at that moment


async def test_what_runs_is_released_once_though_the_intake_is_told_of_it_too(harness, monkeypatch):
    """After an outage the intake asks what is pending, which is all that runs; then SIGTERM comes."""
    worker = await harness()
    await worker.push(Job(id="a", prompt="x", sampling=ENDLESS))
    await wait_until_async(lambda: worker.position("a"), what="tokens")
    intake, attempts = worker.worker._partitions[0].intake, []
    own_pending, release = worker.queue.own_pending, worker.queue.release
    release_unbegun = worker.queue.release_unbegun

    async def stopped_meanwhile(after):
        page = await own_pending(after)
        worker.worker.stop()
        await wait_until_async(lambda: worker.worker._admission.stopping, what="the hand-over")
        return page

    async def counted(entry, job_id, attempt):
        attempts.append(attempt)
        return await release(entry, job_id, attempt)

    async def counted_unbegun(entry, job_id):
        attempts.append(None)
        return await release_unbegun(entry, job_id)

    async def settle_late(publisher):
        await wait_until_async(lambda: not intake._lost_delivery, what="the intake")

    monkeypatch.setattr(worker.queue, "own_pending", stopped_meanwhile)
    monkeypatch.setattr(worker.queue, "release", counted)
    monkeypatch.setattr(worker.queue, "release_unbegun", counted_unbegun)
    monkeypatch.setattr(worker.worker._hand_over, "_settle", settle_late)  # the intake is first
    intake._lost_delivery = True
    await worker.running
    assert attempts == [1]
    heir = await harness()
    end = await heir.end("a")
    assert (end.position, end.timings["attempts"]) == (450, 2)
    assert await heir.redis.hget(heir.keys.job("a"), "deaths") == b"0"


@pytest.mark.parametrize("lost", ["begin", "take"])
async def test_what_was_lost_with_a_reply_is_released_too_and_is_no_death(harness, monkeypatch, lost):
    worker = await harness(lease_s=60)
    call = getattr(worker.queue, lost)

    async def reply_is_lost(*args, **options):
        if not await call(*args, **options):
            return []
        worker.worker.stop()
        raise ConnectionError("lost")

    monkeypatch.setattr(worker.queue, lost, reply_is_lost)
    monkeypatch.setattr(worker.queue, "wait_for_new", no_entries)
    await worker.push(Job(id="a", prompt="x", sampling=ENDLESS))
    await worker.running
    heir = await harness(lease_s=60)
    assert (await heir.end("a")).position == 450
    assert await heir.redis.hget(heir.keys.job("a"), "deaths") == b"0"


async def no_entries(timeout_s: float) -> list:
    await asyncio.sleep(0.01)
    return []


async def test_what_the_intake_begins_at_the_last_moment_is_released_too(harness, monkeypatch):
    """After all that ran has been: its prompt took a while to read."""
    worker = await harness(lease_s=60)
    prompts, queue = worker.worker.prompts, worker.queue
    read, tell_released = prompts.read, queue.tell_released
    reading, released = asyncio.Event(), asyncio.Event()

    async def read_until_all_is_released(*args):
        reading.set()
        await released.wait()
        return await read(*args)

    async def told():
        released.set()
        await tell_released()

    monkeypatch.setattr(prompts, "read", read_until_all_is_released)
    monkeypatch.setattr(queue, "tell_released", told)
    await worker.push(Job(id="a", prompt="x", sampling=ENDLESS))
    await reading.wait()
    await worker.stop()
    record = await worker.redis.hmget(worker.keys.job("a"), "status", "attempt")
    assert record == [b"queued", b"1"]


# ------------------------------------------------------------------------------------ many jobs at once

NUM_JOBS = 8


async def many_running(harness, engine=None):
    worker = await harness(engine)
    for number in range(NUM_JOBS):
        await worker.push(Job(id=f"j{number}", prompt="x", sampling=ENDLESS))
    last = f"j{NUM_JOBS - 1}"
    await wait_until_async(lambda: worker.position(last), what="tokens of all")
    return worker


def answer_none_before_all_are_asked(monkeypatch, queue, name: str) -> None:
    call, all_asked, num_asked = getattr(queue, name), asyncio.Event(), itertools.count(1)

    async def answer_late(*args):
        if next(num_asked) == NUM_JOBS:
            all_asked.set()
        await all_asked.wait()
        return await call(*args)

    monkeypatch.setattr(queue, name, answer_late)


async def test_jobs_are_released_all_at_once(harness, monkeypatch):
    """One after the other, each would cost a round trip of its own, and the limit may allow but a few."""
    worker = await many_running(harness)
    answer_none_before_all_are_asked(monkeypatch, worker.queue, "release")
    await worker.stop()
    statuses = {await worker.redis.hget(worker.keys.job(f"j{n}"), "status") for n in range(NUM_JOBS)}
    assert statuses == {b"queued"}


async def test_jobs_of_a_broken_engine_are_given_back_all_at_once(harness, tiny_engine, monkeypatch):
    engine, broken = tiny_engine(), threading.Event()
    break_steps(engine, monkeypatch, lambda ids: broken.is_set())
    worker = await many_running(harness, engine)
    answer_none_before_all_are_asked(monkeypatch, worker.queue, "delay")
    broken.set()
    with pytest.raises(EngineError, match="the model broke"):
        async with asyncio.timeout(20):
            await asyncio.shield(worker.running)
