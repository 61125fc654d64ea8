"""A job that a newer worker ended with a status which this version does not know: all readers agree."""

import asyncio
from pathlib import Path

import msgpack
import pytest
from redis.asyncio import Redis

from ingine.contract.events import TerminalEvent, TokensEvent, encode_event
from ingine.contract.jobs import Job
from ingine.contract.keys import EVENT_FIELD, Keys
from ingine.contract.record import JobStatus
from ingine.producer import AsyncClient, BadRecord, UnknownStatus
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


async def test_its_tokens_come_first(client: AsyncClient, worker: FakeWorker, redis: Redis, keys: Keys):
    """This holds for tokens in one page with the end, too, and if the record is gone."""
    job = await client.submit("hi")
    await worker.take()
    await worker.commit(job.job_id, 0, 1)
    await worker.commit(job.job_id, 1, 3)
    await worker.end(job.job_id, 3, NEW)
    for _ in range(2):
        chunks = []
        with pytest.raises(UnknownStatus, match=SAYS):
            async for chunk in job.stream():
                chunks += chunk.token_ids
        assert chunks == [1, 2, 3]
        await redis.delete(keys.job(job.job_id))


@pytest.mark.parametrize("position", [1, 2])
async def test_an_end_that_the_record_does_not_know_is_a_bad_record(
    client: AsyncClient, worker: FakeWorker, redis: Redis, keys: Keys, position: int
):
    """Otherwise a client that may write the log could keep a line of a batch from ever getting a row."""
    job = await client.submit("hi")
    await worker.take()
    await worker.commit(job.job_id, 0, 1)
    forged = encode_event(TerminalEvent(position, NEW, job.job_id))
    await redis.xadd(keys.tokens(job.job_id), {EVENT_FIELD: forged}, id=f"{position}-1")
    for call in (job.result, lambda: all_of(client, job.job_id)):
        async with asyncio.timeout(HANGS_S):
            with pytest.raises(BadRecord, match=job.job_id) as raised:
                await call()
        assert type(raised.value) is BadRecord


async def test_so_is_one_that_the_log_does_not_follow(
    client: AsyncClient, worker: FakeWorker, redis: Redis, keys: Keys
):
    job = await client.submit("hi")
    await worker.take()
    await worker.end(job.job_id, 0, NEW)
    tokens = encode_event(TokensEvent(1, [1], "x"))
    await redis.xadd(keys.tokens(job.job_id), {EVENT_FIELD: tokens}, id="1-0")
    with pytest.raises(BadRecord, match="behind the terminal event") as raised:
        await job.result()
    assert type(raised.value) is BadRecord


async def test_a_record_whose_log_lacks_the_end_says_it_too(
    client: AsyncClient, worker: FakeWorker, redis: Redis, keys: Keys
):
    job = await client.submit("hi")
    await worker.take()
    await worker.commit(job.job_id, 0, 1)
    await redis.hset(keys.job(job.job_id), "status", NEW)
    async with asyncio.timeout(HANGS_S):
        with pytest.raises(UnknownStatus, match=SAYS):
            await all_of(client, job.job_id)


async def test_a_reply_says_it_too_and_one_can_go_on_behind_it(client: AsyncClient, redis: Redis, keys: Keys):
    for status in (NEW, JobStatus.FINISHED):
        event = encode_event(TerminalEvent(0, status, f"job-{status}", finish_reason="stop"))
        last = await redis.xadd(keys.replies("me"), {EVENT_FIELD: event})
    with pytest.raises(UnknownStatus, match=SAYS) as raised:
        await anext(client.replies("me"))
    position = str(raised.value).rpartition("position ")[2].strip("'")
    assert (await anext(client.replies("me", position))).position == last.decode()


async def test_the_job_id_of_a_reply_is_quoted(client: AsyncClient, redis: Redis, keys: Keys):
    """Any client may have written the id, and it is printed on a terminal."""
    event = encode_event(TerminalEvent(0, NEW, "\x1b[2J" + "x" * 1000))
    await redis.xadd(keys.replies("me"), {EVENT_FIELD: event})
    with pytest.raises(UnknownStatus, match=SAYS) as raised:
        await anext(client.replies("me"))
    assert "\x1b" not in str(raised.value) and len(str(raised.value)) < 500


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
    """The line gets no row, which would mean that it failed; and its job does not run twice."""
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
