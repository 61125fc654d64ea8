"""The client's errors for a server that is away, loses replies or refuses. Runs on real servers only."""

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import trustme
from redis import exceptions
from redis.asyncio import Redis

from ingine.contract.keys import Keys
from ingine.producer import AsyncClient, BadRecord, Client, ClientError, ConfigError, ServerUnavailable
from ingine.producer.channels import MIN_BACKOFF_S
from ingine.producer.token_log import Retry
from ingine.worker.embedded import EmbeddedServer
from tests.producer.conftest import Server
from tests.producer.fake_worker import FakeWorker
from tests.security.tls import TlsFront
from tests.servers import durable_server
from tests.waiting import HANGS_S, wait_until_async

NEVER = 1000.0


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ingine.producer.connection.RETRIES", 1)


@pytest.fixture
def own_server(tmp_path: Path) -> Iterator[EmbeddedServer]:
    """A server that the test may break."""
    with durable_server(tmp_path) as server:
        yield server


@asynccontextmanager
async def lossy_proxy(url: str) -> AsyncIterator[tuple[str, asyncio.Event]]:
    """A proxy that, when the event is set, loses one reply to EVALSHA and closes the connection."""
    lose_next = asyncio.Event()
    address = urlsplit(url)

    async def relay(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        upstream_reader, upstream_writer = await asyncio.open_connection(address.hostname, address.port)
        try:
            while request := await reader.read(1 << 16):
                upstream_writer.write(request)
                reply = await upstream_reader.read(1 << 16)
                if lose_next.is_set() and b"EVALSHA" in request:
                    lose_next.clear()
                    break
                writer.write(reply)
        finally:
            writer.close()
            upstream_writer.close()

    server = await asyncio.start_server(relay, "127.0.0.1", 0)
    async with server:
        yield f"redis://127.0.0.1:{server.sockets[0].getsockname()[1]}/0", lose_next


@asynccontextmanager
async def slow_proxy(url: str) -> AsyncIterator[tuple[str, asyncio.Event]]:
    """A proxy that passes replies only while the event is set."""
    prompt = asyncio.Event()
    prompt.set()
    address = urlsplit(url)

    async def copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, when: asyncio.Event) -> None:
        with suppress(OSError):
            while some := await reader.read(1 << 16):
                await when.wait()
                writer.write(some)
        writer.close()

    async def relay(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        always = asyncio.Event()
        always.set()
        upstream_reader, upstream_writer = await asyncio.open_connection(address.hostname, address.port)
        await asyncio.gather(copy(reader, upstream_writer, always), copy(upstream_reader, writer, prompt))

    async with await asyncio.start_server(relay, "127.0.0.1", 0) as server:
        try:
            yield f"redis://127.0.0.1:{server.sockets[0].getsockname()[1]}/0", prompt
        finally:
            prompt.set()


async def test_a_submission_whose_reply_was_lost_is_one_submission(valkey: Server, queue: str, keys: Keys):
    async with (
        lossy_proxy(valkey.url) as (url, lose_next),
        AsyncClient(url, queue=queue) as client,
        valkey.connect() as redis,
    ):
        await client.submit("the script is known now")
        lose_next.set()
        handle = await client.submit("once", job_id="once")
        assert not lose_next.is_set()
        assert handle.job_id == "once"
        assert await redis.xlen(keys.jobs("normal")) == 2

        lose_next.set()
        handles = await client.submit_many({"prompt": f"{n}", "job_id": f"many-{n}"} for n in range(5))
        assert not lose_next.is_set()
        assert [handle.job_id for handle in handles] == [f"many-{n}" for n in range(5)]
        assert await redis.xlen(keys.jobs("normal")) == 7


async def test_nobody_there_is_an_error_that_says_so(own_server: EmbeddedServer):
    own_server.stop()
    async with AsyncClient(own_server.url) as client:
        says = rf"127.0.0.1:{own_server.port} cannot be reached \(.*[^.]\): is it running"
        with pytest.raises(ServerUnavailable, match=says):
            await client.submit("hi")


def test_the_sync_client_says_it_too(own_server: EmbeddedServer):
    own_server.stop()
    with Client(own_server.url) as client, pytest.raises(ServerUnavailable, match="cannot be reached"):
        client.submit("hi")


async def test_a_stream_gives_up_when_the_server_stays_away(
    own_server: EmbeddedServer, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("ingine.producer.token_log.GIVE_UP_S", 0.1)
    monkeypatch.setattr("ingine.producer.streams.SILENCE_S", 0.05)
    async with AsyncClient(own_server.url) as client:
        handle = await client.submit("hi")
        consumer = asyncio.create_task(handle.result())
        own_server.stop()
        with pytest.raises(ServerUnavailable, match="cannot be reached"):
            await consumer


async def test_a_stream_outlasts_a_server_that_comes_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("ingine.producer.streams.SILENCE_S", 0.05)
    with durable_server(tmp_path) as server:
        async with AsyncClient(server.url) as client:
            worker = FakeWorker(Redis.from_url(server.url), Keys())
            handle = await client.submit("hi")
            await worker.take()
            await worker.commit(handle.job_id, 0, 2)
            stream = client.attach(handle.job_id).stream()
            assert (await anext(stream)).position == 2
            server.stop()
            waiting = asyncio.ensure_future(anext(stream))
            await worker.redis.aclose()
            with durable_server(tmp_path, port=server.port):
                await worker.run_from(handle.job_id, 2, 4)
                assert [(await waiting).token_ids, *[chunk.token_ids async for chunk in stream]] == [[3], [4]]


async def test_a_server_that_hangs_is_an_error_that_says_so(
    valkey: Server, queue: str, keys: Keys, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("ingine.producer.connection.DEADLINE_S", 0.2)
    async with slow_proxy(valkey.url) as (url, prompt), AsyncClient(url, queue=queue) as client:
        prompt.clear()
        with pytest.raises(ServerUnavailable, match=r"cannot be reached \(no answer within 0.2 s\)"):
            await client.submit("hi")
        monkeypatch.setattr("ingine.producer.connection.DEADLINE_S", NEVER)
        prompt.set()
        assert (await client.queue_info()).queue == queue


async def test_streams_give_up_on_a_server_that_hangs(
    valkey: Server, queue: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("ingine.producer.token_log.GIVE_UP_S", 0.2)
    monkeypatch.setattr("ingine.producer.streams.SILENCE_S", 0.05)
    async with slow_proxy(valkey.url) as (url, prompt), AsyncClient(url, queue=queue) as client:
        handle = await client.submit("hi")
        following = asyncio.create_task(handle.result())
        prompt.clear()
        with pytest.raises(ServerUnavailable, match=r"no answer within 0.2 s"):
            await following


async def test_a_client_can_be_closed_while_its_server_hangs(
    valkey: Server, queue: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("ingine.producer.token_log.GIVE_UP_S", NEVER)
    monkeypatch.setattr("ingine.producer.streams.SILENCE_S", 0.05)
    async with slow_proxy(valkey.url) as (url, prompt), Redis.from_url(url, protocol=2) as own:
        client = AsyncClient(redis=own, queue=queue)
        handle = await client.submit("hi")
        following = asyncio.create_task(handle.result())
        await wait_until_async(lambda: client._session.streams._readers)
        prompt.clear()
        [(_, reader)] = client._session.streams._readers.values()
        await wait_until_async(lambda: any(not request.answer.done() for request in reader._under_way))
        async with asyncio.timeout(HANGS_S):
            await client.aclose()
        with pytest.raises(ClientError, match="closed"):
            await following
        prompt.set()
        assert await own.echo("what was asked") == b"what was asked", "an answer to another question"


async def test_each_outage_is_waited_out_anew(monkeypatch: pytest.MonkeyPatch):
    """The time of the previous outage, and its end, do not matter."""
    retry, answers = Retry(), [exceptions.ConnectionError("away"), "an answer"] * 2

    async def call() -> str:
        if isinstance(answer := answers.pop(0), Exception):
            raise answer
        return answer

    with monkeypatch.context() as impatient:
        impatient.setattr("ingine.producer.token_log.GIVE_UP_S", -1.0)
        with pytest.raises(exceptions.ConnectionError):
            await retry(call)
    loop = asyncio.get_running_loop()
    now = loop.time
    monkeypatch.setattr(loop, "time", lambda: now() + 3600)
    answers.pop(0)
    assert await retry(call) == "an answer"


async def test_wrong_credentials(valkey: Server):
    async with AsyncClient(valkey.url.replace("redis://", "redis://nobody:wrong@")) as client:
        with pytest.raises(ServerUnavailable, match=r"refuses these credentials.*INGINE_REDIS_URL"):
            await client.submit("hi")
        with pytest.raises(ServerUnavailable, match="credentials"):
            await client.attach("x").result()


@pytest.mark.parametrize("scheme", ["rediss", "rediss+cluster"])
async def test_streams_do_not_wait_for_another_certificate(
    redis_server: EmbeddedServer, monkeypatch: pytest.MonkeyPatch, scheme: str
):
    monkeypatch.setattr("ingine.producer.token_log.GIVE_UP_S", NEVER)
    with TlsFront(trustme.CA(), redis_server.port) as front:
        async with AsyncClient(f"{scheme}://127.0.0.1:{front.port}") as client, asyncio.timeout(HANGS_S):
            with pytest.raises(ServerUnavailable, match="certificate verify failed"):
                await client.attach("x").result()


async def test_a_user_who_may_not(valkey: Server, queue: str):
    async with valkey.connect() as admin:
        await admin.acl_setuser(
            queue, enabled=True, passwords=["+pw"], keys=["*"], commands=["+ping", "+hello"]
        )
        async with AsyncClient(valkey.url.replace("redis://", f"redis://{queue}:pw@")) as client:
            with pytest.raises(ServerUnavailable, match="refuses these credentials"):
                await client.submit("hi")
        await admin.acl_deluser(queue)


async def test_a_user_who_may_not_subscribe_follows_the_log_and_is_told_once(
    valkey: Server, queue: str, keys: Keys, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    monkeypatch.setattr("ingine.producer.streams.SILENCE_S", 0.05)
    url = valkey.url.replace("redis://", f"redis://{queue}:pw@")
    async with valkey.connect() as admin, AsyncExitStack() as stack:
        await admin.acl_setuser(queue, enabled=True, passwords=["+pw"], keys=["*"], commands=["+@all"])
        stack.push_async_callback(admin.acl_deluser, queue)
        client = await stack.enter_async_context(AsyncClient(url, queue=queue))
        worker, handle = FakeWorker(admin, keys), await client.submit("hi")
        await worker.take()
        stream = handle.stream()
        await worker.commit(handle.job_id, 0, 1)
        assert (await anext(stream)).position == 1
        [(hub, _)] = client._session.streams._readers.values()
        await wait_until_async(lambda: hub._backoff_s >= 16 * MIN_BACKOFF_S, what="longer pauses")
        [warning] = [record for record in caplog.records if "no live events" in record.message]
        assert "NOPERM" in warning.message or "permissions" in warning.message

        await admin.acl_setuser(queue, enabled=True, channels=["*"])
        await wait_until_async(lambda: hub._backoff_s == MIN_BACKOFF_S, what="a subscription")
        await worker.run_from(handle.job_id, 1, 2)
        assert [chunk.position async for chunk in stream] == [2]


async def test_a_replica_that_cannot_be_written(own_server: EmbeddedServer):
    async with Redis.from_url(own_server.url) as admin, AsyncClient(own_server.url) as client:
        await admin.execute_command("REPLICAOF", "127.0.0.1", "1")
        with pytest.raises(ServerUnavailable, match="read-only replica"):
            await client.submit("hi")


async def test_a_server_out_of_memory(own_server: EmbeddedServer):
    async with Redis.from_url(own_server.url) as admin, AsyncClient(own_server.url) as client:
        await admin.config_set("maxmemory", 1)
        with pytest.raises(ServerUnavailable, match="out of memory"):
            await client.submit("hi")
        with pytest.raises(ServerUnavailable, match="out of memory") as refused:
            await client.submit_many([{"prompt": "hi"}])
        assert refused.value.accepted == []


async def test_a_key_of_another_type_fails_its_own_stream_alone(valkey: Server, queue: str, keys: Keys):
    async with valkey.client(queue) as client, valkey.connect() as redis:
        worker = FakeWorker(redis, keys)
        handle = await client.submit("hi")
        await worker.take()
        await worker.run(handle.job_id, 1)
        await redis.set(keys.tokens("odd"), "a string")
        results = await asyncio.gather(client.attach("odd").result(), handle.result(), return_exceptions=True)
        assert isinstance(results[0], BadRecord)
        assert "WRONGTYPE" in str(results[0])
        assert results[1].token_ids == [1]


@pytest.mark.parametrize(
    ("variable", "value", "says"),
    [
        ("INGINE_REDIS_URL", "http://secret@example.com", "INGINE_REDIS_URL .*must begin with redis://"),
        ("INGINE_REDIS_URL", "redis://localhost:port/0", "INGINE_REDIS_URL"),
        ("INGINE_QUEUE", "no spaces", "INGINE_QUEUE .*matches"),
    ],
)
def test_a_wrong_setting_names_its_variable(
    monkeypatch: pytest.MonkeyPatch, variable: str, value: str, says: str
):
    monkeypatch.setenv(variable, value)
    with pytest.raises(ConfigError, match=says) as wrong:
        AsyncClient()
    assert "secret" not in str(wrong.value)


def test_settings_come_from_arguments_environment_and_dotenv(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / ".env").write_text("INGINE_QUEUE=from-file\nINGINE_MODEL=a-worker-s-affair\n")
    assert AsyncClient().queue == "from-file"
    monkeypatch.setenv("INGINE_QUEUE", "from-environment")
    assert AsyncClient().queue == "from-environment"
    assert AsyncClient(queue="given").queue == "given"


def test_a_decoding_redis_client_is_refused():
    with pytest.raises(ConfigError, match="decode_responses"):
        AsyncClient(redis=Redis(decode_responses=True))
