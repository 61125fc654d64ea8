"""A job whose end cannot be written under its own keys: whoever waits for it is told all the same."""

import asyncio

import msgpack
import pytest
from redis.exceptions import ResponseError

from ingine.contract.jobs import Job, encode_job
from ingine.contract.record import JobStatus
from ingine.errors import ErrorCode
from ingine.producer import AsyncClient, BadRecord
from tests.waiting import HANGS_S, wait_until_async
from tests.worker.conftest import take
from tests.worker.test_forged_records import Attack, replace_the_log, replace_the_record, use_up_the_log_s_ids
from tests.worker.test_worker import ENDLESS

METADATA = {"line": 7}


@pytest.mark.parametrize("attack", [use_up_the_log_s_ids, replace_the_log, replace_the_record])
async def test_a_job_that_ran_sends_its_reply(harness, redis_url, attack: Attack):
    worker = await harness()
    sampling = {"max_tokens": ENDLESS.max_tokens, "ignore_eos": True}
    async with AsyncClient(redis_url, queue=worker.keys.queue) as client, asyncio.timeout(HANGS_S):
        await client.submit("x", **sampling, job_id="bad", reply_to="me", metadata=METADATA)
        await wait_until_async(lambda: worker.position("bad"), what="tokens")
        await attack(worker)
        reply = await anext(client.replies("me"))
    assert (reply.job_id, reply.status, reply.finish_reason) == ("bad", JobStatus.FAILED, "error")
    assert (reply.error["code"], reply.metadata) == (ErrorCode.BAD_RECORD, METADATA)
    await worker.redis.delete(worker.keys.job("bad"), worker.keys.tokens("bad"))


@pytest.mark.parametrize("attack", [replace_the_log, replace_the_record])
async def test_a_job_that_cannot_be_begun_sends_its_reply(harness, redis_url, attack: Attack):
    worker = await harness()
    await attack(worker)
    async with AsyncClient(redis_url, queue=worker.keys.queue) as client, asyncio.timeout(HANGS_S):
        await worker.push(Job(id="bad", prompt="x", reply_to="me", sampling=ENDLESS, metadata=METADATA))
        reply = await anext(client.replies("me"))
    assert (reply.job_id, reply.error["code"]) == ("bad", ErrorCode.BAD_RECORD)
    assert reply.metadata == METADATA
    await worker.redis.delete(worker.keys.job("bad"), worker.keys.tokens("bad"))


async def test_a_job_that_was_never_accepted_and_is_refused_unread_sends_its_reply(harness, redis_url):
    worker = await harness()
    too_large = {"v": 1, "id": "bad", "reply_to": "me", "prompt": "x" * (2 << 20)}
    async with AsyncClient(redis_url, queue=worker.keys.queue) as client, asyncio.timeout(HANGS_S):
        await worker.push(msgpack.packb(too_large))
        reply = await anext(client.replies("me"))
    assert (reply.job_id, reply.error["code"]) == ("bad", ErrorCode.JOB_TOO_LARGE)


async def test_its_idempotency_key_lives_as_long_as_its_record(client, keys, make_queue):
    """A key without a TTL would name a job that is gone, for ever."""
    queue = make_queue("w1")
    async with AsyncClient(queue=keys.queue, redis=client) as producer:
        await producer.submit("x", job_id="bad", idempotency_key="order-7")
        entry = await take(queue)
        await client.set(keys.tokens("bad"), "x")
        assert await client.pttl(keys.idem("order-7")) == -1
        assert await queue.bury(entry, "bad_record", "why", job_id="bad")
        assert 0 < await client.pttl(keys.idem("order-7")) <= 60_000
        assert not await client.exists(keys.replies(""))


async def test_whoever_follows_it_is_woken(client, keys, make_queue, push, monkeypatch):
    """The follower need not wait for silence to read the record."""
    monkeypatch.setattr("ingine.producer.streams.SILENCE_S", 2 * HANGS_S)
    queue = make_queue("w1")
    async with AsyncClient(queue=keys.queue, redis=client) as producer, asyncio.timeout(HANGS_S):
        job = await producer.submit("x", job_id="bad")
        following = asyncio.create_task(job.result())

        async def is_subscribed() -> bool:
            [(_, subscribers)] = await client.pubsub_shardnumsub(keys.channel("bad"))
            return subscribers > 0

        await wait_until_async(is_subscribed, what="a subscription")
        await queue.bury(await take(queue), "bad_record", "why", job_id="bad")
        with pytest.raises(BadRecord):
            await following


async def test_an_entry_that_is_not_its_job_s_sends_nothing(client, keys, make_queue, push):
    queue = make_queue("w1")
    job = Job(id="a", prompt="x", reply_to="me")
    await push(job)
    first = await take(queue)
    await queue.begin(first, "a", "me")
    await push(job)
    assert await queue.bury(await take(queue), "engine_error", "why", job_id="a")
    assert not await client.exists(keys.replies("me"))
    assert await client.hget(keys.job("a"), "status") == b"running"


async def test_a_replies_stream_that_is_none_keeps_no_job_from_its_grave(client, keys, make_queue, push):
    queue = make_queue("w1")
    await client.set(keys.replies("me"), "x")
    await push(encode_job(Job(id="a", prompt="x", reply_to="me")))
    entry = await take(queue)
    await queue.begin(entry, "a", "me")
    assert await queue.bury(entry, "bad_record", "why", job_id="a")
    assert await client.hget(keys.job("a"), "status") == b"failed"
    with pytest.raises(ResponseError):
        await client.xlen(keys.replies("me"))
