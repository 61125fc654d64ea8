"""An AsyncClient on a second event loop: after the first one was closed, and beside it."""

import asyncio
import threading

import pytest
from redis.asyncio import Redis

from ingine.producer import AsyncClient, ClientError
from tests.producer.conftest import Server
from tests.producer.fake_worker import FakeWorker


def test_asyncio_run_twice(valkey: Server, queue: str):
    client = AsyncClient(valkey.url, queue=queue)

    async def submit_and_look() -> list[str]:
        job = await client.submit("hi")
        return [(await job.status()).status, (await client.cancel(job.job_id))]

    for _ in range(3):
        assert asyncio.run(submit_and_look()) == ["queued", "cancelled"]
    asyncio.run(client.aclose())


def test_a_handle_from_another_loop(valkey: Server, queue: str, keys):
    client = AsyncClient(valkey.url, queue=queue)
    job = asyncio.run(client.submit("hi"))

    async def work_and_follow() -> list[str]:
        async with valkey.connect() as redis:
            worker = FakeWorker(redis, keys)
            await worker.take()
            await worker.run(job.job_id, 2)
        return [chunk.text async for chunk in job.stream()] + [(await job.result(20)).text]

    assert asyncio.run(work_and_follow()) == ["<1>", "<2>", "<1><2>"]
    asyncio.run(client.aclose())


@pytest.mark.parametrize("first_loop_is_closed", [True, False])
def test_a_stream_from_another_loop_says_how_to_go_on(
    valkey: Server, queue: str, keys, first_loop_is_closed: bool
):
    client = AsyncClient(valkey.url, queue=queue)
    first = asyncio.new_event_loop()

    async def begin():
        job = await client.submit("hi")
        async with valkey.connect() as redis:
            worker = FakeWorker(redis, keys)
            await worker.take()
            await worker.run(job.job_id, 2)
        stream = job.stream()
        return stream, (await anext(stream)).position

    stream, position = first.run_until_complete(begin())
    assert position == 1
    if first_loop_is_closed:
        end(first)
    with pytest.raises(ClientError, match=r"another event loop.*stream\(1\)"):
        asyncio.run(_next(stream))
    if not first_loop_is_closed:
        assert first.run_until_complete(client.queue_info()).queue == queue
        end(first)


def end(loop: asyncio.AbstractEventLoop) -> None:
    """End a loop as asyncio.run does, but without closing iterators."""
    tasks = asyncio.all_tasks(loop)
    for task in tasks:
        task.cancel()
    loop.run_until_complete(asyncio.gather(*tasks, return_exceptions=True))
    loop.close()


async def _next(stream):
    return await anext(stream)


def test_two_loops_at_a_time(valkey: Server, queue: str):
    """A thread with a loop of its own uses the client while the main thread's loop does."""
    client = AsyncClient(valkey.url, queue=queue)
    both_at_it = threading.Barrier(2, timeout=60)
    outcomes: list[int] = []

    async def submit_some() -> None:
        await client.submit("hi")
        await asyncio.to_thread(both_at_it.wait)
        handles = await asyncio.gather(*(client.submit("hi") for _ in range(20)))
        outcomes.append(len(handles))

    other = threading.Thread(target=lambda: asyncio.run(submit_some()), daemon=True)
    other.start()
    asyncio.run(submit_some())
    other.join(60)
    assert outcomes == [20, 20]
    assert asyncio.run(client.queue_info()).waiting["normal"] == 42
    asyncio.run(client.aclose())


def test_replies_on_a_second_loop(valkey: Server, queue: str, keys):
    client = AsyncClient(valkey.url, queue=queue)

    async def one_reply(job_id: str, position: str = "") -> str:
        job = await client.submit("hi", job_id=job_id, reply_to="me")
        await job.cancel()
        async for reply in client.replies("me", position):
            assert reply.job_id == job_id
            return reply.position

    position = asyncio.run(one_reply("first"))
    asyncio.run(one_reply("second", position))
    asyncio.run(client.aclose())


def test_a_redis_client_of_ones_own_belongs_to_its_first_loop(valkey: Server, queue: str):
    client = AsyncClient(redis=Redis.from_url(valkey.url), queue=queue)
    first = asyncio.new_event_loop()
    first.run_until_complete(client.submit("hi"))
    with pytest.raises(ClientError, match=r"redis=.*redis_url"):
        asyncio.run(client.submit("hi"))
    assert first.run_until_complete(client.queue_info()).waiting["normal"] == 1
    first.close()
    with pytest.raises(ClientError, match=r"redis=.*redis_url"):
        asyncio.run(client.submit("hi"))


async def test_a_closed_client_says_so_whatever_it_is_asked(valkey: Server, queue: str):
    client = AsyncClient(valkey.url, queue=queue)
    job = await client.submit("hi")
    await client.aclose()
    await client.aclose()
    for call in (client.submit("hi"), job.status(), job.result(), client.queue_info(), _next(job.stream())):
        with pytest.raises(ClientError, match="the client is closed"):
            await call
