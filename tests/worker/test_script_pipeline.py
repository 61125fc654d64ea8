"""Calls that share a round trip are each their own: answer, error, and script."""

import asyncio

import pytest
from redis.asyncio import Redis
from redis.exceptions import ConnectionError, ResponseError

import ingine.connect.script_pipeline
from ingine.connect.script_pipeline import ScriptPipeline
from ingine.contract.calls.script_call import ScriptCall


@pytest.fixture
async def redis(redis_url):
    async with Redis.from_url(redis_url, protocol=2) as client:
        yield client


def call_of(source: str):
    """Makes calls of this script, which return its raw reply."""
    return lambda keys=(), args=(): ScriptCall(source, keys, args, lambda reply: reply)


async def test_calls_of_a_moment_share_a_trip_and_each_has_its_own_answer_or_error(redis, monkeypatch):
    echo = call_of("return {KEYS[1], ARGV[1]}")
    broken = call_of("return redis.error_reply('WRONGTYPE not a hash')")
    for call in (echo(), broken()):
        await redis.script_load(call.source)
    connections, pool = [], redis.connection_pool
    get_connection = pool.get_connection
    monkeypatch.setattr(pool, "get_connection", lambda: connections.append(1) or get_connection())
    pipeline = ScriptPipeline(redis)
    calls = [pipeline.call(echo([f"key-{n}"], [n])) for n in range(5)]
    calls.insert(2, pipeline.call(broken()))
    answers = await asyncio.gather(*calls, return_exceptions=True)
    assert isinstance(answers.pop(2), ResponseError)
    assert len(connections) == 1
    assert answers == [[b"key-%d" % n, b"%d" % n] for n in range(5)]


async def test_scripts_that_the_server_has_not_are_loaded_and_run_once(redis, queue):
    count = call_of("return redis.call('INCRBY', KEYS[1], ARGV[1])")
    twice = call_of("return redis.call('INCRBY', KEYS[1], 2 * ARGV[1])")
    pipeline = ScriptPipeline(redis)
    await pipeline.call(count([queue], [1]))  # the one is there, the other is not
    await asyncio.gather(
        pipeline.call(count([queue], [10])),
        pipeline.call(twice([queue], [100])),
        pipeline.call(twice([queue], [1000])),
    )
    assert await redis.get(queue) == b"2211"


async def test_calls_go_in_order_and_a_cancelled_one_takes_no_other_with_it(redis, queue):
    push = call_of("return redis.call('RPUSH', KEYS[1], ARGV[1])")
    pipeline = ScriptPipeline(redis)
    calls = [asyncio.create_task(pipeline.call(push([queue], [n]))) for n in range(4)]
    await asyncio.sleep(0)  # all are on their way
    calls[1].cancel()
    assert [await call for call in (calls[0], *calls[2:])] == [1, 3, 4]
    assert await redis.lrange(queue, 0, -1) == [b"0", b"1", b"2", b"3"]


async def test_a_broken_connection_is_everybodys_error_and_the_next_trip_is_new(redis):
    echo = call_of("return ARGV[1]")
    pipeline = ScriptPipeline(redis)
    pool, redis.connection_pool = redis.connection_pool, Redis(port=1).connection_pool
    calls = [pipeline.call(echo([], [n])) for n in range(3)]
    answers = await asyncio.gather(*calls, return_exceptions=True)
    assert all(isinstance(answer, ConnectionError) for answer in answers)
    redis.connection_pool = pool
    assert await pipeline.call(echo([], ["x"])) == b"x"


async def test_a_call_that_is_cancelled_leaves_no_answer_to_the_next_one(redis, monkeypatch):
    echo = call_of("return ARGV[1]")
    pipeline, sent = ScriptPipeline(redis), asyncio.Event()
    assert await pipeline.call_alone(echo([], ["first"])) == b"first"
    read_reply = ingine.connect.script_pipeline._read_reply

    async def read_once_it_is_sent(connection):
        sent.set()
        return await read_reply(connection)

    monkeypatch.setattr(ingine.connect.script_pipeline, "_read_reply", read_once_it_is_sent)
    await redis.client_pause(300)  # so that there is no answer yet
    cancelled = asyncio.create_task(pipeline.call_alone(echo([], ["cancelled"])))
    await sent.wait()
    cancelled.cancel()
    with pytest.raises(asyncio.CancelledError):
        await cancelled
    assert await pipeline.call_alone(echo([], ["next"])) == b"next"


async def test_a_call_alone_has_the_scripts_own_answer_or_error(redis, queue):
    count = call_of("return redis.call('INCRBY', KEYS[1], ARGV[1])")
    broken = call_of("return redis.error_reply('WRONGTYPE not a hash')")
    pipeline = ScriptPipeline(redis)
    assert await pipeline.call_alone(count([queue], [1])) == 1, "the server had not got it"
    assert await pipeline.call_alone(count([queue], [1])) == 2
    with pytest.raises(ResponseError, match="WRONGTYPE"):
        await pipeline.call_alone(broken())
    assert await pipeline.call_alone(count([queue], [1])) == 3
