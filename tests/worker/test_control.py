"""The control channel's listener: it hears again whatever became of its connection."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from urllib.parse import urlsplit
from uuid import uuid4

import msgpack

import worker.control
from ingine.keys import Keys
from ingine.servers import Servers
from tests.servers import HOST, cluster, free_port
from tests.waiting import wait_until_async
from worker.control import ControlListener
from worker.queue import nudge


@asynccontextmanager
async def listening(servers: Servers, keys: Keys) -> AsyncIterator[list[dict]]:
    """What a listener has heard."""
    heard: list[dict] = []

    async def obey(command: dict) -> None:
        heard.append(command)

    listener = asyncio.create_task(ControlListener(servers.client(keys), keys, obey).run())
    try:
        yield heard
    finally:
        listener.cancel()
        with suppress(asyncio.CancelledError):
            await listener
        await servers.aclose()


async def heard_anew(servers: Servers, keys: Keys, heard: list[dict]) -> None:
    """A nudge may come too early for a listener that has yet to notice: said until one is heard."""
    message = nudge("released", nonce=uuid4().hex)

    async def tell() -> bool:
        await servers.client(keys).execute_command("SPUBLISH", keys.control, message)
        return msgpack.unpackb(message) in heard

    await wait_until_async(tell, what="a nudge")


async def test_it_follows_its_slot_to_another_node(tmp_path, queue):
    with cluster(tmp_path) as three:
        servers, keys = Servers(three.url, client_name="test", retries=5), Keys(queue)
        async with listening(servers, keys) as heard:
            await heard_anew(servers, keys, heard)
            three.move(keys.control)
            await heard_anew(servers, keys, heard)


async def test_what_is_too_large_for_a_nudge_is_not_read(redis_url, queue):
    servers, keys = Servers(redis_url, client_name="test"), Keys(queue)
    async with listening(servers, keys) as heard:
        await heard_anew(servers, keys, heard)
        await servers.client(keys).execute_command("SPUBLISH", keys.control, nudge("x", text="x" * 2000))
        await heard_anew(servers, keys, heard)
    assert {command["command"] for command in heard} == {"released"}


class Relay:
    """Hands bytes on between its clients and a server. `cut()`: from then on not for those that it has."""

    def __init__(self, url: str):
        self._host, self._port = urlsplit(url).hostname, urlsplit(url).port
        self._tasks: set[asyncio.Task] = set()

    async def serve(self, port: int) -> None:
        self._server = await asyncio.start_server(self._relay, HOST, port)

    async def _relay(self, reader, writer) -> None:
        there_reader, there_writer = await asyncio.open_connection(self._host, self._port)
        for source, sink in ((reader, there_writer), (there_reader, writer)):
            self._tasks.add(asyncio.create_task(self._pass_on(source, sink)))

    async def _pass_on(self, source, sink) -> None:
        while chunk := await source.read(4096):
            sink.write(chunk)

    def cut(self) -> None:
        for task in self._tasks:
            task.cancel()
        self._tasks = set()


async def test_it_notices_that_nobody_is_at_the_other_end(redis_url, queue, monkeypatch):
    monkeypatch.setattr(worker.control, "PING_S", 0.2)
    relay, port, keys = Relay(redis_url), free_port(), Keys(queue)
    await relay.serve(port)
    behind, direct = (Servers(url, client_name="t") for url in (f"redis://{HOST}:{port}", redis_url))
    async with listening(behind, keys) as heard:
        await heard_anew(direct, keys, heard)
        relay.cut()
        await heard_anew(direct, keys, heard)
    await direct.aclose()
    relay.cut()
    relay._server.close()
