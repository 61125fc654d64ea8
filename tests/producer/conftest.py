"""Contract tests run on fakeredis and on a real Valkey server, and on both faces of the client."""

import asyncio
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import fakeredis
import pytest
from redis.asyncio import Redis

from ingine.contract.keys import Keys
from ingine.producer import AsyncClient, Chunk, Client, Result
from tests.producer.fake_worker import FakeWorker
from tests.waiting import HANGS_S


@dataclass
class Server:
    """The test's server: how to connect to it, and the arguments of a client under test."""

    connect: Callable[[], Redis]
    url: str | None

    @asynccontextmanager
    async def client(self, queue: str) -> AsyncIterator[AsyncClient]:
        own = None if self.url else self.connect()
        async with AsyncClient(self.url, queue=queue, redis=own) as client:
            yield client
        if own:
            await own.aclose()


class Face:
    """`await face("submit", "a prompt")` on a client of either kind."""

    def __init__(self, client: AsyncClient | Client):
        self._client = client
        self._is_async = isinstance(client, AsyncClient)

    async def __call__(self, method: str, *args: Any, **kwargs: Any) -> Any:
        call = getattr(self._client, method)
        return (
            await call(*args, **kwargs) if self._is_async else await asyncio.to_thread(call, *args, **kwargs)
        )

    async def stream(
        self, job_id: str, from_position: int = 0, *, into: list[Chunk] | None = None
    ) -> list[Chunk]:
        """Return all chunks. Each is also appended to `into` as it comes, so that a test can watch."""
        chunks = [] if into is None else into
        stream = self._client.attach(job_id, from_position).stream()
        if self._is_async:
            async for chunk in stream:
                chunks.append(chunk)
        else:
            await asyncio.to_thread(chunks.extend, stream)
        return chunks

    async def result(self, job_id: str, timeout_s: float | None = HANGS_S) -> Result:
        handle = self._client.attach(job_id)
        if self._is_async:
            return await handle.result(timeout_s)
        return await asyncio.to_thread(handle.result, timeout_s)


def fake_server() -> Server:
    server = fakeredis.FakeServer(version=7)
    return Server(lambda: fakeredis.FakeAsyncRedis(server=server), None)


@pytest.fixture
def keys(queue: str) -> Keys:
    return Keys(queue)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Parametrise a test by servers and faces. The blocking face does not run on fakeredis, whose pub/sub
    does not cross threads."""
    if "face" in metafunc.fixturenames:
        combinations = [("fakeredis", "async"), ("valkey", "async"), ("valkey", "sync")]
        metafunc.parametrize(("server", "face"), combinations, indirect=True)
    elif "server" in metafunc.fixturenames:
        metafunc.parametrize("server", ["fakeredis", "valkey"], indirect=True)


@pytest.fixture
def server(request: pytest.FixtureRequest) -> Server:
    if request.param == "fakeredis":
        return fake_server()
    url = request.getfixturevalue("redis_url")
    return Server(lambda: Redis.from_url(url), url)


@pytest.fixture
def valkey(redis_url: str) -> Server:
    return Server(lambda: Redis.from_url(redis_url), redis_url)


@pytest.fixture
async def redis(server: Server) -> AsyncIterator[Redis]:
    async with server.connect() as connection:
        yield connection


@pytest.fixture
def worker(redis: Redis, keys: Keys) -> FakeWorker:
    return FakeWorker(redis, keys)


@pytest.fixture
async def client(server: Server, queue: str) -> AsyncIterator[AsyncClient]:
    async with server.client(queue) as client:
        yield client


@pytest.fixture
async def face(request: pytest.FixtureRequest, server: Server, queue: str) -> AsyncIterator[Face]:
    if request.param == "async":
        async with server.client(queue) as client:
            yield Face(client)
    else:
        with Client(server.url, queue=queue) as client:
            yield Face(client)


class Finished(NamedTuple):
    exit_status: int
    stdout: str
    stderr: str


Ingine = Callable[..., Awaitable[Finished]]


async def start(*arguments: str) -> asyncio.subprocess.Process:
    pipe = asyncio.subprocess.PIPE
    command = [sys.executable, "-m", "ingine.cli.main", *arguments]
    return await asyncio.create_subprocess_exec(*command, stdin=pipe, stdout=pipe, stderr=pipe)


@pytest.fixture
def where(valkey: Server, queue: str) -> list[str]:
    return ["--redis-url", valkey.url, "--queue", queue]


@pytest.fixture
def ingine(where: list[str]) -> Ingine:
    """`await ingine("submit", "hi")` runs `ingine submit hi` on the test's queue."""

    async def run(*arguments: str, stdin: str = "") -> Finished:
        process = await start(*arguments, *where)
        stdout, stderr = await process.communicate(stdin.encode())
        return Finished(process.returncode, stdout.decode(), stderr.decode())

    return run
