"""Streams: every token once and in order, whatever pub/sub loses, repeats or delays. Forgers: test_forged."""

import asyncio
import gc
import threading
from collections import Counter
from collections.abc import AsyncIterator

import pytest
from redis import exceptions
from redis.asyncio import Redis

from ingine.contract.events import TokensEvent, encode_event
from ingine.contract.keys import EVENT_FIELD, Keys
from ingine.contract.record import JobStatus
from ingine.producer import (
    AsyncClient,
    BadRecord,
    Chunk,
    Client,
    ClientError,
    JobCancelled,
    JobExpired,
    JobFailed,
    JobNotFound,
    ResultTimeout,
)
from ingine.producer.channels import ChannelHub
from ingine.producer.token_log import LogReader
from tests.producer.conftest import Face, Server
from tests.producer.fake_worker import FakeWorker
from tests.producer.test_channels import over
from tests.waiting import wait_until_async

NEVER = 1000.0


@pytest.fixture
def deaf(monkeypatch: pytest.MonkeyPatch) -> None:
    """Streams do not read the log after silence: something else must make them."""
    monkeypatch.setattr("ingine.producer.streams.SILENCE_S", NEVER)


@pytest.fixture
def alert(monkeypatch: pytest.MonkeyPatch) -> None:
    """Streams read the log after a moment of silence."""
    monkeypatch.setattr("ingine.producer.streams.SILENCE_S", 0.05)


@pytest.fixture
async def job_id(face: Face, worker: FakeWorker) -> str:
    """A running job without a token."""
    await face("submit", "hi")
    return (await worker.take()).id


def text(chunks: list[Chunk]) -> str:
    return "".join(chunk.text for chunk in chunks)


def token_ids(chunks: list[Chunk]) -> list[int]:
    return [token_id for chunk in chunks for token_id in chunk.token_ids]


def subscribed(client: AsyncClient) -> list[bytes]:
    return [channel for hub, _ in client._session.streams._readers.values() for channel in hub._subscriptions]


async def has(chunks: list[Chunk], position: int) -> None:
    """Wait until the consumer has reached `position`: it has subscribed, read the log, and follows live."""
    await wait_until_async(lambda: chunks and chunks[-1].position >= position, what=f"position {position}")


async def following(face: Face, worker: FakeWorker, job_id: str) -> tuple[asyncio.Task, list[Chunk]]:
    """A consumer that has token 1 and has subscribed for certain: token 2 had a receiver."""
    chunks: list[Chunk] = []
    consumer = asyncio.create_task(face.stream(job_id, into=chunks))
    await worker.commit(job_id, 0, 1)
    await has(chunks, 1)
    await commit_until_heard(worker, job_id, 1, 2)
    await has(chunks, 2)
    return consumer, chunks


async def commit_until_heard(worker: FakeWorker, job_id: str, start: int, position: int) -> None:
    event = await worker.commit(job_id, start, position, publish=False)

    async def heard() -> bool:
        return await worker.publish(job_id, event) > 0

    await wait_until_async(heard, what="the subscription")


async def test_tokens_come_as_they_are_made(face: Face, worker: FakeWorker, job_id: str, deaf):
    consumer, chunks = await following(face, worker, job_id)
    await worker.commit(job_id, 2, 3)
    await has(chunks, 3)
    await worker.end(job_id, 3, text=" held back")
    assert await consumer is chunks
    assert [chunk.position for chunk in chunks] == [1, 2, 3, 3]
    assert token_ids(chunks) == [1, 2, 3]
    assert text(chunks) == "<1><2><3> held back"
    assert chunks[-1] == Chunk(" held back", [], 3)


async def test_a_late_consumer_misses_nothing(face: Face, worker: FakeWorker, job_id: str, deaf):
    await worker.run(job_id, 5)
    assert token_ids(await face.stream(job_id)) == [1, 2, 3, 4, 5]


async def test_a_consumer_comes_back_at_the_position_it_had(
    face: Face, worker: FakeWorker, job_id: str, deaf
):
    consumer, chunks = await following(face, worker, job_id)
    await worker.run_from(job_id, 2, 6)
    await consumer
    again = await face.stream(job_id, chunks[2].position)
    assert token_ids(chunks[:3]) + token_ids(again) == [1, 2, 3, 4, 5, 6]


