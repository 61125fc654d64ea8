"""A client whose queue no worker serves: deadlines hold, and a warning says what is missing."""

import asyncio
import logging

import msgpack
import pytest
from redis.asyncio import Redis

from ingine.contract.keys import Keys
from ingine.producer import AsyncClient, JobCancelled, JobExpired, NoWorker, ResultTimeout
from tests.producer.conftest import Face, Server
from tests.producer.fake_worker import FakeWorker
from tests.waiting import wait_until_async


@pytest.fixture(autouse=True)
def alert(monkeypatch: pytest.MonkeyPatch) -> None:
    """Streams read the log, and look for workers, after a moment of silence."""
    monkeypatch.setattr("ingine.producer.streams.SILENCE_S", 0.05)
    monkeypatch.setattr("ingine.producer.streams.NO_WORKER_AFTER_S", 0.1)
    monkeypatch.setattr("ingine.producer.replies.BLOCK_MS", 50)


async def beat(redis: Redis, keys: Keys) -> None:
    """Write a heartbeat that stays fresh for an hour."""
    now_s, _ = await redis.time()
    await redis.hset(keys.workers, "w1", msgpack.packb({"state": "serving", "at_s": now_s + 3600}))


async def test_who_waits_ends_a_job_whose_deadline_has_passed(face: Face):
    job_id = (await face("submit", "hi", deadline_s=0.1, metadata={"a": 1})).job_id
    with pytest.raises(JobExpired):
        await face.result(job_id)
    with pytest.raises(JobExpired):
        await face.stream(job_id)
    assert (await face("queue_info")).waiting["normal"] == 0


async def test_a_delayed_job_expires_too(face: Face):
    job_id = (await face("submit", "hi", not_before_s=0.1, deadline_s=0.2)).job_id
    with pytest.raises(JobExpired):
        await face.result(job_id)
    assert (await face("queue_info")).num_delayed == 0


async def test_whoever_asks_how_a_job_stands_ends_it_too(face: Face):
    job_id = (await face("submit", "hi", deadline_s=0.1)).job_id

    async def expired() -> bool:
        info = await face("status", job_id)
        assert info.deadline_at_ms > info.submitted_at_ms
        return info.status == "expired"

    await wait_until_async(expired)


async def test_who_waits_for_replies_ends_the_jobs_that_are_due(client: AsyncClient):
    jobs = await client.submit_many({"prompt": "hi", "deadline_s": 0.1, "reply_to": "me"} for _ in range(3))
    ended = set()
    async for reply in client.replies("me"):
        assert reply.status == "expired"
        ended.add(reply.job_id)
        if len(ended) == len(jobs):
            break
    assert ended == {job.job_id for job in jobs}


async def test_many_that_are_due_beside_one_that_is_not(client: AsyncClient, worker: FakeWorker):
    due = await client.submit_many({"prompt": "hi", "deadline_s": 0.1, "priority": "low"} for _ in range(20))
    job = await client.submit("hi", deadline_s=3600)
    following = [asyncio.create_task(each.result()) for each in (job, *due)]
    await asyncio.wait(following[1:])
    await worker.take()
    await worker.run(job.job_id, 1)
    result, *ends = await asyncio.gather(*following, return_exceptions=True)
    assert result.token_ids == [1]
    assert [type(end) for end in ends] == [JobExpired] * 20


async def test_a_stream_has_a_timeout(face: Face, worker: FakeWorker):
    job_id = (await face("submit", "hi")).job_id
    await worker.take()
    await worker.commit(job_id, 0, 1)
    stream = face._client.attach(job_id).stream(timeout=0.2)
    positions: list[int] = []

    async def follow() -> None:
        if hasattr(stream, "__aiter__"):
            async for chunk in stream:
                positions.append(chunk.position)
        else:
            await asyncio.to_thread(lambda: positions.extend(chunk.position for chunk in stream))

    with pytest.raises(ResultTimeout, match="goes on"):
        await follow()
    assert positions in ([], [1]), "with a slow machine nothing comes in time"
    await worker.run_from(job_id, 1, 2)
    assert (await face.result(job_id)).token_ids == [1, 2]


async def test_a_result_that_takes_too_long_can_be_cancelled_at_once(face: Face, worker: FakeWorker):
    waits, runs = [(await face("submit", "hi", priority=p)).job_id for p in ("low", "high")]
    await worker.take()

    async def result(job_id: str):
        handle = face._client.attach(job_id)
        if isinstance(face._client, AsyncClient):
            return await handle.result(0.1, cancel=True)
        return await asyncio.to_thread(handle.result, 0.1, cancel=True)

    for job_id in (waits, runs):
        with pytest.raises(ResultTimeout, match="was cancelled"):
            await result(job_id)
    with pytest.raises(JobCancelled):
        await face.result(waits)
    assert (await face("status", runs)).cancel_requested


async def test_a_job_that_ends_just_when_it_would_be_cancelled_has_its_result(
    client: AsyncClient, worker: FakeWorker, monkeypatch: pytest.MonkeyPatch
):
    job = await client.submit("hi")
    await worker.take()
    cancel = client.cancel

    async def late(job_id: str) -> str:
        await worker.run(job_id, 1)
        return await cancel(job_id)

    monkeypatch.setattr(client, "cancel", late)
    assert (await job.result(0.1, cancel=True)).token_ids == [1]


async def test_that_no_worker_serves_the_queue_is_said_once(
    client: AsyncClient, worker: FakeWorker, redis: Redis, keys: Keys, caplog: pytest.LogCaptureFixture
):
    jobs = await client.submit_many({"prompt": "hi"} for _ in range(3))
    following = [asyncio.create_task(job.result()) for job in jobs]

    def warnings() -> list[str]:
        return [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]

    await wait_until_async(warnings)
    looks = len(client._session.streams._look_at)
    before = dict(client._session.streams._look_at)
    await wait_until_async(lambda: client._session.streams._look_at != before, what="another look")
    assert looks == 1
    [warning] = warnings()
    assert f"no worker serves queue {keys.queue!r}" in warning

    await beat(redis, keys)
    await wait_until_async(lambda: client._session.streams._unserved is None, what="the worker being seen")
    await redis.delete(keys.workers)
    await wait_until_async(lambda: len(warnings()) == 2, what="the second outage being said")
    for job in jobs:
        await worker.take()
        await worker.run(job.job_id, 1)
    await asyncio.gather(*following)


async def test_a_client_that_requires_a_worker_refuses_without_one(valkey: Server, queue: str, keys: Keys):
    async with AsyncClient(valkey.url, queue=queue, require_worker=True) as client, valkey.connect() as redis:
        with pytest.raises(NoWorker, match="nothing was accepted"):
            await client.submit("hi")
        with pytest.raises(NoWorker) as refused:
            await client.submit_many([{"prompt": "hi"}])
        assert refused.value.accepted == []
        now_s, _ = await redis.time()
        await redis.hset(keys.workers, "gone", msgpack.packb({"state": "serving", "at_s": now_s - 60}))
        with pytest.raises(NoWorker):
            await client.submit("hi")
        assert (await client.queue_info()).waiting["normal"] == 0
        await beat(redis, keys)
        assert (await (await client.submit("hi")).status()).status == "queued"
