"""Records written by a newer worker or another program: a bad one fails only its own job's calls, with the
reason."""

import asyncio

import pytest
from redis.asyncio import Redis

from ingine.contract.keys import Keys
from ingine.producer import AsyncClient, BadRecord
from tests.producer.fake_worker import FakeWorker

DAMAGED = [
    ({"status": "paused"}, "'paused'.*upgrade the client"),
    ({"status": b"\xff"}, "upgrade the client"),
    ({"position": "many"}, "position"),
    ({"position": "-1"}, "position"),
]


@pytest.mark.parametrize(("fields", "says"), DAMAGED, ids=str)
async def test_a_record_that_cannot_be_read_fails_its_own_stream_alone(
    client: AsyncClient, worker: FakeWorker, redis: Redis, keys: Keys, fields: dict, says: str
):
    odd = await client.submit("hi")
    others = await client.submit_many([{"prompt": "hi"} for _ in range(10)])
    await redis.hset(keys.job(odd.job_id), mapping=fields)
    following = [asyncio.create_task(job.result()) for job in (odd, *others)]
    for job in others:
        await worker.run(job.job_id, 1)
    failure, *results = await asyncio.gather(*following, return_exceptions=True)
    assert [result.token_ids for result in results] == [[1]] * 10
    assert isinstance(failure, BadRecord) and failure.code == "bad_record"
    assert odd.job_id in str(failure)
    with pytest.raises(BadRecord, match=says):
        await odd.status()
    with pytest.raises(BadRecord, match=says):
        await odd.cancel()


@pytest.mark.parametrize("name", ["attempt", "deaths", "submitted_at", "began_at", "finished_at"])
async def test_every_number_of_a_record_is_checked(client: AsyncClient, redis: Redis, keys: Keys, name: str):
    job = await client.submit("hi")
    await redis.hset(keys.job(job.job_id), name, "x")
    with pytest.raises(BadRecord, match=f"record of job {job.job_id} is damaged: its field {name} is 'x'"):
        await job.status()


@pytest.mark.parametrize("fields", [{"priority": "urgent"}, {"entry": ""}], ids=str)
async def test_a_record_that_does_not_say_where_the_job_waits(
    client: AsyncClient, redis: Redis, keys: Keys, fields: dict
):
    job = await client.submit("hi")
    await redis.hset(keys.job(job.job_id), mapping=fields)
    with pytest.raises(BadRecord, match="damaged"):
        await job.cancel()


async def test_what_is_no_text_in_a_record_is_shown_all_the_same(
    client: AsyncClient, redis: Redis, keys: Keys
):
    job = await client.submit("hi")
    await redis.hset(keys.job(job.job_id), mapping={b"\xff": b"\xff", b"worker": b"w\xff"})
    assert (await job.status()).worker == "w\ufffd"
