"""A job that a newer worker has ended in a status which this version does not know: its readers agree."""

import asyncio
from pathlib import Path

import msgpack
import pytest
from redis.asyncio import Redis

from ingine.keys import EVENT_FIELD, Keys
from ingine.wire import Job, JobStatus, TerminalEvent, encode_event
from producer import AsyncClient, BadRecord, UnknownStatus
from tests.producer.fake_worker import FakeWorker
from tests.producer.test_batch import Files, answer, request, run, serving
from tests.waiting import HANGS_S

NEW = "superseded"
SAYS = f"'{NEW}', which this version of ingine does not know: upgrade the client"


async def all_of(client: AsyncClient, job_id: str) -> list:
    return [chunk async for chunk in client.attach(job_id).stream()]


async def test_each_way_of_asking_says_what_to_do(client: AsyncClient, worker: FakeWorker):
    job = await client.submit("hi")
    await worker.take()
    await worker.commit(job.job_id, 0, 1)
    await worker.end(job.job_id, 1, NEW)
    for call in (job.result, job.status, job.cancel, lambda: all_of(client, job.job_id)):
        async with asyncio.timeout(HANGS_S):
            with pytest.raises(UnknownStatus, match=f"{job.job_id}.*{SAYS}"):
                await call()


async def test_a_reply_says_it_too_and_one_can_go_on_behind_it(client: AsyncClient, redis: Redis, keys: Keys):
    for status in (NEW, JobStatus.FINISHED):
        event = encode_event(TerminalEvent(0, status, f"job-{status}", finish_reason="stop"))
        last = await redis.xadd(keys.replies("me"), {EVENT_FIELD: event})
    with pytest.raises(UnknownStatus, match=SAYS) as raised:
        await anext(client.replies("me"))
    position = str(raised.value).rpartition("position ")[2].strip("'")
    assert (await anext(client.replies("me", position))).position == last.decode()


@pytest.mark.parametrize("kind", ["", "x" * 100, "Finished!", 7, None, ["finished"], "running"], ids=str)
async def test_what_no_worker_of_any_version_writes_is_a_bad_record(
    client: AsyncClient, redis: Redis, keys: Keys, kind: object
):
    event = msgpack.packb({"type": kind, "position": 0, "job_id": "odd"})
    await redis.xadd(keys.tokens("odd"), {EVENT_FIELD: event}, id="0-1")
    await redis.xadd(keys.replies("me"), {EVENT_FIELD: event})
    for call in (client.attach("odd").result, client.replies("me").__anext__):
        with pytest.raises(BadRecord) as raised:
            await call()
        assert type(raised.value) is BadRecord


async def test_a_batch_leaves_the_line_open_and_does_the_others(
    client: AsyncClient, worker: FakeWorker, tmp_path: Path
):
    """No row: it would say that the line had failed. Nor is its job paid for twice."""
    files = Files(tmp_path)
    files.write(request(0), request(1, prompt="new"), request(2))

    async def answer_or_end(worker: FakeWorker, job: Job) -> None:
        await (worker.end(job.id, 0, NEW) if job.prompt == "new" else answer(worker, job))

    async with serving(worker, answer_or_end) as jobs:
        for _ in range(2):
            with pytest.raises(UnknownStatus, match=f"1 line has no row.*{SAYS}"):
                await run(client, files)
            assert files.ids() == (["line-000", "line-002"], [])
    assert len(jobs) == 3
