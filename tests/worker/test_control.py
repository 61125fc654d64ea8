"""The control channel's listener: it hears again whatever became of its connection."""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from urllib.parse import urlsplit
from uuid import uuid4

import ingine.worker.control
from ingine.connect.servers import Servers
from ingine.contract.control import nudge
from ingine.contract.keys import Keys
from ingine.worker.control import ControlListener
from tests.servers import HOST, cluster, free_port
from tests.waiting import wait_until_async


@asynccontextmanager
async def listening(servers: Servers, keys: Keys) -> AsyncIterator[list[set[str]]]:
    """Record the calls of a listener, which runs all jobs whose id begins with `ours`."""
    told: list[set[str]] = []

    async def obey(commands: set[str], cancelled: set[str]) -> None:
        told.append(commands | cancelled)

    control = ControlListener(
        servers.client(keys), keys, runs=lambda job_id: job_id.startswith("ours"), obey=obey
    )
    listener = asyncio.create_task(control.run())
    try:
        yield told
    finally:
        listener.cancel()
        with suppress(asyncio.CancelledError):
            await listener
        await servers.aclose()


async def publish(servers: Servers, keys: Keys, message: bytes) -> int:
    return await servers.client(keys).execute_command("SPUBLISH", keys.control, message)


async def heard_anew(servers: Servers, keys: Keys, told: list[set[str]]) -> None:
    """A nudge may come too early for a listener that has yet to notice: said until one is heard."""
    name = f"ours-{uuid4().hex}"

    async def tell() -> bool:
        await publish(servers, keys, nudge("cancel", job_id=name))
        return any(name in names for names in told)

    await wait_until_async(tell, what="a nudge")


async def test_it_follows_its_slot_to_another_node(tmp_path, queue):
    with cluster(tmp_path) as three:
        servers, keys = Servers(three.url, client_name="test", retries=5), Keys(queue)
        async with listening(servers, keys) as told:
            await heard_anew(servers, keys, told)
            three.move(keys.control)
            await heard_anew(servers, keys, told)


async def test_a_flood_of_nudges_is_one_look(redis_url, queue, monkeypatch, caplog):
    """The first of ten thousand is obeyed at once, and all others together, one interval later."""
    monkeypatch.setattr(ingine.worker.control, "MESSAGES_PER_INTERVAL", 1 << 30)
    servers, keys = Servers(redis_url, client_name="test"), Keys(queue)
    kinds = [nudge(command) for command in sorted(ingine.worker.control.COMMANDS)]
    kinds += [nudge("cancel", job_id="ours"), nudge("cancel", job_id="another's"), nudge("x"), b"\xc1", b""]
    kinds.append(nudge("cancel", job_id="ours" * 1000))
    async with listening(servers, keys) as told:
        await heard_anew(servers, keys, told)
        await asyncio.sleep(2 * ingine.worker.control.INTERVAL_S)
        monkeypatch.setattr(ingine.worker.control, "INTERVAL_S", 1000.0)
        del told[:]
        await publish(servers, keys, nudge("released"))
        await wait_until_async(lambda: told == [{"released"}])
        heard = Counter()
        monkeypatch.setattr(ControlListener, "_receive", counted(ControlListener._receive, heard))
        for _ in range(100):
            pipe = servers.client(keys).pipeline(transaction=False)
            for message in kinds * 10:
                pipe.spublish(keys.control, message)
            await pipe.execute()
        await wait_until_async(lambda: heard.total() == 100 * len(kinds) * 10, what="all of the flood")
        assert told == [{"released"}], "the next look comes an interval later"
    ignored = [record for record in caplog.records if "control message ignored" in record.message]
    assert len(ignored) == 1


def counted(method, counts: Counter):
    def calling(*args):
        counts[args[1]] += 1
        return method(*args)

    return calling


async def test_what_it_was_told_meanwhile_is_obeyed_together(redis_url, queue):
    servers, keys = Servers(redis_url, client_name="test"), Keys(queue)
    async with listening(servers, keys) as told:
        await heard_anew(servers, keys, told)
        for message in (nudge("drain"), nudge("pause"), nudge("cancel", job_id="ours"), nudge("drain")) * 10:
            await publish(servers, keys, message)
        await heard_anew(servers, keys, told)
    named = set().union(*told)
    assert {"drain", "pause", "ours"} <= named


async def test_what_is_too_large_for_a_nudge_is_not_read(redis_url, queue):
    servers, keys = Servers(redis_url, client_name="test"), Keys(queue)
    async with listening(servers, keys) as told:
        await heard_anew(servers, keys, told)
        await publish(servers, keys, nudge("released", text="x" * 2000))
        await heard_anew(servers, keys, told)
    assert "released" not in set().union(*told)


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
    monkeypatch.setattr(ingine.worker.control, "PING_S", 0.2)
    relay, port, keys = Relay(redis_url), free_port(), Keys(queue)
    await relay.serve(port)
    behind, direct = (Servers(url, client_name="t") for url in (f"redis://{HOST}:{port}", redis_url))
    async with listening(behind, keys) as told:
        await heard_anew(direct, keys, told)
        relay.cut()
        await heard_anew(direct, keys, told)
    await direct.aclose()
    relay.cut()
    relay._server.close()
