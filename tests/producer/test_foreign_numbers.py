"""Bad numbers that another program wrote where the client reads them: an error or no effect, never a
traceback."""

import dataclasses
import json
import math

import msgpack
import pytest
from redis.asyncio import Redis

from ingine.contract.keys import Keys
from ingine.errors import ClientError
from ingine.producer import AsyncClient
from ingine.producer.queue_info import read_heartbeat

NONSENSE = ["", "x", "-1", "1e3", "nan", "inf", "9" * 25, "9" * 5000, b"\xff"]


@pytest.fixture
async def redis(redis_url: str):
    async with Redis.from_url(redis_url) as redis:
        yield redis


@pytest.fixture
async def client(redis_url: str, queue: str):
    async with AsyncClient(redis_url, queue=queue) as client:
        yield client


@pytest.mark.parametrize("nonsense", NONSENSE)
async def test_dead_letters_with_it_are_listed(client: AsyncClient, redis: Redis, queue: str, nonsense):
    await redis.xadd(Keys(queue).dead, {"job": b"x", "deliveries": nonsense})
    (letter,) = await client.dead_letters()
    assert letter.deliveries == 0


@pytest.mark.parametrize("number", ["9" * 25, "9" * 5000, "-1", "01", "\u0661"])
async def test_no_letter_lies_in_a_partition_that_there_is_not(client: AsyncClient, number):
    await client.set_partitions(2)
    with pytest.raises(ClientError, match="no dead letter"):
        await client.dead_letter(f"{number}:1-0")


@pytest.mark.parametrize("nonsense", NONSENSE)
@pytest.mark.parametrize("field", ["position", "attempt", "deadline_at", "submitted_at"])
async def test_a_record_with_it_is_damaged(client: AsyncClient, redis: Redis, queue: str, field, nonsense):
    handle = await client.submit("x", deadline_s=3600)
    await redis.hset(Keys(queue).job(handle.job_id), field, nonsense)
    with pytest.raises(ClientError, match=f"damaged: its field {field}"):
        await handle.status()
    assert [job.job_id for job in await client.jobs()] in ([], [handle.job_id])


@pytest.mark.parametrize("nonsense", NONSENSE)
@pytest.mark.parametrize("field", ["max_jobs", "partitions"])
async def test_a_setting_with_it_is_named(client: AsyncClient, redis: Redis, queue: str, field, nonsense):
    await redis.hset(Keys(queue).settings, field, nonsense)
    if (field, nonsense) in [
        ("max_jobs", "-1"),
        ("max_jobs", "1e3"),
        ("max_jobs", "9" * 25),
        ("partitions", ""),
    ]:
        return  # numbers, though not sensible ones; without a number there is one partition
    with pytest.raises(ClientError, match=field):
        await client.queue_info()


async def test_an_error_quotes_no_more_than_the_beginning_of_it(
    client: AsyncClient, redis: Redis, queue: str
):
    keys, much = Keys(queue), "x" * 100_000
    event = msgpack.packb({"type": much, "position": 1})
    await redis.hset(keys.job("a"), mapping={"status": "finished", "position": 1})
    await redis.xadd(keys.tokens("a"), {"event": event}, id="1-0")
    await redis.xadd(keys.replies("r"), {"event": event})
    await redis.hset(keys.settings, f"weight:{much}", much)
    for call in (client.attach("a").result, lambda: anext(client.replies("r")), client.queue_info):
        with pytest.raises(ClientError) as refused:
            await call()
        assert len(str(refused.value)) < 1000


@pytest.mark.parametrize("at_s", ["x", None, [1], 2**64 - 1, float("nan"), float("inf"), -(2**63), b"\xff"])
def test_a_heartbeat_with_it_is_a_value(at_s):
    heartbeat = read_heartbeat(msgpack.packb({"at_s": at_s}), 100)
    assert math.isfinite(heartbeat["silent_s"])
    assert json.dumps(heartbeat, allow_nan=False)


@pytest.mark.parametrize("depth", [3, 15, 100, 240, 480, 1000])
async def test_a_heartbeat_that_is_nested_deeply_is_none(client, redis, queue, depth):
    """`ingine queue show --json` copies it, which needs more stack than reading it."""
    now_s, _ = await redis.time()
    raw = b"\x82\xa4at_s" + msgpack.packb(now_s) + b"\xa1x" + b"\x91" * depth + b"\x01"
    await redis.hset(Keys(queue).workers, "w", raw)
    workers = dataclasses.asdict(await client.queue_info())["workers"]
    assert (workers["w"].get("state") == "lost") == (depth > 15)
    assert json.dumps(workers)


@pytest.mark.parametrize("nonsense", [*NONSENSE, "0", "-0.5", "0x10", "1e999", " 1"])
async def test_a_limit_or_counter_that_is_none_refuses_nobody(
    client: AsyncClient, redis: Redis, queue: str, nonsense
):
    """One producer could once make all others' submissions fail by writing it."""
    keys = Keys(queue)
    limits = ("max_jobs", "max_job_bytes", "max_bytes", "max_jobs_per_s")
    for name in limits:
        await redis.hset(keys.settings, name, nonsense)
        if (name, nonsense) in [("max_jobs", "1e3"), ("max_job_bytes", "1e3"), ("max_bytes", "1e3")]:
            await redis.hdel(keys.settings, name)  # which is a number
        await client.submit("x")
    await redis.hset(keys.settings, "max_jobs_per_s", 1e6)
    for name in (keys.bytes, keys.rate("")):
        await redis.set(name, nonsense)
        await client.submit("x")
    assert int(await redis.get(keys.bytes)) > 0


@pytest.mark.parametrize("name", ["bytes", "rate", "high", "low", "delayed", "deadlines"])
async def test_another_type_elsewhere_refuses_nobody(client: AsyncClient, redis: Redis, queue: str, name):
    keys = Keys(queue)
    await client.set_limits(max_jobs_per_s=1e6)
    foreign = {
        "bytes": keys.bytes, "rate": keys.rate(""), "high": keys.jobs("high"), "low": keys.jobs("low"),
        "delayed": keys.delayed, "deadlines": keys.deadlines,
    }[name]  # fmt: skip
    await redis.rpush(foreign, "x")
    handle = await client.submit("x", deadline_s=3600)
    assert (await handle.status()).entry
    assert await handle.cancel() == "cancelled"


@pytest.mark.parametrize("name", ["normal", "delayed"])
async def test_what_cannot_be_written_was_not_accepted(client: AsyncClient, redis: Redis, queue: str, name):
    keys = Keys(queue)
    foreign = keys.delayed if name == "delayed" else keys.jobs("normal")
    await redis.rpush(foreign, "x")
    options = {"job_id": "a", "idempotency_key": "k", "not_before_s": 60 if name == "delayed" else None}
    with pytest.raises(ClientError):
        await client.submit("x", **options)
    assert await redis.keys(f"{keys.prefix}:*") == [foreign.encode()]
    await redis.delete(foreign)
    assert (await client.submit("x", **options)).job_id == "a"


@pytest.mark.parametrize("partitions", ["x", "-1", "1e3", b"\xff", "9" * 5000])
async def test_a_number_of_partitions_that_appears_and_is_none_is_named(
    client: AsyncClient, redis: Redis, queue: str, partitions
):
    await client.submit("x")  # the client has now read that there is one
    await redis.hset(Keys(queue).settings, "partitions", partitions)
    with pytest.raises(ClientError, match="partitions"):
        await client.submit("x")