async def test_inside_an_entry_the_token_ids_are_exact_and_the_text_is_whole(
    face: Face, worker: FakeWorker, job_id: str
):
    await worker.commit(job_id, 0, 4)
    await worker.end(job_id, 4)
    assert await face.stream(job_id, 3) == [Chunk("<1><2><3><4>", [4], 4)]


@pytest.mark.parametrize("position", [5, 6, 1000])
async def test_at_or_after_the_end_there_is_only_the_end(
    face: Face, worker: FakeWorker, job_id: str, deaf, position: int
):
    await worker.run(job_id, 5)
    assert await face.stream(job_id, position) == []


async def test_what_was_never_published_is_read_from_the_log(
    face: Face, worker: FakeWorker, job_id: str, alert
):
    consumer = asyncio.create_task(face.stream(job_id))
    await worker.run(job_id, 5, publish=False)
    assert token_ids(await consumer) == [1, 2, 3, 4, 5]


async def test_a_repeated_event_is_dropped(face: Face, worker: FakeWorker, job_id: str, deaf):
    consumer, chunks = await following(face, worker, job_id)
    event = await worker.commit(job_id, 2, 4)
    await worker.publish(job_id, event)
    await worker.publish(job_id, encode_event(TokensEvent(3, [3], "<3>")))
    await worker.commit(job_id, 4, 5)
    end = await worker.end(job_id, 5)
    await worker.publish(job_id, end)
    await consumer
    assert token_ids(chunks) == [1, 2, 3, 4, 5]


async def test_a_gap_sends_the_stream_to_the_log_at_once(face: Face, worker: FakeWorker, job_id: str, deaf):
    consumer, chunks = await following(face, worker, job_id)
    await worker.commit(job_id, 2, 3, publish=False)
    await worker.commit(job_id, 3, 4)
    await has(chunks, 4)
    await worker.commit(job_id, 4, 5, publish=False)
    await worker.end(job_id, 5)  # a job with stream=False publishes nothing but its end
    await consumer
    assert token_ids(chunks) == [1, 2, 3, 4, 5]


async def test_what_is_published_but_no_event_is_no_more_than_a_hint(
    face: Face, worker: FakeWorker, job_id: str, deaf
):
    consumer, chunks = await following(face, worker, job_id)
    await worker.commit(job_id, 2, 3, publish=False)
    await worker.publish(job_id, b"\xc1 not msgpack")
    await has(chunks, 3)
    await worker.end(job_id, 3)
    await consumer
    assert token_ids(chunks) == [1, 2, 3]


async def test_a_log_that_is_no_log_fails_its_own_stream_alone(
    client: AsyncClient, worker: FakeWorker, redis: Redis, keys: Keys
):
    handle = await client.submit("hi")
    await worker.take()
    await worker.run(handle.job_id, 1)
    await redis.xadd(keys.tokens("odd"), {"event": b"\xc1"}, id="1-0")
    odd, good = await asyncio.gather(client.attach("odd").result(), handle.result(), return_exceptions=True)
    assert isinstance(odd, BadRecord)
    assert good.token_ids == [1]


async def test_a_negative_position_is_refused(face: Face, job_id: str):
    with pytest.raises(ValueError, match="at least 0"):
        await face.stream(job_id, -1)


async def test_a_slow_consumer_loses_nothing(
    client: AsyncClient, worker: FakeWorker, deaf, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("ingine.producer.token_log.ENTRIES_PER_READ", 7)
    job_id = (await client.submit("hi")).job_id
    await worker.take()
    await worker.commit(job_id, 0, 1)
    quick = asyncio.create_task(Face(client).stream(job_id))
    stream = client.attach(job_id).stream()
    chunks = [await anext(stream)]
    await commit_until_heard(worker, job_id, 1, 2)
    chunks.append(await anext(stream))
    await worker.run_from(job_id, 2, 50)
    await quick  # everything has arrived, without the slow consumer
    async for chunk in stream:
        chunks.append(chunk)
    assert token_ids(chunks) == [*range(1, 51)]


async def test_two_streams_of_one_job_do_not_disturb_each_other(
    client: AsyncClient, worker: FakeWorker, deaf
):
    handle = await client.submit("hi")
    await worker.take()
    await worker.commit(handle.job_id, 0, 1)
    first, second = handle.stream(), handle.stream()
    assert (await anext(first)).position == (await anext(second)).position == 1
    await first.aclose()
    await worker.run_from(handle.job_id, 1, 3)
    assert token_ids([chunk async for chunk in second]) == [2, 3]
    assert token_ids([chunk async for chunk in handle.stream()]) == [1, 2, 3]


@pytest.mark.parametrize(
    ("status", "error", "expected"),
    [
        (JobStatus.FAILED, {"code": "prompt_too_long", "message": "9 tokens, the limit is 8"}, JobFailed),
        (JobStatus.CANCELLED, None, JobCancelled),
        (JobStatus.EXPIRED, {"code": "deadline_exceeded", "message": "late"}, JobExpired),
    ],
)
async def test_another_end_is_raised_after_all_tokens(
    face: Face, worker: FakeWorker, job_id: str, status, error, expected
):
    await worker.commit(job_id, 0, 2)
    await worker.end(job_id, 2, status, error=error, finish_reason="abort", text="…")
    chunks: list[Chunk] = []
    with pytest.raises(expected, match=job_id) as raised:
        if isinstance(face._client, Client):
            for chunk in face._client.attach(job_id).stream():
                chunks.append(chunk)
        else:
            await face.stream(job_id, into=chunks)
    assert text(chunks) == "<1><2>…"
    with pytest.raises(expected):
        await face.result(job_id)
    if expected is JobFailed:
        assert raised.value.code == "prompt_too_long"
        assert "limit is 8" in str(raised.value)


async def test_the_result_has_everything(face: Face, worker: FakeWorker):
    job_id = (await face("submit", "hi", metadata={"row": 1})).job_id
    await worker.take()
    usage, timings = {"num_output_tokens": 3}, {"total_ms": 5.0}
    waiting = asyncio.create_task(face.result(job_id))
    await worker.run(job_id, 3, text="!", usage=usage, timings=timings, metadata={"row": 1})
    result = await waiting
    assert (result.text, result.token_ids, result.finish_reason) == ("<1><2><3>!", [1, 2, 3], "length")
    assert (result.usage, result.timings, result.metadata) == (usage, timings, {"row": 1})
    assert (result.job_id, result.status, result.logprobs) == (job_id, JobStatus.FINISHED, None)


async def test_a_result_that_takes_too_long_is_a_timeout_and_can_be_asked_for_again(
    face: Face, worker: FakeWorker, job_id: str
):
    with pytest.raises(ResultTimeout, match="goes on"):
        await face.result(job_id, 0.05)
    await worker.run(job_id, 1)
    assert (await face.result(job_id)).token_ids == [1]


async def test_a_result_has_each_text_once_though_the_server_lost_what_was_read(
    client: AsyncClient, worker: FakeWorker, redis: Redis, keys: Keys, alert, monkeypatch: pytest.MonkeyPatch
):
    """The tokens come again in one event of several, whose text cannot be divided."""
    read, positions = LogReader.read, set()

    async def spied(reader, keys, job_id, position, **options):
        positions.add(position)
        return await read(reader, keys, job_id, position, **options)

    monkeypatch.setattr(LogReader, "read", spied)
    handle = await client.submit("hi")
    job_id = (await worker.take()).id
    await worker.commit(job_id, 0, 1, publish=False)
    await worker.commit(job_id, 1, 2, publish=False)
    waiting = asyncio.create_task(handle.result())
    await wait_until_async(lambda: 2 in positions, what="a consumer that has token 2")
    async with redis.pipeline(transaction=True) as loss:
        loss.xdel(keys.tokens(job_id), "2-0")
        loss.hset(keys.job(job_id), "position", 1)
        await loss.execute()
    await worker.commit(job_id, 1, 3)
    await worker.end(job_id, 3)
    assert (await waiting).text == "<1><2><3>"


async def test_an_unknown_job_does_not_hang(face: Face):
    with pytest.raises(JobNotFound, match="nobody"):
        await face.stream("nobody")
    with pytest.raises(JobNotFound, match="TTL"):
        await face.result("nobody")


async def test_a_job_whose_ttl_passes_while_a_consumer_waits_is_not_found(
    face: Face, worker: FakeWorker, job_id: str, alert, redis: Redis, keys: Keys
):
    consumer = asyncio.create_task(face.stream(job_id))
    await redis.delete(keys.job(job_id), keys.tokens(job_id))
    with pytest.raises(JobNotFound):
        await consumer


async def test_a_closed_client_ends_its_streams(server: Server, queue: str):
    async with server.client(queue) as client:
        handle = await client.submit("hi")
        consumer = asyncio.create_task(handle.result())
        await wait_until_async(lambda: subscribed(client))
    with pytest.raises(ClientError, match="closed"):
        await consumer


# --------------------------------------------------------------------------- on the real server alone


@pytest.fixture
async def real(valkey: Server, queue: str, keys: Keys) -> AsyncIterator[tuple[AsyncClient, FakeWorker]]:
    async with valkey.connect() as connection, valkey.client(queue) as client:
        yield client, FakeWorker(connection, keys)


async def test_a_reconnect_wakes_every_stream(real: tuple[AsyncClient, FakeWorker], deaf):
    client, worker = real
    job_id = (await client.submit("hi")).job_id
    await worker.take()
    consumer, chunks = await following(Face(client), worker, job_id)
    await worker.redis.client_kill_filter(_type="pubsub")
    await worker.commit(job_id, 2, 3, publish=False)
    await has(chunks, 3)
    await worker.end(job_id, 3, publish=False)
    await worker.redis.client_kill_filter(_type="pubsub")
    await consumer
    assert token_ids(chunks) == [1, 2, 3]


@pytest.mark.parametrize("protocol", [2, 3])
async def test_a_redis_client_of_ones_own(valkey: Server, queue: str, keys: Keys, deaf, protocol: int):
    async with Redis.from_url(valkey.url, protocol=protocol) as own, valkey.connect() as connection:
        worker = FakeWorker(connection, keys)
        async with AsyncClient(redis=own, queue=queue) as client:
            job_id = (await client.submit("hi")).job_id
            await worker.take()
            consumer, chunks = await following(Face(client), worker, job_id)
            assert (await client.queue_info()).running["normal"] == 1
            await worker.run_from(job_id, 2, 4)
            await consumer
            assert token_ids(chunks) == [1, 2, 3, 4]
            [(_, end)] = await connection.xrevrange(keys.tokens(job_id), count=1)
            await connection.xadd(keys.replies("me"), end)
            assert (await anext(client.replies("me"))).job_id == job_id
        assert await own.ping()


async def test_losing_every_connection_is_not_noticed(real: tuple[AsyncClient, FakeWorker], alert):
    client, worker = real
    job_id = (await client.submit("hi")).job_id
    await worker.take()
    consumer, chunks = await following(Face(client), worker, job_id)
    for position in range(3, 10):
        await worker.redis.client_kill_filter(_type="normal", skipme=True)
        await worker.redis.client_kill_filter(_type="pubsub")
        await worker.commit(job_id, position - 1, position)
    await worker.end(job_id, 9)
    await consumer
    assert token_ids(chunks) == [*range(1, 10)]
    assert (await client.status(job_id)).status is JobStatus.FINISHED


async def test_a_thousand_streams_share_few_connections(real: tuple[AsyncClient, FakeWorker]):
    client, worker = real
    num_jobs, num_tokens = 1000, 3
    handles = await client.submit_many({"prompt": f"{n}"} for n in range(num_jobs))

    async def consume(handle) -> list[int]:
        return token_ids([chunk async for chunk in handle.stream()])

    consumers = [asyncio.create_task(consume(handle)) for handle in handles]
    await wait_until_async(lambda: len(subscribed(client)) == num_jobs)
    job_ids = [(await worker.take()).id for _ in range(num_jobs)]
    for start in range(0, num_jobs, 50):
        await asyncio.gather(*(worker.run(job_id, num_tokens) for job_id in job_ids[start : start + 50]))
    assert await asyncio.gather(*consumers) == [[1, 2, 3]] * num_jobs
    names = [connection["name"] for connection in await worker.redis.client_list()]
    assert names.count("ingine-producer") <= 9
    assert not subscribed(client)


async def test_nothing_is_kept_of_streams_that_have_ended(
    real: tuple[AsyncClient, FakeWorker], keys: Keys, monkeypatch: pytest.MonkeyPatch
):
    client, worker = real
    unconfirmed: list[dict] = []
    read = ChannelHub._read

    def spied(hub: ChannelHub, connection, leaving: dict):
        unconfirmed.append(leaving)
        return read(hub, connection, leaving)

    monkeypatch.setattr(ChannelHub, "_read", spied)
    handles = await client.submit_many({"prompt": f"{n}"} for n in range(3))
    consumers = [asyncio.create_task(handle.result()) for handle in handles]
    for _ in handles:
        job_id = (await worker.take()).id
        await commit_until_heard(worker, job_id, 0, 1)
        await worker.end(job_id, 1)
    await asyncio.gather(*consumers)

    async def has_left() -> bool:
        return not await worker.redis.execute_command("PUBSUB", "SHARDCHANNELS", keys.channel("*"))

    await wait_until_async(has_left, what="the end of the subscriptions")
    await wait_until_async(lambda: unconfirmed and not any(unconfirmed), what="the confirmations")


async def test_breaking_off_a_stream_leaves_the_sync_client_usable(
    valkey: Server, queue: str, keys: Keys, recwarn: pytest.WarningsRecorder
):
    async with valkey.connect() as redis:
        worker = FakeWorker(redis, keys)
        client = Client(valkey.url, queue=queue)
        handle = await asyncio.to_thread(client.submit, "hi")
        await worker.take()
        await worker.run(handle.job_id, 3)
    first = await asyncio.to_thread(lambda: next(handle.stream()))
    assert first.position == 1
    kept = handle.stream()
    await asyncio.to_thread(next, kept)
    assert (await asyncio.to_thread(handle.result, 5)).token_ids == [1, 2, 3]
    await asyncio.to_thread(client.close)
    del kept
    with pytest.raises(ClientError, match="closed"):
        client.submit("hi")
    client.close()
    assert [str(warning.message) for warning in recwarn] == []


@pytest.mark.parametrize("kind", ["stream", "replies"])
async def test_an_iterator_that_is_collected_on_the_clients_own_thread_does_not_stop_it(
    valkey: Server, queue: str, keys: Keys, kind: str
):
    """The cyclic garbage collector closes iterators on whichever thread it runs."""
    client = Client(valkey.url, queue=queue)
    handle = await asyncio.to_thread(client.submit, "hi")
    async with valkey.connect() as redis:
        worker = FakeWorker(redis, keys)
        await worker.take()
        await worker.commit(handle.job_id, 0, 1)
        end = await worker.end(handle.job_id, 1)
        await redis.xadd(keys.replies("somebody"), {EVENT_FIELD: end})
    cycle = [handle.stream() if kind == "stream" else client.replies("somebody")]
    next(cycle[0])
    gc.disable()
    try:
        cycle.append(cycle)
        del cycle
        thread = client._thread
        thread._loop.call_soon_threadsafe(gc.collect)
        # A daemon thread: a frozen client must not freeze pytest.
        usable = threading.Thread(target=lambda: (handle.status(), client.close()), daemon=True)
        usable.start()
        await wait_until_async(lambda: not usable.is_alive(), what="the client's answer")
    finally:
        gc.enable()
    assert thread.closed


async def test_a_connection_that_ends_while_we_are_about_to_write_is_made_again():
    """The reading coroutine has closed it, so redis-py's write raises AttributeError."""

    class Ended:
        is_connected = False

        async def send_command(self, *command, **options):
            raise AttributeError("'NoneType' object has no attribute 'writelines'")

    hub = ChannelHub(None)
    hub._subscriptions[b"channel"] = []
    with pytest.raises(exceptions.ConnectionError):
        await hub._keep_subscribed(over(Ended()), Counter())
    Ended.is_connected = True
    with pytest.raises(AttributeError):  # our own faults are not converted
        await hub._keep_subscribed(over(Ended()), Counter())
